-- List the workers of a queue.
-- needs: numbers leased
--
-- KEYS  1 workers
-- ARGV  1 prefix of the queue's keys
-- returns (worker, end_ms, about, held)…    at most 1,000
local reply = {}
local found = redis.call('ZRANGE', KEYS[1], 0, 999, 'WITHSCORES')
for i = 1, #found, 2 do
  local key = ARGV[1] .. 'leased:' .. found[i]
  local held = count_held(key)
  reply[#reply + 1], reply[#reply + 2] = found[i], int(tonumber(found[i + 1]))
  reply[#reply + 1], reply[#reply + 2] = redis.call('HGET', key, '\tabout') or '', held
end
return reply
