-- Read one page of jobs in a state: at most 500 entries, and about 1 MiB of them, so that a call takes a few milliseconds
-- whatever the jobs hold. The reply says how many entries were looked at; the next page begins behind them.
-- needs: numbers leased
--
-- KEYS  1 jobs  2 state  3 due  4 dead  5 workers  6 recent  7-16 ready:0 … ready:9
-- ARGV  1 ready, scheduled, leased, dead, dead-oldest or done  2 offset  3 count of entries (at most 500)
--       4 only jobs of this task; "" all, as for done
-- returns {entries looked at, (id, envelope or "", state or "", extra)…}    extra: due or death in ms, the worker, or the entry of a finished job
local prefix = string.sub(KEYS[1], 1, -5)
local offset, count = tonumber(ARGV[2]), math.min(tonumber(ARGV[3]), 500)
local rows, extras, stop = {}, {}, offset + count - 1

local function ready()
  local skip, room = offset, count
  for i = 16, 7, -1 do
    local length = redis.call('LLEN', KEYS[i])
    if room > 0 and skip < length then
      for _, id in ipairs(redis.call('LRANGE', KEYS[i], skip, skip + room - 1)) do rows[#rows + 1] = id end
      room = count - #rows
      skip = 0
    else
      skip = skip - length
    end
  end
end

local function sorted(key, reading)
  local pairs_ = redis.call(reading, key, offset, stop, 'WITHSCORES')
  for i = 1, #pairs_, 2 do
    rows[#rows + 1] = pairs_[i]
    extras[#rows] = int(tonumber(pairs_[i + 1]))
  end
end

local function leased()
  local seen = 0
  for _, worker in ipairs(redis.call('ZRANGE', KEYS[5], 0, 999)) do
    local key = prefix .. 'leased:' .. worker
    local held = count_held(key)
    -- Those that the page passes over are counted and not read.
    for _, id in ipairs(seen + held > offset and ids_held(key) or {}) do
      if seen >= offset and #rows < count then
        rows[#rows + 1] = id
        extras[#rows] = worker
      end
      seen = seen + 1
      held = held - 1
    end
    seen = seen + held
    if #rows >= count then return end
  end
end

if ARGV[1] == 'ready' then ready()
elseif ARGV[1] == 'scheduled' then sorted(KEYS[3], 'ZRANGE')
elseif ARGV[1] == 'dead' then sorted(KEYS[4], 'ZREVRANGE')
elseif ARGV[1] == 'dead-oldest' then sorted(KEYS[4], 'ZRANGE')
elseif ARGV[1] == 'leased' then leased()
else
  local entries = redis.call('LRANGE', KEYS[6], offset, stop)
  local reply = {#entries}
  for _, entry in ipairs(entries) do
    reply[#reply + 1], reply[#reply + 2], reply[#reply + 3], reply[#reply + 4] = '', '', '', entry
  end
  return reply
end

-- Tell whether a job is of the task that is asked for: it stands behind the first line, before a line break or a tab.
local function is_wanted(envelope)
  local task = ARGV[4]
  if task == '' then return true end
  local first = string.find(envelope, '\n', 1, true) or 0
  if string.sub(envelope, first + 1, first + #task) ~= task then return false end
  local after = string.byte(envelope, first + #task + 1)
  return after == 10 or after == 9
end

local reply, size = {0}, 0
for i, id in ipairs(rows) do
  if size >= 1048576 then break end
  reply[1] = i
  local envelope = redis.call('HGET', KEYS[1], id)
  size = size + (envelope and #envelope or 0)
  if envelope and string.byte(envelope) ~= 120 and is_wanted(envelope) then
    local state = redis.call('HGET', KEYS[2], id) or ''
    size = size + #state
    reply[#reply + 1], reply[#reply + 2], reply[#reply + 3], reply[#reply + 4] = id, envelope, state, extras[i] or ''
  end
end
return reply
