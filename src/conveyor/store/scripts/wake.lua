-- Put one token into a list on which a worker blocks. The token expires after a minute.
--
-- KEYS  1 the list
-- ARGV  none
-- returns 1
redis.call('LTRIM', KEYS[1], 0, 0) -- a removal first, so that a full Redis takes the token too
redis.call('RPUSH', KEYS[1], '1')
redis.pcall('PEXPIRE', KEYS[1], 60000)
return 1
