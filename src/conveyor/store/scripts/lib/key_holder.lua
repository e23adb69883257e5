-- Taking unique keys; lib/unique.lua says what they are.

-- Find the job that holds a key.
-- prefix   of the queue's keys
-- key      one of attributes()
-- returns  its id; nil when the key is free: a holder that is gone does not count, unless the key is of a time
local function holder_of(prefix, key)
  local name = prefix .. 'unique:k:' .. key.text
  local holder = redis.call('GET', name)
  if not holder or redis.call('HEXISTS', prefix .. 'jobs', holder) == 1 then return holder or nil end
  return key.life == 't' and holder or nil
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
