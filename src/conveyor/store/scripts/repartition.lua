-- Make one step of changing the number of partitions of a queue. Nothing is pushed or leased where the number is 0.
-- needs: tokens rights
--
-- KEYS  1 conf  2 jobs  3 workers  4 wake  5 none  6 outbox
-- ARGV  1 step  2 token of this change  then
--       begin  3 the number to come            on the queue itself: shut it, and own the change; takes an abandoned one over
--       close  3 the number now, "" any        on a partition: shut it
--       end    3 the number that holds now     on the queue itself: the change is over, as it was meant or as it was before
--       open   3 the number that holds now     on a partition that this change has shut
-- returns {1, number before} done · {0, jobs} not empty, its outbox counts · {-1, found} another number, or another's change; then nothing changed
local conf, jobs, step, token = KEYS[1], KEYS[2], ARGV[1], ARGV[2]
local found = redis.call('HMGET', conf, 'partitions', 'switch', 'schema')
local number = found[1] or '1'

if step == 'end' or step == 'open' then
  if not found[2] or string.match(found[2], '%S+$') ~= token then return {-1, number} end
  redis.call('HDEL', conf, '\t')
  -- A queue of one partition has no number recorded, as if it had never been changed.
  if step == 'end' and ARGV[3] == '1' then redis.call('HDEL', conf, 'partitions')
  else redis.call('HSET', conf, 'partitions', ARGV[3]) end
  redis.call('HDEL', conf, 'switch')
  wake(KEYS[4])
  return {1, number}
end

local length = redis.call('HLEN', jobs) + redis.call('LLEN', KEYS[6])
local workers = redis.call('ZRANGE', KEYS[3], 0, -1)
if step == 'close' and found[1] and found[1] ~= '0' and ARGV[3] ~= '' and found[1] ~= ARGV[3] then return {-1, found[1]} end
if length > 0 then return {0, length} end

-- Its workers hold nothing. Each learns the new number when it registers again.
local prefix = string.sub(jobs, 1, -5)
prove(prefix .. 'none', 'DEL', 'HSET')
redis.call('DEL', KEYS[3])
for _, worker in ipairs(workers) do
  redis.call('DEL', prefix .. 'leased:' .. worker)
  redis.pcall('RPUSH', prefix .. 'wake:' .. worker, '1')
  redis.pcall('PEXPIRE', prefix .. 'wake:' .. worker, 60000)
end
if step == 'begin' then
  if number == '0' then number = string.match(found[2] or '', '^%d+') or '1' end
  redis.call('HSET', conf, 'partitions', '0', 'switch', number .. ' ' .. ARGV[3] .. ' ' .. token, 'schema', found[3] or '2')
else
  redis.call('HSET', conf, 'partitions', '0', 'switch', token, 'schema', found[3] or '2')
end
wake(KEYS[4])
return {1, number}
