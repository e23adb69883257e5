-- Append raw entries to a plain list: all of them or none, and once however often the call is sent.
--
-- KEYS  1 lane  2 the list
-- ARGV  1 number of this push in its lane  2… entries
-- returns "<number>\nok", or "<number>\nlate": a newer push of this lane was answered already; nothing stored
local number = tonumber(ARGV[1])
local last = redis.call('GET', KEYS[1])
if last then
  local seen = tonumber(string.match(last, '^%d+'))
  if seen == number then return last end
  if seen > number then return ARGV[1] .. '\nlate' end
end
redis.call('LLEN', KEYS[2])  -- fails here, with nothing done, when the key is no list
redis.call('SET', KEYS[1], ARGV[1] .. '\nok', 'PX', 7200000)
for first = 2, #ARGV, 7000 do
  redis.call('RPUSH', KEYS[2], unpack(ARGV, first, math.min(first + 6999, #ARGV)))
end
return ARGV[1] .. '\nok'
