-- Make a scheduled job ready now.
-- needs: keys tokens envelope rights
--
-- KEYS  1 due  2 jobs  3 wake  4-13 ready:0 … ready:9
-- ARGV  1 id
-- returns 1, or 0 when it is not scheduled
local envelope = redis.call('HGET', KEYS[2], ARGV[1])
local ready = KEYS[4 + priority_of(envelope)]
check('LLEN', ready)
prove(string.sub(KEYS[2], 1, -5) .. 'none', 'ZREM', 'RPUSH')
if redis.call('ZREM', KEYS[1], ARGV[1]) == 0 then return 0 end
if not envelope then return 0 end
redis.call('RPUSH', ready, ARGV[1])
wake(KEYS[3])
return 1
