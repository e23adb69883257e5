-- List the workers of queues at one server.
-- needs: numbers leased worker_rows
--
-- KEYS  workers of each queue
-- ARGV  none
-- returns {now_ms, how many queues were read, workers, as worker_rows returns them}
--         at most 1,000 workers of a queue; no queue is begun when so many were found
local read, count = #KEYS, 0
for number, workers in ipairs(KEYS) do
  if count >= 1000 then
    read = number - 1
    break
  end
  local found = redis.call('ZRANGE', workers, 0, 999, 'WITHSCORES')
  for i = 1, #found, 2 do
    local key = string.sub(workers, 1, -8) .. 'leased:' .. found[i]
    add_worker(number, found[i], found[i + 1], key, count_held(key))
    count = count + 1
  end
end
return {clock(), read, worker_rows()}
