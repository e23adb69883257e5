-- Declare a schedule: a new one, or another definition of one that is there. The same definition changes nothing.
-- needs: numbers tokens rights schedules expiry
--
-- KEYS  1 schedule:<name>  2 schedules  3 due  4 conf  5 wake  6 none
-- ARGV  1 name  2 digest of the definition  3 the definition (JSON)  4 what it enqueues (an entry of an outbox)
--       5 "code" or "data": its origin  6 its next instant (ms), "" when there is none
-- returns 1 new · 2 changed · 0 as it was · -1 it has the other origin, nothing was stored
local key, due, conf = KEYS[1], KEYS[3], KEYS[4]
local known = redis.call('HMGET', key, 'digest', 'origin', 'next', 'paused', 'runs')
if known[2] and known[2] ~= ARGV[5] then return -1 end
if known[1] == ARGV[2] then return 0 end
if ARGV[6] ~= '' then number_in(ARGV[6]) end
local now = clock()
redis.call('SCARD', KEYS[2])
redis.call('ZRANGE', due, 0, 0)
local expires = redis.call('HGET', conf, 'expires')
prove(KEYS[6], 'ZREM', 'SADD', 'HSET', 'ZADD', 'HINCRBY')
redis.call('SADD', KEYS[2], ARGV[1])
redis.call('HSET', key, 'digest', ARGV[2], 'spec', ARGV[3], 'entry', ARGV[4], 'origin', ARGV[5], 'next', ARGV[6], 'declared', int(now))
-- An instant that had come and that nobody had carried out yet belongs to the definition of before, unless this one goes on from it.
if known[3] and known[3] ~= '' and known[3] ~= ARGV[6] and tonumber(known[3]) <= now then note_skipped(key, known[5], known[3], now, 'superseded', 1) end
if known[4] ~= '1' then
  local counted = nil
  if known[1] then counted = known[3] ~= '' end
  set_schedule_alarm(due, conf, KEYS[5], ARGV[1], ARGV[6], counted)
end
if expires then pcall(function() renew_expiry(string.sub(conf, 1, -5), now) end) end
return known[1] and 2 or 1
