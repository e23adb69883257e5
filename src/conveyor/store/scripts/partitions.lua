-- Read the number of partitions of a queue.
--
-- KEYS  1 conf
-- ARGV  none
-- returns {number (1: one piece, 0: it is being changed), the change under way or ""}
local found = redis.call('HMGET', KEYS[1], 'partitions', 'switch')
return {found[1] or '1', found[2] or ''}
