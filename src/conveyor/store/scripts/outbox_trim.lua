-- Remove a batch that all its receivers have accepted.
--
-- KEYS  1 outbox  2 conf
-- ARGV  1 number of the batch
-- returns the number of entries left; -1 when another batch is fixed, or none: nothing was changed
local outbox, conf = KEYS[1], KEYS[2]
local last, count = string.match(redis.call('HGET', conf, 'outbox') or '', '^(%d+) (%d+)$')
if last ~= ARGV[1] then return -1 end
local left = math.max(redis.call('LLEN', outbox) - tonumber(count), 0)
-- Half of this would deliver the batch twice, or drop the next one. A trim of nothing shows that both are allowed.
redis.call('LTRIM', outbox, 0, -1)
redis.call('HSET', conf, 'outbox', last)
redis.call('LTRIM', outbox, tonumber(count), -1)
return left
