-- Count what a queue holds.
-- needs: numbers leased
--
-- KEYS  1 jobs  2 due  3 dead  4 workers  5 conf  6-15 ready:0 … ready:9  16 outbox
--       then, for a plain list, the list and its intake
-- ARGV  none
-- returns {ready, scheduled, leased, dead, workers, paused, now_ms, oldest ready id or "", its envelope's marks, max_length or "",
--         entries of the plain list and its intake, entries of the outbox, records more than there are places,
--         producers that wait for room, jobs that full="drop-oldest" has dropped}
local prefix = string.sub(KEYS[1], 1, -5)
local ready, oldest = 0, ''
for i = 6, 15 do
  ready = ready + redis.call('LLEN', KEYS[i])
end
for i = 15, 6, -1 do
  if oldest == '' then oldest = redis.call('LINDEX', KEYS[i], 0) or '' end
end
local foreign = 0
for i = 17, #KEYS do foreign = foreign + redis.call('LLEN', KEYS[i]) end
local leased, workers = 0, redis.call('ZRANGE', KEYS[4], 0, 999)
for _, worker in ipairs(workers) do leased = leased + count_held(prefix .. 'leased:' .. worker) end
local scheduled, dead = redis.call('ZCARD', KEYS[2]), redis.call('ZCARD', KEYS[3])
-- Not known where there are more workers than were asked.
local unplaced = #workers < 1000 and redis.call('HLEN', KEYS[1]) - ready - scheduled - leased - dead or 0
local conf = redis.call('HMGET', KEYS[5], 'stubs', 'paused', 'max_length', 'bound', 'line', 'dropped')
local line = oldest ~= '' and string.match(redis.call('HGET', KEYS[1], oldest) or '', '^[^\n]*') or ''
return {ready - tonumber(conf[1] or 0), scheduled, leased, dead, #workers,
  conf[2] == '1' and 1 or 0, clock(), oldest, line, conf[3] or string.match(conf[4] or '', '^%d+') or '',
  foreign, redis.call('LLEN', KEYS[16]), unplaced, conf[5] and redis.call('ZCARD', prefix .. 'room') or 0,
  tonumber(conf[6] or 0)}
