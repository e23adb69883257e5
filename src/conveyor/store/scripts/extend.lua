-- Split one message off to an identity of its own, with its own end.
--
-- KEYS  1 leased:<worker>  2 leased:<new worker>  3 workers
-- ARGV  1 id  2 new worker  3 ms from now  4 about
-- returns 1, also when it was done before; 0 when the lease is lost
if redis.call('HEXISTS', KEYS[2], ARGV[1]) == 1 then return 1 end
if redis.call('HEXISTS', KEYS[1], ARGV[1]) == 0 then return 0 end
redis.call('HDEL', KEYS[1], ARGV[1])
redis.call('HSET', KEYS[2], '\tturn', 0, '\tabout', ARGV[4], '\tlease', ARGV[3], ARGV[1], 1)
redis.call('ZADD', KEYS[3], clock() + tonumber(ARGV[3]), ARGV[2])
return 1
