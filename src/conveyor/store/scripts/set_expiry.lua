-- Record after which time a queue goes that nobody uses. A queue that is new gets its settings here.
-- needs: numbers keys rights expiry
--
-- KEYS  1 conf  2 none
-- ARGV  1 ms
-- returns 1; 0 when the layout is another version's, and nothing was changed
local schema = redis.call('HGET', KEYS[1], 'schema')
if (schema or '1') ~= '1' and schema ~= '2' then return 0 end
local prefix, now = string.sub(KEYS[1], 1, -5), clock()
check('HLEN', prefix .. 'jobs')
check('ZCARD', prefix .. 'workers')
prove(KEYS[2], 'HMGET', 'EXISTS', 'PTTL', 'ZRANGE', 'PERSIST', 'PEXPIREAT')
redis.call('HDEL', KEYS[1], '\t') -- a removal first, so that a full Redis takes the rest
redis.call('HSET', KEYS[1], 'schema', '2', 'expires', int(number_in(ARGV[1])))
renew_expiry(prefix, now)
return 1
