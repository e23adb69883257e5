-- Send a command to a worker: it takes it from its own wake-up list, as it takes a token.
--
-- KEYS  1 wake:<worker>  2 leased:<worker>
-- ARGV  1 the command (JSON)
-- returns 1, or 0 when the worker has left or was reaped
if redis.call('HEXISTS', KEYS[2], '\tturn') == 0 or redis.call('HEXISTS', KEYS[2], '\tleft') == 1 then return 0 end
redis.call('LTRIM', KEYS[1], -100, -1) -- a removal first, so that a full Redis takes the command too
redis.call('RPUSH', KEYS[1], ARGV[1])
redis.pcall('PEXPIRE', KEYS[1], 60000)
return 1
