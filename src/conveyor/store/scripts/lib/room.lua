-- Room in a queue with a maximum length, and the producers that wait for it in line (key room).
-- room is a ZSET: "<channel> <number> <places>" → since when this producer waits (µs since the epoch). Once it was called the score
-- is minus the ms until which its places are kept for it. A channel belongs to one process, a number to one of its pushes.
-- While somebody waits, conf has the field line, and nobody else takes a place. Its field bound is the maximum, and what a push
-- beyond it does, as a program has declared them; an operator's max_length wins.

-- Read how many more jobs a queue takes, those included that are kept for producers which were called.
-- prefix   of the queue's keys
-- returns  the number, below 0 where there are more jobs than that
local function places_left(prefix)
  local known = redis.call('HMGET', prefix .. 'conf', 'max_length', 'bound', 'stubs')
  local maximum = tonumber(known[1] or string.match(known[2] or '0', '^%d+'))
  if maximum == 0 then return math.huge end
  return maximum - (redis.call('HLEN', prefix .. 'jobs') - redis.call('ZCARD', prefix .. 'dead') - tonumber(known[3] or 0))
end

-- Call the first producer of the line when there are places for all that it wants to store. It calls the next when it has stored, so
-- they store in their order. A call that nobody hears was for a process that has died; one without an answer holds the others back for
-- a second, and its places for five.
-- prefix   of the queue's keys
-- returns  the number of places that are left
local function find_next(prefix)
  local room, now, free = prefix .. 'room', clock(), places_left(prefix)
  local called, pending = redis.call('ZRANGE', room, '-inf', '(0', 'BYSCORE', 'WITHSCORES'), false
  for i = 1, #called, 2 do
    local lapses = -tonumber(called[i + 1])
    if lapses <= now or lapses > now + 5000 then redis.call('ZREM', room, called[i])
    else
      free = free - tonumber(string.match(called[i], '%d+$'))
      if lapses > now + 4000 then pending = true end
    end
  end
  while not pending do
    local first = redis.call('ZRANGE', room, 0, '+inf', 'BYSCORE', 'LIMIT', 0, 1)[1]
    if not first then break end
    local channel, places = string.match(first, '^(%S+) %S+ (%d+)$')
    local fits = tonumber(places) <= free
    -- An empty message only asks whether the process lives. A user may not publish, perhaps: then whoever comes next calls.
    local heard = redis.pcall('PUBLISH', channel, fits and first .. '\n' .. prefix or '')
    if type(heard) ~= 'number' or (heard > 0 and not fits) then break end
    redis.call('ZREM', room, first)
    if fits and heard > 0 then
      redis.call('ZADD', room, int(-(now + 5000)), first)
      free, pending = free - tonumber(places), true
    end
  end
  -- It goes by itself when producers and workers have died; 0: nobody is in it.
  if redis.call('PEXPIRE', room, 600000) == 0 then redis.call('HDEL', prefix .. 'conf', 'line') end
  return free
end

-- Call the next producer, as find_next does. What made room is done by then, and does not fail for it.
-- prefix   of the queue's keys
-- returns  the number of places that are left, 0 when that is not known
local function call_next(prefix)
  local found, free = pcall(find_next, prefix)
  return found and free or 0
end

-- Prove that nobody waits though there is room, and that a line is known as one. Nothing is written.
-- prefix   of the queue's keys
-- problem  a function that gets what is wrong, and where
-- returns  nothing
local function audit_line(prefix, problem)
  local room = prefix .. 'room'
  if redis.call('EXISTS', room) == 0 then return end
  if not redis.call('HGET', prefix .. 'conf', 'line') then problem('producers in line without a mark', room) end
  local first = redis.call('ZRANGE', room, 0, 0, 'WITHSCORES')
  if tonumber(first[2]) > 0 and tonumber(string.match(first[1], '%d+$')) <= places_left(prefix) then
    problem('a producer waits though there is room', first[1])
  end
end
