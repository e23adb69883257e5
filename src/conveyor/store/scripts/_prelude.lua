-- Prepended to every script. A name that begins with a tab is ours; ids hold no control characters.

-- ms since the epoch, by the server's clock
local function clock()
  local t = redis.call('TIME')
  return t[1] * 1000 + math.floor(t[2] / 1000)
end

-- 13 digits survive "..", which keeps 14; this spells them whatever their number
local function int(n) return string.format('%.0f', n) end

-- Scripts do not roll back, so each key is read before the first write: one that holds another type fails
-- the whole step with nothing done. Readings: HLEN, ZCARD, LLEN.
local function check(reading, ...)
  for _, key in ipairs({...}) do redis.call(reading, key) end
end

-- the number in an argument; anything else fails the step
local function number_in(text)
  return tonumber(text) or error('not a number: ' .. tostring(text))
end

-- call an idle worker, unless one is called already; a token that nobody took for an hour is not needed
local function wake(key)
  if redis.call('EXISTS', key) == 0 then
    redis.call('RPUSH', key, '1')
    redis.call('PEXPIRE', key, 3600000)
  end
end

-- the marks of an envelope's first line; nil for a plain job
local function marks(envelope)
  if string.byte(envelope, 1) == 10 then return nil end
  local line = string.match(envelope, '^[^\n]*')
  local head, unique = string.match(line, '^([^u]*)u?(.*)$')
  return {
    stub = string.byte(head, 1) == 120,
    priority = tonumber(string.match(head, 'p(%d)')) or 0,
    expires = tonumber(string.match(head, 'e(%d+)')),
    due = tonumber(string.match(head, 'd(%d+)')),
    own = string.find(head, 'i', 1, true) ~= nil,
    unique = unique ~= '' and unique or nil,
  }
end

-- give back what an id held when its job ends: the unique key now, its own id after a day
local function release(prefix, id, unique, own)
  if unique then
    local key = prefix .. 'unique:k:' .. unique
    if redis.pcall('GET', key) == id then redis.call('DEL', key) end
  end
  if own then redis.call('PEXPIRE', prefix .. 'unique:i:' .. id, 86400000) end
end

-- tell the processes that wait for this id how it ended
local function announce(waiters, id, record)
  local channels = redis.call('HGET', waiters, id)
  if not channels then return end
  redis.call('HDEL', waiters, id)
  for channel in string.gmatch(channels, '%S+') do
    redis.call('PUBLISH', channel, id .. '\n' .. record)
  end
end
