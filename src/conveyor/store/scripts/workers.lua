-- List the workers of a queue.
-- needs: numbers leased
--
-- KEYS  1 workers
-- ARGV  1 prefix of the queue's keys
-- returns now_ms, then (worker, end_ms, about, held, lease_ms)…    at most 1,000
local reply = {clock()}
local found = redis.call('ZRANGE', KEYS[1], 0, 999, 'WITHSCORES')
for i = 1, #found, 2 do
  local key = ARGV[1] .. 'leased:' .. found[i]
  local held = count_held(key)
  reply[#reply + 1], reply[#reply + 2] = found[i], int(tonumber(found[i + 1]))
  local facts = redis.call('HMGET', key, '\tabout', '\tlease')
  reply[#reply + 1], reply[#reply + 2], reply[#reply + 3] = facts[1] or '', held, tonumber(facts[2]) or 0
end
return reply
