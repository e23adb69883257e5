-- Unique keys. unique:k:<text> holds the id of the job that has the key; a key of a time outlives that job.
-- The job that is to run once more when another one has run is its successor. It has a record in jobs and stands in no list: the
-- hash reruns leads from the job that runs to it. It takes its place when that one gives its keys back.

-- Put the successor of a job into its place, with the keys that are free by now.
-- prefix   of the queue's keys
-- id       of the job that has given back its keys
-- returns  nothing
local function admit_successor(prefix, id)
  local successor = redis.call('HGET', prefix .. 'reruns', id)
  local envelope = successor and redis.call('HGET', prefix .. 'jobs', successor)
  if not successor then return end
  redis.call('HDEL', prefix .. 'reruns', id)
  if not envelope then return end
  local found = marks(envelope) or {}
  for _, key in ipairs(found.keys or {}) do
    local name = prefix .. 'unique:k:' .. key.text
    if key.life == 't' then
      if redis.call('GET', name) == id then redis.call('SET', name, successor, 'XX', 'KEEPTTL') end
    else redis.call('SET', name, successor, 'NX') end
  end
  local now = clock()
  if found.due and found.due > now then redis.call('ZADD', prefix .. 'due', found.due, successor)
  elseif group_of(found) then redis.call('ZADD', prefix .. 'due', now, successor) -- the next turn puts it into its group
  else redis.call('RPUSH', prefix .. 'ready:' .. int(found.priority or 0), successor) end
  wake(prefix .. 'wake')
end

-- Give back the keys of a job; its successor takes its place.
-- prefix   of the queue's keys
-- id       of the job
-- found    its attributes
-- ended    true when it has run to an end: a key of a time is kept then
-- returns  nothing
local function release_keys(prefix, id, found, ended)
  if not found.keys then return end
  local function free(timed)
    for _, key in ipairs(found.keys) do
      local name = prefix .. 'unique:k:' .. key.text
      if (key.life == 't') == timed and redis.pcall('GET', name) == id then redis.call('DEL', name) end
    end
  end
  free(false)
  admit_successor(prefix, id) -- it takes over what is left of a time
  if not ended then free(true) end
end
