-- Read events of a queue, or register a process that waits for more.
-- needs: numbers
--
-- KEYS  1 events  2 event-readers  3 conf
-- ARGV  1 channel of the waiting process, "" to ask only  2 the events after this one, "" for all, "$" for those to come
--       3 how many at most
-- returns {"off"} the queue keeps none, and has none  ·  {"more" | "open", 1 when events behind that one are gone, else 0,
--         entries (id, fields)…, id of the last one}   more: read on at once
local after, limit, now = ARGV[2], tonumber(ARGV[3]), clock()
if redis.call('HEXISTS', KEYS[3], 'events') == 0 and redis.call('EXISTS', KEYS[1]) == 0 then return {'off'} end
local last = after == '$' and redis.call('XREVRANGE', KEYS[1], '+', '-', 'COUNT', 1)[1]
local entries = after == '$' and {} or redis.call('XRANGE', KEYS[1], after == '' and '-' or after, '+', 'COUNT', limit + 1)
if ARGV[1] ~= '' then
  local late = redis.call('ZRANGE', KEYS[2], '-inf', now, 'BYSCORE', 'LIMIT', 0, 1000)
  redis.call('ZREM', KEYS[2], '', unpack(late)) -- a removal first, so that a full Redis takes the registration too
  redis.call('ZADD', KEYS[2], now + 20000, ARGV[1])
  redis.pcall('PEXPIRE', KEYS[2], 60000)
end
if after == '$' then return {'open', 0, {}, last and last[1] or ''} end
local gone = 0
if after ~= '' and entries[1] then
  if entries[1][1] == after then table.remove(entries, 1) else gone = 1 end
end
return {#entries >= limit and 'more' or 'open', gone, entries, entries[1] and entries[#entries][1] or after}
