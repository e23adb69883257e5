-- Taking unique keys; lib/unique.lua says what they are.

-- Tell whether a job has expired while it waited: the lease that reaches it drops it. With a successor it keeps its keys, which that one
-- takes over then.
-- prefix, id, envelope  of the job
-- returns     true or false
local function is_expired(prefix, id, envelope)
  local found = marks(envelope)
  return found and found.expires and found.expires <= clock() and not found.stub and not is_leased(prefix, id)
    and not redis.call('ZSCORE', prefix .. 'dead', id) and redis.call('HEXISTS', prefix .. 'reruns', id) == 0 or false
end

-- Find the job that holds a key.
-- prefix   of the queue's keys
-- key      one of attributes()
-- returns  its id and its envelope, false when that is gone; nil when the key is free: a holder that has expired does not count, nor one that is gone, unless the key is of a time
local function holder_of(prefix, key)
  local holder = redis.call('GET', prefix .. 'unique:k:' .. key.text)
  local envelope = holder and redis.call('HGET', prefix .. 'jobs', holder)
  if envelope and is_expired(prefix, holder, envelope) or not envelope and key.life ~= 't' then return nil end
  return holder or nil, envelope
end

-- Give a key to a job.
-- prefix   of the queue's keys
-- key      one of attributes()
-- id       of the job
-- returns  nothing
local function take_key(prefix, key, id)
  if key.life == 't' then redis.call('SET', prefix .. 'unique:k:' .. key.text, id, 'PX', int(key.ms))
  else redis.call('SET', prefix .. 'unique:k:' .. key.text, id) end
end
