-- Put dead letters back, oldest first, with all their attempts again. Their state keeps what happened before.
-- needs: keys tokens envelope
--
-- KEYS  1 dead  2 jobs  3 state  4 wake  5-14 ready:0 … ready:9  15 none
-- ARGV  1 how many at most (of the oldest; at most 500)  2… or these ids
-- returns the number put back
local ids = {}
for i = 2, #ARGV do
  if redis.call('ZSCORE', KEYS[1], ARGV[i]) then ids[#ids + 1] = ARGV[i] end
end
if #ARGV == 1 and tonumber(ARGV[1]) > 0 then
  ids = redis.call('ZRANGE', KEYS[1], 0, math.min(tonumber(ARGV[1]), 500) - 1)
end
if #ids == 0 then return 0 end
local envelopes = redis.call('HMGET', KEYS[2], unpack(ids))
local states = redis.call('HMGET', KEYS[3], unpack(ids))
local lists = {}
for i in ipairs(ids) do
  lists[i] = KEYS[5 + priority_of(envelopes[i])]
  check('LLEN', lists[i])
end
redis.call('ZREM', KEYS[1], unpack(ids))
local prefix, count = string.sub(KEYS[2], 1, -5), 0
for i, id in ipairs(ids) do
  if envelopes[i] then
    local found = marks(envelopes[i])
    local starts, rest = string.match(states[i] or '', '^(%d+) %d+ %d+w?(.*)$')
    redis.call('HSET', KEYS[3], id, (starts or '0') .. ' 0 0' .. (rest or ''))
    -- The job lives again, so its own id is taken until a day after it ends.
    if found and found.own then redis.call('SET', prefix .. 'unique:i:' .. id, id) end
    redis.call('RPUSH', lists[i], id)
    count = count + 1
  end
end
if count > 0 then wake(KEYS[4]) end
return count
