-- Read one page of jobs in a state.
-- needs: numbers leased
--
-- KEYS  1 jobs  2 state  3 due  4 dead  5 workers  6 recent  7-16 ready:0 … ready:9
-- ARGV  1 ready, scheduled, leased, dead or done  2 offset  3 count (at most 500)
-- returns (id, envelope or "", state or "", extra)…    extra: due or death in ms, the worker, or the entry of a finished job
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
    for _, id in ipairs(ids_held(prefix .. 'leased:' .. worker)) do
      if seen >= offset and #rows < count then
        rows[#rows + 1] = id
        extras[#rows] = worker
      end
      seen = seen + 1
    end
    if #rows >= count then return end
  end
end

if ARGV[1] == 'ready' then ready()
elseif ARGV[1] == 'scheduled' then sorted(KEYS[3], 'ZRANGE')
elseif ARGV[1] == 'dead' then sorted(KEYS[4], 'ZREVRANGE')
elseif ARGV[1] == 'dead-oldest' then sorted(KEYS[4], 'ZRANGE')
elseif ARGV[1] == 'leased' then leased()
else
  local reply = {}
  for _, entry in ipairs(redis.call('LRANGE', KEYS[6], offset, stop)) do
    reply[#reply + 1], reply[#reply + 2], reply[#reply + 3], reply[#reply + 4] = '', '', '', entry
  end
  return reply
end
if #rows == 0 then return {} end
local envelopes, states = redis.call('HMGET', KEYS[1], unpack(rows)), redis.call('HMGET', KEYS[2], unpack(rows))
local reply = {}
for i, id in ipairs(rows) do
  if envelopes[i] and string.byte(envelopes[i]) ~= 120 then
    reply[#reply + 1], reply[#reply + 2] = id, envelopes[i]
    reply[#reply + 1], reply[#reply + 2] = states[i] or '', extras[i] or ''
  end
end
return reply
