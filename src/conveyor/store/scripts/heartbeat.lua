-- Renew all that a worker holds: its lease is one entry.
-- needs: numbers
--
-- KEYS  1 leased:<worker>  2 workers
-- ARGV  1 worker  2 lease_ms
-- returns 1, or 0 when the worker has left or was reaped and must register again
local known = redis.call('HMGET', KEYS[1], '\tturn', '\tleft')
if not known[1] or known[2] then return 0 end
redis.call('ZREM', KEYS[2], '\t')
redis.call('ZADD', KEYS[2], clock() + tonumber(ARGV[2]), ARGV[1])
return 1
