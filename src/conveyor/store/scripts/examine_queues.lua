-- Find what asks for a closer look in queues at one server.
--
-- KEYS  conf of each queue
-- ARGV  none
-- returns for each queue {1 while a change of its partitions is under way or incomplete, 1 when it has schedules}, else 0
local reply = {}
for number, conf in ipairs(KEYS) do
  local closed = redis.call('HGET', conf, 'partitions') == '0' and 1 or 0
  reply[number] = {closed, redis.call('EXISTS', string.sub(conf, 1, -5) .. 'schedules')}
end
return reply
