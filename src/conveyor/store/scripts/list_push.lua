-- Append raw entries to a plain list: all of them or none, and once however often the call is sent.
-- needs: keys sequence rights
--
-- KEYS  1 lane:<producer>  2 the list
-- ARGV  1 number of this push in its sequence  2… entries
-- returns "<number>\nok", or "<number>\nlate": a later push of this producer was answered already; nothing stored
local reply = answered(KEYS[1], ARGV[1])
if reply then return reply end
redis.call('LLEN', KEYS[2]) -- fails here, with nothing done, when the key is no list
reply = ARGV[1] .. '\nok'
prove(string.match(KEYS[1], '^.-}:') .. 'none', 'SET')
in_chunks('RPUSH', KEYS[2], ARGV, 2, #ARGV)
redis.call('SET', KEYS[1], reply, 'PX', sequence_ms(KEYS[1]))
return reply
