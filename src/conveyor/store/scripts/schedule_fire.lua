-- Carry out one instant of a schedule, once: enqueue its job, or skip it, and move on to the next instant.
-- needs: numbers keys tokens envelope tags unique announce outcome rights limits group_limits groups place_change is_leased key_holder conflict room admission events shut_tasks drop expiry accept schedules
--
-- KEYS  1 schedule:<name>  2 jobs  3 due  4 wake  5 conf  6 dead  7-16 ready:0 … ready:9  17 none
-- ARGV  1 name  2 digest of the definition that was read  3 the instant (ms)  4 the instant behind it (ms), "" when none comes
--       5 why it is skipped, "" when it is not  6 how many instants are skipped  7 "1": skip it while the last job lives
--       8… the push of the job: as ARGV of push.lua, from 1 on, so its id is 14
-- returns {1, id} enqueued · {2, reason} skipped · {0} another worker has carried it out, or the schedule has changed
--         {-1, reply} the queue refused the job as a push is refused; nothing was changed
local key, due, now = KEYS[1], KEYS[3], clock()
local known = redis.call('HMGET', key, 'digest', 'next', 'paused', 'runs', 'last')
redis.call('ZRANGE', due, 0, 0)
redis.call('HLEN', KEYS[5])
if known[1] ~= ARGV[2] or known[2] ~= ARGV[3] or known[3] == '1' then return {0} end
number_in(ARGV[3])
if ARGV[4] ~= '' then number_in(ARGV[4]) end
local reason = ARGV[5]
if reason == '' and ARGV[7] == '1' and known[5] and redis.call('HEXISTS', KEYS[2], known[5]) == 1
  and not redis.call('ZSCORE', KEYS[6], known[5]) then reason = 'overlap' end

-- The clock was set back, and the instant comes a second time.
if reason == '' and redis.call('HEXISTS', KEYS[2], ARGV[14]) == 1 then reason = 'overlap' end

local store
if reason == '' then
  local push = {}
  for i = 8, #ARGV do push[i - 7] = ARGV[i] end
  local refusal
  refusal, store = prepare_push(KEYS, push)
  if refusal then return {-1, refusal} end
end
prove(KEYS[17], 'ZREM', 'HSET', 'ZADD', 'HINCRBY')
local id = store and string.match(store(), '^[^\n]*\n[^\n]*\n\t?([^\n\t]*)')
if reason ~= '' then note_skipped(key, known[4], ARGV[3], now, reason, tonumber(ARGV[6]))
else
  redis.call('HINCRBY', key, 'fired', 1)
  redis.call('HSET', key, 'last', id)
  note_run(key, known[4], ARGV[3] .. ' ' .. int(now) .. ' fired ' .. id)
end
redis.call('HSET', key, 'next', ARGV[4])
set_schedule_alarm(due, KEYS[5], KEYS[4], ARGV[1], ARGV[4], true)
return reason == '' and {1, id} or {2, reason}
