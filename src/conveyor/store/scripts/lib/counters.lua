-- Counters of a minute, and the list of jobs that finished last. The turn is done by then, and does not fail for them.

-- Read the counters of this minute that a step will add to. Nothing is written here.
-- prefix, minute, at, count  as for add_counters
-- returns  {fields, {\tover and what they hold}}…, each of at most 2,000 fields
local function read_counters(prefix, minute, at, count)
  local read = {}
  for first = at, at + 2 * count - 1, 4000 do
    local fields = {}
    for i = first, math.min(first + 3998, at + 2 * count - 2), 2 do fields[#fields + 1] = ARGV[i] end
    read[#read + 1] = {fields, redis.call('HMGET', prefix .. 'stats:' .. int(minute), '\tover', unpack(fields))}
  end
  return read
end

-- Add to sums: HINCRBY would be a command for each.
-- key       a hash
-- counters  field, number…
-- returns   nothing
local function add_sums(key, counters)
  for first = 1, #counters, 4000 do
    local fields, values = {}, {}
    for i = first, math.min(first + 3998, #counters - 1), 2 do fields[#fields + 1] = counters[i] end
    local sums = redis.pcall('HMGET', key, unpack(fields))
    if sums.err then return end
    for i, field in ipairs(fields) do
      values[2 * i - 1], values[2 * i] = field, int((tonumber(sums[i] or 0) or 0) + (tonumber(counters[first + 2 * i - 1]) or 0))
    end
    redis.pcall('HSET', key, unpack(values))
  end
end

-- Add counters of a minute that is over to those of its hour, and to the sums of all time, which metrics need, since those may never fall.
-- prefix, minute  as for add_counters
-- counters        field, number…
-- returns         nothing
local function add_up(prefix, minute, counters)
  local hour, total = prefix .. 'stats:h' .. int(math.floor(minute / 60)), prefix .. 'stats:total'
  for _, key in ipairs({hour, total}) do
    add_sums(key, counters)
    redis.pcall('EXPIRE', key, 2678400)
  end
end

-- Add to the counters of this minute. The first of a minute adds up the minute before, in which something ended, and marks it
-- with the field \tover: so nobody has to come by when an hour is over. When the clock is set back into such a minute, what ends then is
-- added up at once. Minutes are kept for 25 hours, hours for 31 days, and the last minute as long as an hour, for it is not a part of one yet.
-- prefix   of the queue's keys
-- minute   since the epoch
-- at       where in ARGV the pairs (field, increment) stand
-- count    number of pairs, no field twice
-- read     what they were, as read_counters returns them
-- returns  nothing
local function add_counters(prefix, minute, at, count, read)
  local stats, fresh, first = prefix .. 'stats:' .. int(minute), 0, at
  for _, part in ipairs(read) do
    local values = {}
    for i, field in ipairs(part[1]) do
      values[2 * i - 1], values[2 * i] = field, int((tonumber(part[2][i + 1] or 0) or 0) + (tonumber(ARGV[at + 1]) or 0))
      at = at + 2
    end
    fresh = fresh + (tonumber(redis.pcall('HSET', stats, unpack(values))) or 0)
  end
  if read[1][2][1] then
    local counters = {}
    for i = first, at - 1 do counters[#counters + 1] = ARGV[i] end
    add_up(prefix, minute, counters)
  elseif fresh == count and redis.pcall('HLEN', stats) == count then -- it is the first of this minute
    local last = tonumber(redis.pcall('GET', prefix .. 'stats:last'))
    local before = last and last ~= minute and prefix .. 'stats:' .. int(last)
    local counters = before and redis.pcall('HGETALL', before) or {}
    if counters[1] then
      add_up(prefix, last, counters)
      redis.pcall('HSET', before, '\tover', '1')
      redis.pcall('EXPIRE', before, math.max(1, 90000 - 60 * math.abs(minute - last)))
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
