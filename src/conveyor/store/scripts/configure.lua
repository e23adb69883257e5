-- Change a setting that is kept with the queue, and wake a worker, since the change may let it take jobs. A raised maximum length
-- makes room for producers that wait for it.
-- needs: numbers tokens room
--
-- KEYS  1 conf  2 wake
-- ARGV  1 field  2 value, "" to remove it
-- returns 1
-- The first write is a removal, so that a full Redis takes the setting too. It never empties the key that is written then: a
-- server that is moving the slot would refuse that.
redis.call('HDEL', KEYS[1], ARGV[2] == '' and ARGV[1] or '\t')
if ARGV[2] ~= '' then redis.call('HSET', KEYS[1], ARGV[1], ARGV[2]) end
wake(KEYS[2])
if ARGV[1] == 'max_length' then call_next(string.sub(KEYS[1], 1, -5)) end
return 1
