-- Commands that take many keys or many values.

-- Check the type of keys. Scripts do not roll back, so each key is read before the first write: a key that holds another
-- type fails the whole step with nothing done.
-- reading  HLEN, ZCARD or LLEN
-- ...      the keys
-- returns  nothing
local function check(reading, ...)
  for _, key in ipairs({...}) do redis.call(reading, key) end
end

-- Run a command on a long list, 7,000 values a call: Lua unpacks less than 8,000, and an even number keeps pairs together.
-- command, key  as in redis.call
-- list          the values
-- first, last   the range of the list that is used
-- returns       nothing
local function in_chunks(command, key, list, first, last)
  for from = first, last, 7000 do redis.call(command, key, unpack(list, from, math.min(from + 6999, last))) end
end
