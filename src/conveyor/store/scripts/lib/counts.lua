-- Counts of a queue by state.

-- Count what a queue holds.
-- prefix   of its keys
-- lists    of a plain list: it and its intake, else empty
-- now      ms
-- returns  what counts.lua says
local function count_queue(prefix, lists, now)
  local ready, oldest = 0, ''
  for priority = 0, 9 do ready = ready + redis.call('LLEN', prefix .. 'ready:' .. priority) end
  for priority = 9, 0, -1 do
    if oldest == '' then oldest = redis.call('LINDEX', prefix .. 'ready:' .. priority, 0) or '' end
  end
  local foreign = 0
  for _, list in ipairs(lists) do foreign = foreign + redis.call('LLEN', list) end
  local leased, workers = 0, redis.call('ZRANGE', prefix .. 'workers', 0, 999)
  for _, worker in ipairs(workers) do leased = leased + count_held(prefix .. 'leased:' .. worker) end
  local conf = redis.call('HMGET', prefix .. 'conf', 'stubs', 'paused', 'max_length', 'waiting', 'waiting_stubs', 'alarms', 'bound', 'line', 'dropped')
  local scheduled = math.max(0, redis.call('ZCARD', prefix .. 'due') - tonumber(conf[6] or 0)) -- alarms may have been evicted
  local dead = redis.call('ZCARD', prefix .. 'dead')
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
  local unplaced = #workers < 1000 and redis.call('HLEN', prefix .. 'jobs') - ready - grouped - scheduled - leased - dead - reruns or 0
  local line = oldest ~= '' and string.match(redis.call('HGET', prefix .. 'jobs', oldest) or '', '^[^\n]*') or ''
  ready = ready - tonumber(conf[1] or 0) + tonumber(conf[5] or 0)
  -- Cancelled jobs of a paused task count as if they stood in ready.
  if ready < 0 then ready, waiting = 0, math.max(0, waiting + ready) end
  return {ready, scheduled, leased, dead, #workers,
    conf[2] == '1' and 1 or 0, now, oldest, line, conf[3] or string.match(conf[7] or '', '^%d+') or '',
    foreign, redis.call('LLEN', prefix .. 'outbox'), unplaced, waiting + reruns, conf[8] and redis.call('ZCARD', prefix .. 'room') or 0,
    tonumber(conf[9] or 0)}
end
