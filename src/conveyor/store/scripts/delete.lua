-- Delete a queue, or one of its partitions, that holds nothing and that no worker serves: all its keys in one step.
-- needs: numbers leased
--
-- KEYS  1 jobs  2 due  3 dead  4 workers  5 conf  6-15 ready:0 … ready:9  16 outbox  17 state  18 recent  19 waiters  20 wake
--       21 upkeep  22 none  then, for a plain list, its intake and the list
-- ARGV  1 "check": delete nothing · "forget": only a queue without settings · "delete"
--       2 token of the change that has shut it (repartition.lua), "" for a queue in one piece
--       3… other keys with the same tag that are deleted with it
-- returns {1} nothing is in it, and it was deleted · {0, ready, scheduled, leased, dead, jobs in the outbox, jobs in no place, workers, schedules}
--         · {-1} it has another number of partitions, or is being changed; then nothing was deleted
local now, prefix = clock(), string.sub(KEYS[1], 1, -5)
local conf = redis.call('HMGET', KEYS[5], 'stubs', 'partitions', 'switch', 'waiting', 'waiting_stubs', 'alarms')
if ARGV[2] ~= '' then
  if not conf[3] or string.match(conf[3], '%S+$') ~= ARGV[2] then return {-1} end
elseif ARGV[1] == 'delete' and (conf[2] or '1') ~= '1' then
  return {-1}
end
if ARGV[1] == 'forget' and redis.call('EXISTS', KEYS[5]) == 1 then return {-1} end

local entries, stubs, listed = 0, tonumber(conf[1] or 0), 0
for i = 6, 15 do entries = entries + redis.call('LLEN', KEYS[i]) end
for i = 23, #KEYS do listed = listed + redis.call('LLEN', KEYS[i]) end
local gone = {unpack(KEYS)}
for _, name in ipairs({'room', 'events', 'event-readers', 'needs'}) do gone[#gone + 1] = prefix .. name end
local leased, serving = 0, 0
for _, worker in ipairs(redis.call('ZRANGE', KEYS[4], 0, -1)) do
  local held = count_held(prefix .. 'leased:' .. worker)
  leased = leased + held
  if tonumber(redis.call('ZSCORE', KEYS[4], worker)) > now then serving = serving + 1 end
  gone[#gone + 1], gone[#gone + 2] = prefix .. 'leased:' .. worker, prefix .. 'wake:' .. worker
end
if conf[4] then
  -- Jobs in groups count as ready; tickets are no jobs. What limits remember of a queue without jobs goes with it.
  entries = entries - redis.call('SCARD', prefix .. 'tickets') + tonumber(conf[4])
  for _, name in ipairs({'tickets', 'waits', 'limits', 'slots', 'credits'}) do gone[#gone + 1] = prefix .. name end
end
local scheduled, dead, outbox = redis.call('ZCARD', KEYS[2]) - tonumber(conf[6] or 0), redis.call('ZCARD', KEYS[3]), redis.call('LLEN', KEYS[16])
local unplaced = math.max(0, redis.call('HLEN', KEYS[1]) - entries - scheduled - leased - dead)
local ready = math.max(0, entries - stubs) + listed
local schedules = redis.call('SCARD', prefix .. 'schedules')
if ready + scheduled + leased + dead + outbox + unplaced + serving + schedules > 0 then
  return {0, ready, scheduled, leased, dead, outbox, unplaced, serving, schedules}
end
if ARGV[1] == 'check' then return {1} end

for i = 3, #ARGV do gone[#gone + 1] = ARGV[i] end
for first = 1, #gone, 7000 do redis.call('DEL', unpack(gone, first, math.min(first + 6999, #gone))) end
return {1}
