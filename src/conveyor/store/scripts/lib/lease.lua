-- Leasing: jobs leave the ready lists and are held by a worker.

-- Read the head of a ready list, and tell whether it holds jobs that cannot be leased as they are.
-- queue    field jobs is used; starts is set when some job may have a key that ends when it starts
-- key      the list
-- count    how many at most
-- returns  ids, their envelopes, true when some job has marks or no envelope
local function head_of(queue, key, count)
  local ids = redis.call('LRANGE', key, 0, count - 1)
  if #ids == 0 then return ids, ids, false end
  local envelopes = redis.call('HMGET', queue.jobs, unpack(ids))
  local unusual, byte, find = false, string.byte, string.find
  for i = 1, #ids do
    local envelope = envelopes[i]
    local first = envelope and byte(envelope)
    if first ~= 10 then
      if first ~= 9 then unusual = true end
      if first and find(envelope, '\tks', 1, true) then queue.starts = true end
    end
  end
  return ids, envelopes, unusual
end

-- Lease jobs from the ready lists, by priority.
-- queue    as for usable, and ready
-- want     how many at most
-- urgent   true when a list of a priority above 0 may have entries; false spares nine commands
-- first, first_envelopes, unusual  the head of ready:0 as head_of reads it; nil when it may have changed since
-- now, missing  as for usable
-- returns  ids, their envelopes, their number
local function take_ready(queue, want, urgent, first, first_envelopes, unusual, now, missing)
  local ids, envelopes, taken = {}, {}, 0
  for priority = urgent and 9 or 0, 0, -1 do
    local key, more = KEYS[queue.ready + priority], true
    while more and taken < want do
      local room = want - taken
      local heads, found = first, first_envelopes
      if heads then first = nil else heads, found, unusual = head_of(queue, key, room) end
      local count = math.min(#heads, room)
      if count > 0 then redis.call('LTRIM', key, count, -1) end
      more = count == room
      if taken == 0 and count > 0 and count == #heads and not unusual then
        ids, envelopes, taken = heads, found, count -- jobs without marks alone, as they are
      else
        for i = 1, count do
          local id = heads[i]
          if lazy().usable(queue, id, found[i], now, missing) then
            taken = taken + 1
            ids[taken], envelopes[taken] = id, found[i]
          end
        end
        if queue.admits then more, queue.admits = true, false end
      end
    end
  end
  return ids, envelopes, taken
end

-- Record that a worker holds jobs.
-- leased   key leased:<worker>
-- number   of the turn that leases them
-- ids, taken   the jobs and their number, at least one
-- before   how many this turn has leased before; nil: none
-- returns  how many it has not held before
local function hold(leased, number, ids, taken, before)
  local places, base = {}, number * 8192 + (before or 0)
  for i = 1, taken do
    places[2 * i - 1], places[2 * i] = ids[i], base + i
  end
  return redis.call('HSET', leased, unpack(places))
end
