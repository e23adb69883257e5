-- Move one message to an identity of its own, with its own end; where it has one, that ends so long from now.
-- needs: numbers keys listed
--
-- KEYS  1 leased:<worker>  2 leased:<new worker>, the same where it has one  3 workers
-- ARGV  1 id  2 new worker  3 ms from now  4 about
-- returns 1, also when it was done before; 0 when the lease is lost
if redis.call('HEXISTS', KEYS[2], ARGV[1]) == 1 then
  if KEYS[1] == KEYS[2] then
    check('ZCARD', KEYS[3])
    local ends = clock() + tonumber(ARGV[3])
    redis.call('HDEL', KEYS[1], '\t') -- as below
    redis.call('ZADD', KEYS[3], 'XX', ends, ARGV[2])
    redis.call('HSET', KEYS[1], '\tlease', ARGV[3])
  end
  return 1
end
local place = redis.call('HGET', KEYS[1], ARGV[1])
if not place then return 0 end
check('ZCARD', KEYS[3])
local asked, now = redis.call('HGET', KEYS[1], '\tcancel'), clock()
-- A removal first, so that a full Redis takes the rest; and each command before a write that counts (see lib/rights.lua).
redis.call('HDEL', KEYS[1], '\t')
redis.call('ZADD', KEYS[3], 'XX', 0, '\t')
redis.call('HSET', KEYS[2], '\tturn', 0, '\tabout', ARGV[4], '\tlease', ARGV[3], ARGV[1], int(-math.abs(tonumber(place))))
redis.call('HDEL', KEYS[1], ARGV[1])
-- A cancellation asked of the old identity goes with the message.
if asked and listed(asked, '\n', ARGV[1]) then redis.call('HSET', KEYS[2], '\tcancel', ARGV[1]) end
redis.call('ZADD', KEYS[3], now + tonumber(ARGV[3]), ARGV[2])
return 1
