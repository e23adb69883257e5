-- List the jobs that a worker holds, the longest first: at most so many, and of each the envelope without its body.
-- needs: leased leased_order heads
--
-- KEYS  1 leased:<worker>  2 jobs
-- ARGV  1 how many at most
-- returns (id, since when in ms or "", envelope)…
local reply = {}
local ids, places = ids_in_order(KEYS[1])
for i = 1, math.min(#ids, tonumber(ARGV[1])) do
  reply[#reply + 1], reply[#reply + 2] = ids[i], leased_at(places[i]) or ''
  reply[#reply + 1] = without_body(redis.call('HGET', KEYS[2], ids[i]) or '')
end
return reply
