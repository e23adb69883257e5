-- Make sure that a push that was refused stays refused: a copy of it may still be on its way, and room may come before it.
-- needs: numbers sequence
--
-- KEYS  1 lane:<producer>
-- ARGV  1 number of the push
-- returns "<number>\nwithdrawn", or the reply that a copy of it got meanwhile: then it is stored, and was not refused
local last = redis.call('GET', KEYS[1])
local seen = last and tonumber(string.match(last, '^%d+')) or -1
if seen == number_in(ARGV[1]) then return last end
local reply = ARGV[1] .. '\nwithdrawn'
if seen > tonumber(ARGV[1]) then return reply end

-- The first write takes no room, since it is a full Redis that refuses. It removes nothing: the SET may be refused.
redis.call('PEXPIRE', KEYS[1], sequence_ms(KEYS[1]))
redis.call('SET', KEYS[1], reply, 'PX', sequence_ms(KEYS[1]))
return reply
