-- Register a worker under an identity that was never used before. Repeating it changes nothing.
-- needs: numbers keys
--
-- KEYS  1 leased:<worker>  2 workers  3 conf
-- ARGV  1 worker  2 lease_ms  3 about (JSON, longer than 64 bytes so that the hash is a hashtable)
--       4 partitions of the queue (1: none)
-- returns now_ms and 1 when the queue was new here, else 0; or -1 and the schema found when the layout is another version's,
--         or -2 and the partitions found, "" none yet, when their number is another
local conf = redis.call('HMGET', KEYS[3], 'schema', 'partitions')
local schema = conf[1]
if (schema or '1') ~= '1' and schema ~= '2' then return {-1, schema} end
if (conf[2] or '1') ~= ARGV[4] then return {-2, conf[2] or ''} end
local now = clock()
check('ZCARD', KEYS[2])
redis.call('HDEL', KEYS[1], '\t')
if redis.call('HEXISTS', KEYS[1], '\tturn') == 0 then
  redis.call('HSET', KEYS[1], '\tturn', 0, '\tabout', ARGV[3], '\tlease', ARGV[2])
end
redis.call('ZADD', KEYS[2], now + tonumber(ARGV[2]), ARGV[1])
if schema ~= '2' then redis.call('HSET', KEYS[3], 'schema', '2') end
return {now, schema and 0 or 1}
