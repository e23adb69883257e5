-- Record the number of partitions of a queue, or compare it: the first number that is recorded stands.
--
-- KEYS  1 conf
-- ARGV  1 partitions, 2 or more  2 "queue" for the queue itself, whose number decides; "partition" for one of its partitions;
--       "look" for the queue itself, to compare alone
-- returns {1} recorded now, or "look": none is recorded · {0} it was this number · {-1, number} another · {-2, switch} it is being
--         changed
local found = redis.call('HMGET', KEYS[1], 'partitions', 'schema', 'switch')
if found[1] == '0' then return {-2, found[3] or ''} end
-- A queue that was used without the field has one partition. A partition is used only after its number was recorded.
local number = found[1] or (ARGV[2] ~= 'partition' and found[2] and '1')
if number and number ~= ARGV[1] then return {-1, number} end
if number then return {0} end
if ARGV[2] == 'look' then return {1} end
redis.call('HSET', KEYS[1], 'partitions', ARGV[1], 'schema', found[2] or '2')
return {1}
