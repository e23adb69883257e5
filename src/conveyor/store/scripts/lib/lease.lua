-- Leasing: jobs leave the ready lists and are held by a worker.

-- Decide about an entry whose job is not plain. A job that is gone, cancelled or expired is dropped here.
-- queue     fields prefix, jobs, state, conf and waiters are used
-- id        of the job
-- envelope  as it is stored; false when there is none
-- now       ms
-- missing   the id is added to this list when there is no envelope
-- returns   true when the job can be leased
local function usable(queue, id, envelope, now, missing)
  if not envelope then
    missing[#missing + 1] = id
    return false
  end
  local found = marks(envelope)
  if not found then return true end
  if found.stub then
    redis.call('HDEL', queue.jobs, id)
    redis.call('HINCRBY', queue.conf, 'stubs', -1)
    return false
  end
  if found.expires and found.expires <= now then
    redis.call('HDEL', queue.jobs, id)
    finish(queue, id, 600000, cancelled_record(now, 'expired'), found.unique, found.own)
    return false
  end
  return true
end

-- Lease jobs from the ready lists, by priority.
-- queue    as for usable, and ready
-- want     how many at most
-- urgent   true when a list of a priority above 0 may have entries; false spares nine commands
-- now, missing  as for usable
-- returns  ids, their envelopes, their number
local function take_ready(queue, want, urgent, now, missing)
  local ids, envelopes, taken = {}, {}, 0
  for priority = urgent and 9 or 0, 0, -1 do
    local key = KEYS[queue.ready + priority]
    while taken < want do
      local popped = redis.call('LPOP', key, want - taken)
      if not popped or #popped == 0 then break end
      local found = redis.call('HMGET', queue.jobs, unpack(popped))
      for i, id in ipairs(popped) do
        -- Plain jobs, which begin with a line break, cost no call of a function.
        if (found[i] and string.byte(found[i]) == 10) or usable(queue, id, found[i], now, missing) then
          taken = taken + 1
          ids[taken], envelopes[taken] = id, found[i]
        end
      end
    end
  end
  return ids, envelopes, taken
end

-- Record that a worker holds jobs.
-- leased   key leased:<worker>
-- number   of the turn that leases them
-- ids, taken  the jobs and their number, at least one
-- returns  nothing
local function hold(leased, number, ids, taken)
  local places, base = {}, number * 8192
  for i = 1, taken do
    places[2 * i - 1], places[2 * i] = ids[i], base + i
  end
  redis.call('HSET', leased, unpack(places))
end
