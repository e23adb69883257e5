-- List the workers of queues at one server.
-- needs: numbers leased
--
-- KEYS  workers of each queue
-- ARGV  none
-- returns now_ms, how many queues were read, then for each of them that has workers {its number, (worker, end_ms, about, held, lease_ms)…}
--         at most 1,000 workers of a queue; no queue is begun when so many were found
local reply, count = {clock(), #KEYS}, 0
for number, workers in ipairs(KEYS) do
  if count >= 1000 then
    reply[2] = number - 1
    break
  end
  local prefix, found, rows = string.sub(workers, 1, -8), redis.call('ZRANGE', workers, 0, 999, 'WITHSCORES'), {number}
  for i = 1, #found, 2 do
    local key = prefix .. 'leased:' .. found[i]
    local facts = redis.call('HMGET', key, '\tabout', '\tlease')
    for _, one in ipairs({found[i], int(tonumber(found[i + 1])), facts[1] or '', count_held(key), tonumber(facts[2]) or 0}) do
      rows[#rows + 1] = one
    end
    count = count + 1
  end
  if #rows > 1 then reply[#reply + 1] = rows end
end
return reply
