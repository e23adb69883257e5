-- Replace what a registered worker says of itself.
--
-- KEYS  1 leased:<worker>
-- ARGV  1 about (JSON, longer than 64 bytes)
-- returns 1, or 0 when it is not registered
if redis.call('HEXISTS', KEYS[1], '\tturn') == 0 then return 0 end
redis.call('HDEL', KEYS[1], '\t')
redis.call('HSET', KEYS[1], '\tabout', ARGV[1])
return 1
