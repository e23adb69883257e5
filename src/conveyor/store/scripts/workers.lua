-- List the workers of queues at one server.
-- needs: numbers leased
--
-- KEYS  workers of each queue
-- ARGV  none
-- returns {now_ms, how many queues were read, facts, workers, numbers}
--         workers: of each worker its identity; at most 1,000 workers of a queue; no queue is begun when so many were found
--         numbers: of each worker the number of its queue, end_ms, the number of its facts, held and lease_ms, of 8 bytes each
--         facts: what the workers stored of themselves (about), each text once: a process says the same in each of its queues
local facts, names, rows, number_of, read = {}, {}, {}, {}, #KEYS
for number, workers in ipairs(KEYS) do
  if #names >= 1000 then
    read = number - 1
    break
  end
  local found = redis.call('ZRANGE', workers, 0, 999, 'WITHSCORES')
  for i = 1, #found, 2 do
    local key = string.sub(workers, 1, -8) .. 'leased:' .. found[i]
    local stored = redis.call('HMGET', key, '\tabout', '\tlease')
    local about = stored[1] or ''
    if not number_of[about] then
      facts[#facts + 1] = about
      number_of[about] = #facts
    end
    names[#names + 1] = found[i]
    rows[#rows + 1] = struct.pack('<i8i8i8i8i8', number, found[i + 1], number_of[about], count_held(key), tonumber(stored[2]) or 0)
  end
end
return {clock(), read, facts, names, table.concat(rows)}
