-- Remove jobs that wait, from the front, in one bounded batch. Jobs that arrive after a purge began survive it.
-- needs: numbers keys envelope tags outcome rights room
--
-- KEYS  1 jobs  2 state  3 due  4 dead  5 conf  6 waiters  7-16 ready:0 … ready:9  17 none
-- ARGV  1 "ready", "due" or "dead"  2 how many at most (at most 1,000)
-- returns {entries taken, jobs removed}
local jobs, limit = KEYS[1], math.min(tonumber(ARGV[2]), 1000)
if limit < 1 then return {0, 0} end
local prefix = string.sub(jobs, 1, -5)
local ids = {}
check('HLEN', KEYS[2], KEYS[6])
local line = redis.call('HGET', KEYS[5], 'line')
check('LLEN', unpack(KEYS, 7, 16))
local record = cancelled_record(clock(), 'purged')
redis.call('HDEL', jobs, '\t')
prove(prefix .. 'none', 'LPOP', 'ZREM', 'HMGET', 'HINCRBY', 'GET', 'DEL', 'PEXPIRE', 'HGET')
if ARGV[1] == 'ready' then
  for priority = 9, 0, -1 do
    local popped = limit > #ids and redis.call('LPOP', KEYS[7 + priority], limit - #ids)
    for _, id in ipairs(popped or {}) do ids[#ids + 1] = id end
  end
else
  local from = ARGV[1] == 'due' and KEYS[3] or KEYS[4]
  ids = redis.call('ZRANGE', from, 0, limit - 1)
  if #ids > 0 then redis.call('ZREM', from, unpack(ids)) end
end
if #ids == 0 then return {0, 0} end
local envelopes, removed = redis.call('HMGET', jobs, unpack(ids)), 0
local untagged = {}
for i, id in ipairs(ids) do
  local found = envelopes[i] and marks(envelopes[i])
  if found and found.stub then
    redis.call('HINCRBY', KEYS[5], 'stubs', -1)
  elseif envelopes[i] then
    removed = removed + 1
    list_tags(untagged, found and found.tags, id)
    if found then release(prefix, id, found.unique, found.own) end
  end
  announce(KEYS[6], id, record)
end
redis.call('HDEL', jobs, unpack(ids))
redis.call('HDEL', KEYS[2], unpack(ids))
change_tags('ZREM', prefix, untagged)
if line then call_next(prefix) end
return {#ids, removed}
