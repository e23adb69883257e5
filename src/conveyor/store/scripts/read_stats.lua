-- Read the counters of a queue, minute by minute or hour by hour; about 10,000 counters a call.
-- needs: numbers
--
-- KEYS  1 jobs  2 none
-- ARGV  1 "minutes" or "hours"  2 the first  3 the last, since the epoch
-- returns {the first that was not read (the last + 1: all were), (number, (counter, value)…)…}    those without counters are left out
--         an hour is read with its last minute, which is added to it as soon as the next one begins
local prefix, hours, last = string.sub(KEYS[1], 1, -5), ARGV[1] == 'hours', number_in(ARGV[3])
local reply, room, one = {0}, 10000, number_in(ARGV[2])
local open = hours and tonumber(redis.call('GET', prefix .. 'stats:last') or '')
while one <= last and room > 0 do
  local counters = redis.call('HGETALL', prefix .. (hours and 'stats:h' or 'stats:') .. int(one))
  if open and math.floor(open / 60) == one then
    for _, part in ipairs(redis.call('HGETALL', prefix .. 'stats:' .. int(open))) do counters[#counters + 1] = part end
  end
  if #counters > 0 then reply[#reply + 1], reply[#reply + 2] = one, counters end
  room = room - 4 - #counters / 2
  one = one + 1
end
reply[1] = one
return reply
