-- Put one token into a list for whoever blocks on it. It goes away by itself if nobody does.
--
-- KEYS  1 the list
-- ARGV  none
-- returns 1
redis.call('DEL', KEYS[1])  -- a removal first, so that a full Redis rings too
redis.call('RPUSH', KEYS[1], '1')
redis.call('PEXPIRE', KEYS[1], 60000)
return 1
