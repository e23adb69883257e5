-- Counters of a minute, and the list of jobs that finished last. The turn is done by then, and does not fail for them.

-- Read the counters of this minute that a step will add to. Nothing is written here.
-- prefix, minute, at, count  as for add_counters
-- returns  fields and what they hold, in lists of at most 2,000
local function read_counters(prefix, minute, at, count)
  local read = {}
  for first = at, at + 2 * count - 1, 4000 do
    local fields = {}
    for i = first, math.min(first + 3998, at + 2 * count - 2), 2 do fields[#fields + 1] = ARGV[i] end
    read[#read + 1] = {fields, redis.call('HMGET', prefix .. 'stats:' .. int(minute), unpack(fields))}
  end
  return read
end

-- Add to the counters of this minute. The first of a minute adds the counters of the minute before, in which something ended,
-- to those of its hour: so nobody has to come by when an hour is over. They are
-- added to the sums of all time too, which metrics need, since those may never fall. Minutes are kept for 25 hours, hours for 31 days, and the
-- last minute as long as an hour, for it is not a part of one yet.
-- prefix   of the queue's keys
-- minute   since the epoch
-- at       where in ARGV the pairs (field, increment) stand
-- count    number of pairs, no field twice
-- read     what they were, as read_counters returns them: HINCRBY would be a command for each
-- returns  nothing
local function add_counters(prefix, minute, at, count, read)
  local stats, fresh = prefix .. 'stats:' .. int(minute), 0
  for _, part in ipairs(read) do
    local values = {}
    for i, field in ipairs(part[1]) do
      values[2 * i - 1], values[2 * i] = field, int((tonumber(part[2][i] or 0) or 0) + (tonumber(ARGV[at + 1]) or 0))
      at = at + 2
    end
    fresh = fresh + (tonumber(redis.pcall('HSET', stats, unpack(values))) or 0)
  end
  if fresh == count and redis.pcall('HLEN', stats) == count then -- it is the first of this minute
    local last = tonumber(redis.pcall('GET', prefix .. 'stats:last'))
    if last and last ~= minute then
      local before, hour = prefix .. 'stats:' .. int(last), prefix .. 'stats:h' .. int(math.floor(last / 60))
      local size = redis.pcall('HLEN', before)
      local counters = type(size) == 'number' and size <= 5000 and redis.pcall('HGETALL', before) or {}
      local total = prefix .. 'stats:total'
      for i = 1, #counters, 2 do
        redis.pcall('HINCRBY', hour, counters[i], counters[i + 1])
        redis.pcall('HINCRBY', total, counters[i], counters[i + 1])
      end
      redis.pcall('EXPIRE', total, 2678400)
      redis.pcall('EXPIRE', before, math.max(1, 90000 - 60 * math.abs(minute - last)))
      redis.pcall('EXPIRE', hour, 2678400)
    end
    redis.pcall('SET', prefix .. 'stats:last', int(minute), 'EX', 2678400)
    redis.pcall('EXPIRE', stats, 2678400)
  end
end

-- Add to the list of recently finished jobs, which keeps 1,000.
-- recent   key recent
-- at       where in ARGV the entries stand
-- count    number of entries
-- returns  nothing
local function add_recent(recent, at, count)
  local last = at + count - 1
  local length = redis.pcall('LPUSH', recent, unpack(ARGV, math.max(at, last - 999), last))
  if type(length) == 'number' and length > 1000 then redis.pcall('LTRIM', recent, 0, 999) end
end
