-- Register a worker under an identity that was never used before. Repeating it changes nothing.
-- needs: numbers keys look rights listed worker_name serving expiry
--
-- KEYS  1 leased:<worker>  2 workers  3 conf  4 none
--       then, to register only where there is work: 5 due  6 dead  7-16 ready:0 … ready:9, and the list and intake of a plain list
-- ARGV  1 worker  2 lease_ms  3 about (JSON, longer than 64 bytes so that the hash is a hashtable)
--       4 partitions of the queue (1: none)  5 a channel that the worker must be able to publish to
--       6 digest of the names of the tasks that it knows  7 the names, one a line; "" twice for a consumer of messages
-- returns now_ms and 1 when the queue was new here, else 0; or -1 and the schema found when the layout is another version's,
--         or -2 and the partitions found, "" none yet, when their number is another,
--         or -3 and a command that the worker's steps need and this user may not send,
--         or -4, now_ms, and when the next job is due (ms; -1: none): there is no work, and no worker was registered
-- Return the first of the commands that this user may not send, nil when all are allowed.
local function first_refused(none, commands)
  for _, command in ipairs(commands) do
    local allowed, answer = pcall(function() prove(none, command) end)
    if not allowed then
      local text = type(answer) == 'table' and answer.err or tostring(answer)
      -- As 7 and 6.2 word it. Anything else, such as a slot that moves, is no matter of rights.
      if string.find(text, 'ACL failure', 1, true) or string.find(text, 'user executing the script', 1, true) then return command end
      error(text)
    end
  end
end

local conf = redis.call('HMGET', KEYS[3], 'schema', 'partitions', 'expires')
local schema = conf[1]
if (schema or '1') ~= '1' and schema ~= '2' then return {-1, schema} end
local now = clock()
-- Tell whether a turn would find nothing to lease and nothing to care for. When the next job is due comes with it.
local function is_idle()
  local due, paused = redis.call('ZRANGE', KEYS[5], 0, 0, 'WITHSCORES')[2], redis.call('HGET', KEYS[3], 'paused') == '1'
  local outbox = string.sub(KEYS[3], 1, -5) .. 'outbox'
  if needs_upkeep(KEYS[2], KEYS[6], outbox, now, number_in(ARGV[2])) then return false end
  local waits = (due and tonumber(due) <= now) or redis.call('EXISTS', unpack(KEYS, 7)) > 0
  return paused or not waits, due and not paused and tonumber(due) or -1
end

if KEYS[5] and redis.call('HEXISTS', KEYS[1], '\tturn') == 0 then
  local idle, next_due = is_idle()
  -- A partition that no program has used yet has no number, and holds nothing.
  if idle and (conf[2] or ARGV[4]) == ARGV[4] then
    if conf[3] then renew_expiry(string.sub(KEYS[3], 1, -5), now) end
    return {-4, now, next_due}
  end
end
if (conf[2] or '1') ~= ARGV[4] then return {-2, conf[2] or ''} end
check('ZCARD', KEYS[2])
redis.call('HDEL', KEYS[1], '\t')
-- All that a worker's steps send: one that may do half of it would stop half-way.
local refused = first_refused(KEYS[4], {
  'DEL', 'APPEND', 'EXISTS', 'EXPIRE', 'GET', 'HEXISTS', 'HGET', 'HGETALL', 'HINCRBY', 'HKEYS', 'HLEN', 'HMGET', 'HSET', 'LINDEX', 'LLEN',
  'LPOP', 'LPUSH', 'LRANGE', 'LTRIM', 'MGET', 'PERSIST', 'PEXPIRE', 'PEXPIREAT', 'PTTL', 'RPUSH', 'SADD', 'SCARD', 'SET', 'SREM', 'TYPE', 'ZADD', 'ZCARD',
  'ZCOUNT', 'ZPOPMIN', 'XADD', 'XREVRANGE', 'ZRANGE', 'ZREM', 'ZSCORE',
})
if not refused and type(redis.pcall('PUBLISH', ARGV[5], '')) ~= 'number' then refused = 'PUBLISH' end
if refused then return {-3, refused} end
if redis.call('HEXISTS', KEYS[1], '\tturn') == 0 then
  redis.call('HSET', KEYS[1], '\tturn', 0, '\tabout', ARGV[3], '\tlease', ARGV[2])
end
redis.call('ZADD', KEYS[2], now + tonumber(ARGV[2]), ARGV[1])
if schema ~= '2' then redis.call('HSET', KEYS[3], 'schema', '2') end
if ARGV[6] ~= '' then
  note_tasks(KEYS[3], ARGV[6], ARGV[7])
  note_seen(KEYS[3], ARGV[3], now)
end
if conf[3] then renew_expiry(string.sub(KEYS[3], 1, -5), now) end
return {now, schema and 0 or 1}
