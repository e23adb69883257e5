-- The workers of queues, as a reply lists them. What a worker stored of itself (about) is told once for all that stored the same, as
-- a process does in each of its queues: their facts cost a reply as much as all the rest.
local facts, names, rows, number_of = {}, {}, {}, {}

-- Add a worker.
-- number   of its queue
-- worker   its identity
-- end_ms   the end of its lease
-- key      leased:<worker>
-- held     number of its jobs
-- returns  nothing
local function add_worker(number, worker, end_ms, key, held)
  local stored = redis.call('HMGET', key, '\tabout', '\tlease')
  local about = stored[1] or ''
  if not number_of[about] then
    facts[#facts + 1] = about
    number_of[about] = #facts
  end
  names[#names + 1] = worker
  rows[#rows + 1] = struct.pack('<i8i8i8i8i8', number, end_ms, number_of[about], held, tonumber(stored[2]) or 0)
end

-- Return the workers that were added.
-- returns  {facts, workers, numbers}
--          facts: what they stored of themselves, each text once
--          workers: the identity of each
--          numbers: of each the number of its queue, end_ms, the number of its facts, held and lease_ms, of 8 bytes each
local function worker_rows()
  return {facts, names, table.concat(rows)}
end
