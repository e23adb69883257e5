-- Limits: how many jobs run at a time (concurrency), and how many start in a time (rate). A limit is called <name> or
-- <name>:<key>. The limit of a key itself, which a group of one job at a time holds and which a pause shuts, is :<key>. A task that
-- is paused or held is a limit ;<task>.
-- In conf a limit reads "c <n>" or "r <n> <ms> <smooth>"; an operator's override wins over the declaration of the code.

-- Read many fields of a hash.
-- key      the hash
-- fields   their names
-- returns  their values, false where there is none
local function read_fields(key, fields)
  if #fields == 0 then return {} end
  if #fields <= 7000 then return redis.call('HMGET', key, unpack(fields)) end
  local values = {}
  for first = 1, #fields, 7000 do
    for _, value in ipairs(redis.call('HMGET', key, unpack(fields, first, math.min(first + 6999, #fields)))) do
      values[#values + 1] = value
    end
  end
  return values
end

-- Have a hash kept as a table where many fields are written to it. A hash of few short values is a list that each command searches, and
-- one value above 64 bytes makes it a table.
-- pairs    fields and values; where they are many the first value is filled up
-- filler   a character that its readers pass over
-- returns  nothing
local function widen(pairs, filler)
  if #pairs > 32 then pairs[2] = pairs[2] .. string.rep(filler, 65) end
end

-- Read the whole of a hash that has few fields: where many names are asked for, that costs less than two or three fields for each.
-- key      the hash
-- count    how many names are asked for
-- returns  field → value; nil when it has more fields than that, or few names are asked for
local function read_small(key, count)
  if count <= 20 or redis.call('HLEN', key) > count then return nil end
  local all, found = redis.call('HGETALL', key), {}
  for i = 1, #all, 2 do found[all[i]] = all[i + 1] end
  return found
end

-- Read the fields of conf that define limits.
-- queue    field conf is used
-- names    of the limits
-- returns  field → text; true when the limit of a key may be paused, or have a weight
local function read_definitions(queue, names)
  local texts, fields = read_small(queue.conf, #names), {}
  if texts then
    for field in pairs(texts) do
      if string.find(field, '^paused:') or string.find(field, '^weight:') then return texts, true end
    end
    return texts, false
  end
  texts = {}
  for _, name in ipairs(names) do
    local at, colon = #fields, string.find(name, ':', 1, true)
    if string.byte(name) == 59 then
      fields[at + 1] = 'paused_tasks'
    elseif colon == 1 then
      local key = string.sub(name, 2)
      fields[at + 1], fields[at + 2] = 'paused:' .. key, 'weight:' .. key
    else
      local base = colon and string.sub(name, 1, colon - 1) or name
      fields[at + 1], fields[at + 2] = 'limit:' .. base, 'override:' .. base
      if colon then fields[at + 3] = 'override:' .. name end
    end
  end
  for i, text in ipairs(read_fields(queue.conf, fields)) do texts[fields[i]] = text end
  return texts, true
end

-- Read how many slots of limits are taken, and until when limits are held.
-- queue    field prefix is used
-- names    of the limits
-- returns  name → slots, tab and name → ms; true when one may be held
local function read_taken(queue, names)
  local key, fields = queue.prefix .. 'limits', {}
  local found = read_small(key, #names)
  if found then
    for field in pairs(found) do
      if string.byte(field) == 9 then return found, true end
    end
    return found, false
  end
  found = {}
  for i, name in ipairs(names) do fields[2 * i - 1], fields[2 * i] = name, '\t' .. name end
  for i, value in ipairs(read_fields(key, fields)) do found[fields[i]] = value end
  return found, true
end

-- Read limits, those that were not read before in this step. Limits of keys of which nothing is known share one state.
-- queue    fields prefix and conf are used; limits: name → state, is filled; unused: the state that limits of keys share
-- names    of the limits
-- returns  nothing
local function load_limits(queue, names)
  local states, wanted, size, byte = queue.limits, {}, 0, string.byte
  for _, name in ipairs(names) do
    if not states[name] then
      size = size + 1
      wanted[size], states[name] = name, queue.unused
    end
  end
  if size == 0 then return end
  local texts, keyed = read_definitions(queue, wanted)
  local taken, holds = read_taken(queue, wanted)
  for _, name in ipairs(wanted) do
    local count, held, first = taken[name], holds and taken['\t' .. name] or nil, byte(name)
    local key = keyed and string.sub(name, 2)
    if count or held or first ~= 58 or (keyed and (texts['paused:' .. key] or texts['weight:' .. key])) then
      local s = {name = name, kind = nil, count = tonumber(count or 0), held = tonumber(held or 0), paused = false, weight = 1, n = nil, free = nil}
      states[name] = s
      if first == 58 then
        s.kind = 'k'
        if keyed then
          s.paused = texts['paused:' .. key] == '1'
          s.weight = math.min(math.max(tonumber(texts['weight:' .. key] or 1) or 1, 1), 1000)
        end
      elseif first == 59 then
        local paused = '\n' .. (texts.paused_tasks or '') .. '\n'
        s.kind, s.paused, s.weight = 'p', string.find(paused, '\n' .. string.sub(name, 2) .. '\n', 1, true) ~= nil, 1000
      else
        local base = string.match(name, '^[^:]*')
        local text = texts['override:' .. name] or texts['override:' .. base] or texts['limit:' .. base] or ''
        local n, per, smooth = string.match(text, '^r (%d+) (%d+) ?([01]?)')
        if n then
          s.kind, s.n, s.per, s.smooth = 'r', math.max(tonumber(n), 1), math.max(tonumber(per), 1), smooth == '1'
        else
          n = string.match(text, '^c (%d+)')
          if n then s.kind, s.n = 'c', tonumber(n) end
        end
      end
    end
  end
end

-- Read the state of a limit that will change: from then on it is not shared.
-- queue    as for load_limits, which has read it
-- name     of the limit
-- returns  its state
local function own_state(queue, name)
  local s = queue.limits[name]
  if not s.name then
    s = {name = name, kind = 'k', count = s.count, held = 0, paused = false, weight = 1}
    queue.limits[name] = s
  end
  return s
end

-- Read what a rate remembers: a list of starts, the newest first; or a hash, the costs of sub-windows of 1/128 of its time,
-- and the time; or of a smooth one the instant of its last start.
-- queue    field prefix is used
-- s        state of the limit: free (how much may start now), kept and what is kept are set
-- now      ms
-- returns  nothing
local function read_rate(queue, s, now)
  local key = queue.prefix .. 'rate:' .. s.name
  local kept = redis.call('TYPE', key).ok
  if kept ~= 'list' and kept ~= 'hash' and kept ~= 'string' then s.other, kept = kept ~= 'none', 'none' end -- of another type: forgotten
  s.kept, s.starts, s.windows, s.next_at = kept, nil, nil, nil
  if kept == 'hash' then
    local all, sum, windows = redis.call('HGETALL', key), 0, {}
    local per = s.per
    for i = 1, #all, 2 do if all[i] == 'per' then per = tonumber(all[i + 1]) end end
    local last = math.floor(now * 128 / s.per)
    for i = 1, #all, 2 do
      local window = tonumber(all[i])
      if window then
        -- Of another length: the end of the old sub-window lies in the new one.
        if per ~= s.per then window = math.min(last, math.floor((window + 1) * per / s.per)) end
        if window >= last - 128 then
          windows[window] = (windows[window] or 0) + tonumber(all[i + 1])
          sum = sum + tonumber(all[i + 1])
        end
      end
    end
    s.windows, s.free = windows, s.n - sum
    if s.smooth then s.free = sum > 0 and 0 or 1 end
  elseif s.smooth then
    -- Starts that were not spaced have to leave the window.
    local last = kept == 'string' and redis.call('GET', key) or kept == 'list' and redis.call('LINDEX', key, 0)
    s.next_at = (tonumber(last or 0) or 0) + (kept == 'list' and s.per or s.per / s.n)
    s.free = s.next_at <= now and 1 or 0
  else
    local most = kept == 'none' and s.n or math.min(s.n, 1000)
    local starts = kept == 'none' and {} or kept == 'string' and {tonumber(redis.call('GET', key)) or 0}
      or redis.call('LRANGE', key, int(s.n - most), int(s.n - 1))
    local free = most
    for i = 1, #starts do
      if tonumber(starts[i]) > now - s.per then free = free - 1 else break end
    end
    s.starts, s.most, s.free = starts, most, free
  end
end

-- Tell how much may pass a limit now: jobs, or the cost of a rate.
-- queue    as for load_limits
-- s        its state
-- now      ms
-- closed   of the limit of a key: true when the job is of a group that runs one at a time
-- returns  a number; what this step has planned already is taken off
local function room_of(queue, s, now, closed)
  if s.held > now then return 0 end
  if s.kind == 'r' then
    if not s.free then read_rate(queue, s, now) end
    return s.free
  elseif s.kind == 'c' then return s.n - s.count
  elseif s.kind == 'k' then
    if s.paused then return 0 end
    return closed and 1 - s.count or 1000000
  end
  return s.kind == 'p' and s.paused and 0 or 1000000
end

-- Tell when a limit that time alone opens has room.
-- queue    as for load_limits
-- s        its state
-- cost     that must find room
-- now      ms
-- returns  ms since the epoch; nil when time does not open it
local function opens_at(queue, s, cost, now)
  if s.held > now then return s.held end
  if s.kind ~= 'r' then return nil end
  read_rate(queue, s, now)
  cost = math.min(cost, s.n)
  if s.free >= cost then return now end
  if s.next_at then return math.ceil(s.next_at) end
  if s.kept == 'hash' then
    local order, left = {}, s.free
    for window in pairs(s.windows) do order[#order + 1] = window end
    table.sort(order)
    if s.smooth then order = {order[#order]} end
    for _, window in ipairs(order) do
      left = left + s.windows[window]
      if left >= cost then return math.ceil((window + 129) * s.per / 128) end
    end
    return now + s.per
  end
  local start = s.starts[math.max(s.most - cost + 1, 1)]
  return tonumber(start or now) + s.per
end

-- Record what a rate has let pass in this step.
-- queue    field prefix is used
-- s        its state, as room_of has read it
-- passed   {number of jobs, sum of their costs}
-- now      ms
-- returns  nothing
local function write_rate(queue, s, passed, now)
  local key, count, cost = queue.prefix .. 'rate:' .. s.name, passed[1], passed[2]
  if s.other then redis.call('DEL', key) end
  if s.smooth then
    local interval = s.per / s.n
    -- The instants keep to their grid when a start is late by less than the clock shows.
    local from = s.next_at and now - s.next_at < 1 and s.next_at or now
    if s.kept ~= 'string' and s.kept ~= 'none' then redis.call('DEL', key) end
    redis.call('SET', key, string.format('%.17g', from + interval * (cost - 1)), 'PX', int(math.ceil(interval * cost) + 1))
    return
  end
  if s.kept == 'string' then redis.call('DEL', key) end
  local windows = s.windows
  if not windows and s.n <= 4096 and cost == count then
    local starts = {}
    for i = 1, count do starts[i] = int(now) end
    if redis.call('LPUSH', key, unpack(starts)) > s.n then redis.call('LTRIM', key, 0, int(s.n - 1)) end
    redis.call('PEXPIRE', key, int(s.per))
    return
  end
  local last, fields = math.floor(now * 128 / s.per), {'per', int(s.per)}
  if not windows then
    windows = {}
    for _, start in ipairs(s.kept == 'list' and redis.call('LRANGE', key, 0, 4095) or {}) do
      local window = math.floor(tonumber(start) * 128 / s.per)
      windows[window] = (windows[window] or 0) + 1
    end
  end
  windows[last] = (windows[last] or 0) + cost
  for window, sum in pairs(windows) do
    if window >= last - 128 and sum > 0 then fields[#fields + 1], fields[#fields + 2] = int(window), int(sum) end
  end
  redis.call('DEL', key)
  redis.call('HSET', key, unpack(fields))
  redis.call('PEXPIRE', key, int(math.ceil(s.per * 130 / 128)))
  s.windows, s.kept = windows, 'hash'
end

-- Charge a rate with what a job has cost beside what it had paid when it started.
-- queue    as for load_limits
-- s        its state; a smooth one has no costs
-- cost     the difference; below zero it is given back, from the start of the job on. What has left the window since gives nothing
--          back: other jobs have paid what the window holds by now
-- now      ms
-- since    when the job started; nil: it is not known, and within the window
-- returns  nothing
local function charge_rate(queue, s, cost, now, since)
  if s.kind ~= 'r' or s.smooth or cost == 0 then return end
  read_rate(queue, s, now)
  -- As sub-windows, if it was a list.
  write_rate(queue, s, {cost < 0 and 1 or 0, math.max(cost, 0)}, now)
  local last = math.floor(now * 128 / s.per)
  local first = since and math.floor(since * 128 / s.per) or last - 128
  if cost < 0 and first >= last - 128 then
    for window = first, last do
      local sum = s.windows[window] or 0
      local less = math.min(sum, -cost)
      s.windows[window], cost = sum - less, cost + less
    end
    write_rate(queue, s, {1, 0}, now)
  end
  s.free = nil
end
