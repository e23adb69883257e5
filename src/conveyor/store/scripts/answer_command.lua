-- Answer a command that was sent to a worker. The answer expires after a minute. Repeating it changes nothing.
--
-- KEYS  1 answer:<id>
-- ARGV  1 the answer
-- returns 1
redis.call('DEL', KEYS[1])
redis.call('RPUSH', KEYS[1], ARGV[1])
redis.pcall('PEXPIRE', KEYS[1], 60000)
return 1
