-- Leasing: jobs leave the ready lists and are held by a worker.

-- Tell what becomes of an entry whose job is not plain. Nothing is written.
-- envelope  as it is stored; false when there is none
-- now       ms
-- returns   nil when the job can be leased, else "missing", "stub" or "expired"; its marks
local function fate_of(envelope, now)
  if not envelope then return 'missing' end
  local found = marks(envelope)
  if not found then return nil end
  if found.stub then return 'stub', found end
  if found.expires and found.expires <= now then return 'expired', found end
  return nil, found
end

-- Drop a job that is gone, cancelled or expired, and whose entry was removed.
-- queue     fields prefix, jobs, state, conf, waiters and untagged are used; admits is set when a successor may have joined a list
-- id        of the job
-- fate, found  as fate_of returns them
-- now       ms
-- missing   the id is added to this list when there is no envelope
-- returns   nothing
local function discard(queue, id, fate, found, now, missing)
  if fate == 'missing' then missing[#missing + 1] = id
  elseif fate == 'stub' then
    redis.call('HDEL', queue.jobs, id)
    redis.call('HINCRBY', queue.conf, 'stubs', -1)
  else
    if events then pcall(function() note_event('cancelled', id, redis.call('HGET', queue.jobs, id), attempt_in(redis.call('HGET', queue.state, id)), 'why', 'expired') end) end
    redis.call('HDEL', queue.jobs, id)
    list_tags(queue.untagged, found.tags, id)
    finish(queue, id, 600000, cancelled_record(now, 'expired'), found)
    if found.keys then queue.admits = true end
  end
end

-- Decide about an entry whose job is not plain. A job that is gone, cancelled or expired is dropped here.
-- queue, id, now, missing  as for discard
-- envelope  as it is stored; false when there is none
-- returns   true when the job can be leased
local function usable(queue, id, envelope, now, missing)
  local first = envelope and string.byte(envelope)
  if first == 10 or first == 9 then return true end -- it has no marks
  local fate, found = fate_of(envelope, now)
  if fate then discard(queue, id, fate, found, now, missing) end
  return not fate
end

-- Read the head of a ready list, and tell whether it holds jobs that cannot be leased as they are.
-- queue    field jobs is used
-- key      the list
-- count    how many at most
-- returns  ids, their envelopes, true when some job is not plain or has no envelope
local function head_of(queue, key, count)
  local ids = redis.call('LRANGE', key, 0, count - 1)
  if #ids == 0 then return ids, ids, false end
  local envelopes = redis.call('HMGET', queue.jobs, unpack(ids))
  for i = 1, #ids do
    if not envelopes[i] or string.byte(envelopes[i]) ~= 10 then return ids, envelopes, true end
  end
  return ids, envelopes, false
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
        ids, envelopes, taken = heads, found, count -- plain jobs alone, as they are
      else
        for i = 1, count do
          local id = heads[i]
          if usable(queue, id, found[i], now, missing) then
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
-- returns  nothing
local function hold(leased, number, ids, taken, before)
  local places, base = {}, number * 8192 + (before or 0)
  for i = 1, taken do
    places[2 * i - 1], places[2 * i] = ids[i], base + i
  end
  redis.call('HSET', leased, unpack(places))
end
