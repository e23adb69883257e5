-- Fix the head of an outbox as a batch, or return the one that is fixed: it stays the same until it is trimmed.
-- needs: numbers
--
-- KEYS  1 outbox  2 conf
-- ARGV  1 number of a batch that needs a higher one ("": none)  2 the least number that this one may have
-- returns {} when the outbox is empty · {number, entry…}
--         numbers rise, also over a failover that forgets some: they follow the server's clock
local outbox, conf = KEYS[1], KEYS[2]
local least, now = number_in(ARGV[2]), clock()
local entries = redis.call('LRANGE', outbox, 0, 99)
if #entries == 0 then return {} end

local last, fixed = string.match(redis.call('HGET', conf, 'outbox') or '0', '^(%d+) ?(%d*)$')
local number, count = tonumber(last), tonumber(fixed)
if not count then
  local size = 0
  for i, entry in ipairs(entries) do
    size = size + #entry
    if i > 1 and size > 1000000 then break end
    count = i
  end
  number = math.max(number + 1, now)
end
if last == ARGV[1] then number = math.max(number, least) end
if int(number) ~= last or fixed == '' then
  redis.call('HDEL', conf, '\t')
  redis.call('HSET', conf, 'outbox', int(number) .. ' ' .. count)
end
return {number, unpack(entries, 1, count)}
