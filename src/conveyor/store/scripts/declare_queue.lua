-- Record what a program declares of a queue: after which time it goes that nobody uses, and how many events it keeps. A queue that is
-- new gets its settings here.
-- needs: numbers keys rights expiry
--
-- KEYS  1 conf  2 none
-- ARGV  1 ms, "0" it stays  2 number of events, "0" none, "" not said
-- returns 1; 0 when the layout is another version's, and nothing was changed
local schema = redis.call('HGET', KEYS[1], 'schema')
if (schema or '1') ~= '1' and schema ~= '2' then return 0 end
local prefix, now, expires = string.sub(KEYS[1], 1, -5), clock(), number_in(ARGV[1])
check('HLEN', prefix .. 'jobs')
check('ZCARD', prefix .. 'workers')
if expires > 0 then prove(KEYS[2], 'HMGET', 'EXISTS', 'PTTL', 'ZRANGE', 'PERSIST', 'PEXPIREAT') end
redis.call('HDEL', KEYS[1], '\t') -- a removal first, so that a full Redis takes the rest
if ARGV[2] == '0' then redis.call('HDEL', KEYS[1], 'events')
elseif ARGV[2] ~= '' then redis.call('HSET', KEYS[1], 'events', int(number_in(ARGV[2]))) end
if expires > 0 then
  redis.call('HSET', KEYS[1], 'schema', '2', 'expires', int(expires))
  renew_expiry(prefix, now)
end
return 1
