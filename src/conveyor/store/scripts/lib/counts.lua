-- Counts of a queue by state.

-- Count what a queue holds.
-- prefix   of its keys
-- jobs     the first of them; each name that is put together once more costs as much as half a command
-- lists    of a plain list: it and its intake, else empty
-- now      ms
-- note     is called with each worker, the end of its lease, its hash and what it holds; nil: they are only counted
-- returns  what counts.lua says, as that many values, without now_ms
local function count_queue(prefix, jobs, lists, now, note)
  -- Of many queues most have jobs of priority 0 alone, and no workers: three looks spare them twenty-two. Where that list has as
  -- many entries as there are jobs, and none of a cancelled job or a group, no job is of another priority, and no worker holds one.
  local name, first_list, oldest = prefix .. 'ready:', prefix .. 'ready:0', ''
  local conf = redis.call('HMGET', prefix .. 'conf', 'stubs', 'paused', 'max_length', 'waiting', 'waiting_stubs', 'alarms', 'bound', 'line', 'dropped')
  local ready, records = redis.call('LLEN', first_list), redis.call('HLEN', jobs)
  local plain = records == ready and records > 0 and not conf[1] and not conf[4]
  local urgent = (records > ready or conf[1] or conf[4]) and
    redis.call('EXISTS', name .. '1', name .. '2', name .. '3', name .. '4', name .. '5', name .. '6', name .. '7', name .. '8', name .. '9') > 0
  local due_key, dead_key, workers_key, outbox, reruns_key = prefix .. 'due', prefix .. 'dead', prefix .. 'workers', prefix .. 'outbox', prefix .. 'reruns'
  local found = redis.call('EXISTS', due_key, dead_key, workers_key, outbox, reruns_key)
  for priority = 9, urgent and 1 or 10, -1 do
    local length = redis.call('LLEN', name .. priority)
    if length > 0 and oldest == '' then oldest = redis.call('LINDEX', name .. priority, 0) or '' end
    ready = ready + length
  end
  if ready > 0 and oldest == '' then oldest = redis.call('LINDEX', first_list, 0) or '' end
  local foreign = 0
  for _, list in ipairs(lists) do foreign = foreign + redis.call('LLEN', list) end
  local leased, workers, silent = 0, found > 0 and redis.call('ZRANGE', workers_key, 0, 999, 'WITHSCORES') or {}, 0
  for i = 1, #workers, 2 do
    local key = (note or not plain) and prefix .. 'leased:' .. workers[i]
    local held = plain and 0 or count_held(key)
    leased = leased + held
    if note then note(workers[i], workers[i + 1], key, held) end
    if tonumber(workers[i + 1]) <= now then silent = silent + 1 end
  end
  local registered = #workers / 2
  local busy = found > (registered > 0 and 1 or 0) -- there is more than workers
  local scheduled = busy and math.max(0, redis.call('ZCARD', due_key) - tonumber(conf[6] or 0)) or 0 -- alarms may have been evicted
  local dead = busy and redis.call('ZCARD', dead_key) or 0
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
  local reruns = busy and redis.call('HLEN', reruns_key) or 0
  local unplaced = registered < 1000 and records - ready - grouped - scheduled - leased - dead - reruns or 0
  local line = oldest ~= '' and string.match(redis.call('HGET', jobs, oldest) or '', '^[^\n]*') or ''
  ready = ready - tonumber(conf[1] or 0) + tonumber(conf[5] or 0)
  -- Cancelled jobs of a paused task count as if they stood in ready.
  if ready < 0 then ready, waiting = 0, math.max(0, waiting + ready) end
  return ready, scheduled, leased, dead, registered - silent, conf[2] == '1' and 1 or 0,
    tonumber(conf[3] or string.match(conf[7] or '', '^%d+') or -1), foreign, busy and redis.call('LLEN', outbox) or 0,
    math.max(0, unplaced), waiting + reruns, conf[8] and redis.call('ZCARD', prefix .. 'room') or 0, tonumber(conf[9] or 0), silent, oldest, line
end
