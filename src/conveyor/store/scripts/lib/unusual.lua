-- Unusual jobs: those with marks, and entries of the ready lists whose job is gone.

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
    local envelope = redis.call('HGET', queue.jobs, id)
    if events then pcall(function() note_event('cancelled', id, envelope, attempt_in(redis.call('HGET', queue.state, id)), 'why', 'expired') end) end
    redis.call('HDEL', queue.jobs, id)
    list_tags(queue.untagged, found.tags, id)
    finish(queue, id, 600000, cancelled_record(now, 'expired'), found)
    count_end(queue.prefix, 'expired', envelope)
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
