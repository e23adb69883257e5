-- Ageing: a job that waits long is raised by one priority each time it has waited that long, to the end of the line there. In a list the
-- first has waited longest, so the heads tell which jobs have aged, and nothing else is read.

-- Raise the jobs that have aged. Those whose age is not known, and tickets of groups, stay where they are.
-- queue    fields jobs and ready are used
-- count    how many may be leased: so many entries at the front of each list are looked at, and a hundred at least
-- ms       how long a job waits for each step
-- now      ms
-- returns  true when a job was raised
local function raise_aged(queue, count, ms, now)
  local raised = false
  for priority = 8, 0, -1 do
    local key = KEYS[queue.ready + priority]
    local heads = redis.call('LRANGE', key, 0, math.max(count, 100) - 1)
    local first = heads[1] and made_at(heads[1])
    if heads[1] and not (first and first + ms > now) then
      local envelopes = redis.call('HMGET', queue.jobs, unpack(heads))
      local stay, looked, targets = {}, 0, {}
      for i, id in ipairs(heads) do
        local since, found = made_at(id), envelopes[i] and marks(envelopes[i]) or {}
        local target = priority
        if since and envelopes[i] and not found.stub and not found.group then
          since = math.max(since, found.due or 0)
          target = math.min(9, (found.priority or 0) + math.floor(math.max(0, now - since) / ms))
          if target <= priority and not found.due then break end -- those behind it came later
        end
        looked = i
        if target > priority then
          targets[target] = targets[target] or {}
          table.insert(targets[target], id)
        else
          stay[#stay + 1] = id
        end
      end
      if next(targets) then
        raised = true
        redis.call('LTRIM', key, looked, -1)
        for i = #stay, 1, -1 do redis.call('LPUSH', key, stay[i]) end
        for target, ids in pairs(targets) do in_chunks('RPUSH', KEYS[queue.ready + target], ids, 1, #ids) end
      end
    end
  end
  return raised
end
