-- Stop waiting for a job.
--
-- KEYS  1 waiters
-- ARGV  1 id  2 channel of the waiting process
-- returns 1
local rest = {}
for channel in string.gmatch(redis.call('HGET', KEYS[1], ARGV[1]) or '', '%S+') do
  if channel ~= ARGV[2] then rest[#rest + 1] = channel end
end
-- The first write is a removal, so that a full Redis takes the rest too. It never empties the key, which is written again:
-- a server that is moving the slot would refuse that.
redis.call('HDEL', KEYS[1], #rest > 0 and '\t' or ARGV[1])
if #rest > 0 then redis.call('HSET', KEYS[1], ARGV[1], table.concat(rest, ' ')) end
return 1
