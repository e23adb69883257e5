-- Pause, resume or delete a schedule, or put its alarm off.
-- needs: numbers tokens rights schedules expiry
--
-- KEYS  1 schedule:<name>  2 schedules  3 due  4 conf  5 wake  6 none
-- ARGV  1 name  2 "pause" · "resume": from the instant in 3 on · "delete" · "defer": its alarm, to the instant in 3, as nobody here
--       knows its task  3 ms, "" when no instant comes any more  4 "resume": instants that have come since the pause
-- returns 1 done · 0 nothing to do · -1 there is no such schedule
local key, action, now = KEYS[1], ARGV[2], clock()
local known = redis.call('HMGET', key, 'digest', 'next', 'paused', 'runs')
redis.call('SCARD', KEYS[2])
redis.call('ZRANGE', KEYS[3], 0, 0)
local expires = redis.call('HGET', KEYS[4], 'expires')
if ARGV[3] ~= '' then number_in(ARGV[3]) end
local passed = number_in(ARGV[4])
prove(KEYS[6], 'ZREM', 'DEL', 'SREM', 'HDEL', 'HSET', 'ZADD', 'HINCRBY')
local counted = nil
if known[1] then counted = known[2] ~= '' and known[3] ~= '1' end
if not known[1] or action == 'delete' then
  set_schedule_alarm(KEYS[3], KEYS[4], KEYS[5], ARGV[1], '', counted)
  redis.call('DEL', key)
  redis.call('SREM', KEYS[2], ARGV[1])
  if expires then pcall(function() renew_expiry(string.sub(KEYS[4], 1, -5), now) end) end
  return known[1] and 1 or -1
end
if action == 'defer' then
  return redis.call('ZADD', KEYS[3], 'XX', 'CH', ARGV[3], '\t\t' .. ARGV[1])
elseif action == 'pause' then
  if known[3] == '1' then return 0 end
  set_schedule_alarm(KEYS[3], KEYS[4], KEYS[5], ARGV[1], '', counted)
  redis.call('HSET', key, 'paused', '1')
else
  if known[3] ~= '1' then return 0 end
  redis.call('HDEL', key, 'paused')
  redis.call('HSET', key, 'next', ARGV[3])
  if passed > 0 and known[2] ~= '' and tonumber(known[2]) <= now then
    note_skipped(key, known[4], known[2], now, 'paused', passed)
  end
  set_schedule_alarm(KEYS[3], KEYS[4], KEYS[5], ARGV[1], ARGV[3], false)
end
return 1
