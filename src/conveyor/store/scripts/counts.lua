-- Count what a queue holds.
-- needs: numbers leased
--
-- KEYS  1 jobs  2 due  3 dead  4 workers  5 conf  6-15 ready:0 … ready:9  16 outbox
--       then, for a plain list, the list and its intake
-- ARGV  none
-- returns {ready, scheduled, leased, dead, workers, paused, now_ms, oldest ready id or "", its envelope's marks, max_length or "",
--         entries of the plain list and its intake, entries of the outbox, records more than there are places, waiting,
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
local conf = redis.call('HMGET', KEYS[5], 'stubs', 'paused', 'max_length', 'waiting', 'waiting_stubs', 'alarms', 'bound', 'line', 'dropped')
local scheduled, dead = redis.call('ZCARD', KEYS[2]) - tonumber(conf[6] or 0), redis.call('ZCARD', KEYS[3])
local grouped, waiting = tonumber(conf[4] or 0), tonumber(conf[4] or 0) - tonumber(conf[5] or 0)
if conf[4] then ready = ready - redis.call('SCARD', prefix .. 'tickets') end
if string.byte(oldest) == 9 then
  local first = ''
  for priority = 9, 0, -1 do
    if first == '' then first = redis.call('LINDEX', prefix .. 'group:' .. priority .. ':' .. string.sub(oldest, 2), 0) or '' end
  end
  oldest = first
end
-- Not known where there are more workers than were asked.
local reruns = redis.call('HLEN', prefix .. 'reruns')
local unplaced = #workers < 1000 and redis.call('HLEN', KEYS[1]) - ready - grouped - scheduled - leased - dead - reruns or 0
local line = oldest ~= '' and string.match(redis.call('HGET', KEYS[1], oldest) or '', '^[^\n]*') or ''
ready = ready - tonumber(conf[1] or 0) + tonumber(conf[5] or 0)
-- Cancelled jobs of a paused task count as if they stood in ready.
if ready < 0 then ready, waiting = 0, math.max(0, waiting + ready) end
return {ready, scheduled, leased, dead, #workers,
  conf[2] == '1' and 1 or 0, clock(), oldest, line, conf[3] or string.match(conf[7] or '', '^%d+') or '',
  foreign, redis.call('LLEN', KEYS[16]), unplaced, waiting + reruns, conf[8] and redis.call('ZCARD', prefix .. 'room') or 0,
  tonumber(conf[9] or 0)}
