-- Put dead letters back, oldest first, with all their attempts again. Their state keeps what happened before.
-- needs: numbers keys tokens envelope rights
--
-- KEYS  1 dead  2 jobs  3 state  4 wake  5-14 ready:0 … ready:9  15 none
-- ARGV  1 how many at most (at most 500)  2 behind how many of the oldest      or  1 "0"  2… these ids
-- returns {number put back, (id holder)…}    behind it those that stay dead: another job holds their unique key now
local found_ids, most = {}, tonumber(ARGV[1])
if most > 0 then
  local first = number_in(ARGV[2])
  found_ids = redis.call('ZRANGE', KEYS[1], first, first + math.min(most, 500) - 1)
else
  local seen = {}
  for i = 2, #ARGV do
    if not seen[ARGV[i]] and redis.call('ZSCORE', KEYS[1], ARGV[i]) then found_ids[#found_ids + 1] = ARGV[i] end
    seen[ARGV[i]] = true
  end
end
if #found_ids == 0 then return {0} end
local prefix, reply, claimed = string.sub(KEYS[2], 1, -5), {0}, {}
local ids, envelopes, lists = {}, {}, {}
for i, envelope in ipairs(redis.call('HMGET', KEYS[2], unpack(found_ids))) do
  local id, found = found_ids[i], envelope and marks(envelope)
  local holder = nil
  if found and found.unique then
    holder = claimed[found.unique] or redis.call('GET', prefix .. 'unique:k:' .. found.unique)
    if holder and (holder == id or redis.call('HEXISTS', KEYS[2], holder) == 0) then holder = nil end
    claimed[found.unique] = holder or id
  end
  if holder then
    reply[#reply + 1], reply[#reply + 2] = id, holder
  else
    local at = #ids + 1
    ids[at], envelopes[at], lists[at] = id, envelope, KEYS[5 + priority_of(envelope)]
    check('LLEN', lists[at])
  end
end
if #ids == 0 then return reply end
local states = redis.call('HMGET', KEYS[3], unpack(ids))
prove(prefix .. 'none', 'ZREM', 'HSET', 'SET', 'RPUSH')
redis.call('ZREM', KEYS[1], unpack(ids))
local count = 0
for i, id in ipairs(ids) do
  if envelopes[i] then
    local found = marks(envelopes[i])
    local starts, rest = string.match(states[i] or '', '^(%d+) %d+ %d+w?(.*)$')
    redis.call('HSET', KEYS[3], id, (starts or '0') .. ' 0 0' .. (rest or ''))
    -- The job lives again, so its own id is taken until a day after it ends, and its unique key until it ends.
    if found and found.own then redis.call('SET', prefix .. 'unique:i:' .. id, id) end
    if found and found.unique then redis.call('SET', prefix .. 'unique:k:' .. found.unique, id) end
    redis.call('RPUSH', lists[i], id)
    count = count + 1
  end
end
if count > 0 then wake(KEYS[4]) end
reply[1] = count
return reply
