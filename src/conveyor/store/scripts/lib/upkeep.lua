-- Upkeep: what a worker does for the whole queue, a few times a lease. The turn is done by then, and does not fail for it.

-- Find the workers that seem to be dead: those whose lease ends within half a lease, and those whose end lies further ahead
-- than their own lease allows, because the clock was set back.
-- queue     field prefix is used
-- workers   key workers
-- now       ms
-- lease_ms  lease of the worker that asks
-- returns   (worker, end)…
local function find_overdue(queue, workers, now, lease_ms)
  local overdue = redis.call('ZRANGE', workers, '-inf', now + lease_ms / 2, 'BYSCORE', 'LIMIT', 0, 100, 'WITHSCORES')
  local ahead = redis.call('ZRANGE', workers, now + 1.5 * lease_ms, '+inf', 'BYSCORE', 'LIMIT', 0, 100, 'WITHSCORES')
  for i = 1, #ahead, 2 do
    local own = tonumber(redis.call('HGET', queue.prefix .. 'leased:' .. ahead[i], '\tlease') or 0)
    if tonumber(ahead[i + 1]) > now + 1.5 * own then
      overdue[#overdue + 1], overdue[#overdue + 2] = ahead[i], ahead[i + 1]
    end
  end
  return overdue
end

-- Remove dead letters that are older than 90 days, or the oldest of more than 100,000; at most 100 a turn.
-- queue    fields jobs, state, dead and untagged are used
-- now      ms
-- returns  nothing
local function trim_dead(queue, now)
  local old = redis.call('ZRANGE', queue.dead, '-inf', now - 7776000000, 'BYSCORE', 'LIMIT', 0, 100)
  if #old == 0 and redis.call('ZCARD', queue.dead) > 100000 then old = redis.call('ZRANGE', queue.dead, 0, 99) end
  if #old > 0 and type(redis.pcall('ZREM', queue.dead, unpack(old))) == 'number' then
    for i, envelope in ipairs(redis.call('HMGET', queue.jobs, unpack(old))) do
      local found = envelope and marks(envelope)
      if found then list_tags(queue.untagged, found.tags, old[i]) end
    end
    redis.call('HDEL', queue.jobs, unpack(old))
    redis.call('HDEL', queue.state, unpack(old))
  end
end

-- Add to the counters of this minute. The first of a minute adds the counters of the minute before, in which something ended,
-- to those of its hour: so nobody has to come by when an hour is over. They are
-- added to the sums of all time too, which metrics need, since those may never fall. Minutes are kept for 25 hours, hours for 31 days, and the
-- last minute as long as an hour, for it is not a part of one yet.
-- prefix   of the queue's keys
-- minute   since the epoch
-- at       where in ARGV the pairs (field, increment) stand
-- count    number of pairs
-- begins   whether the minute has no counters yet
-- returns  nothing
local function add_counters(prefix, minute, at, count, begins)
  local stats = prefix .. 'stats:' .. int(minute)
  if begins then
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
  end
  for i = at, at + 2 * count - 1, 2 do redis.pcall('HINCRBY', stats, ARGV[i], ARGV[i + 1]) end
  redis.pcall('EXPIRE', stats, 2678400)
end

-- Add to the list of recently finished jobs, which keeps 1,000.
-- recent   key recent
-- at       where in ARGV the entries stand
-- count    number of entries
-- returns  nothing
local function add_recent(recent, at, count)
  local last = at + count - 1
  redis.pcall('LPUSH', recent, unpack(ARGV, math.max(at, last - 999), last))
  redis.pcall('LTRIM', recent, 0, 999)
end
