-- Leave the line of producers that wait for room. Places that were kept for this one go to the next.
-- needs: numbers room
--
-- KEYS  1 room  2 conf  3 jobs  4 dead  5 none
-- ARGV  1 its entry in the line
-- returns 1, 0 when it does not wait
if redis.call('ZREM', KEYS[1], ARGV[1]) == 0 then return 0 end
call_next(string.sub(KEYS[1], 1, -5))
return 1
