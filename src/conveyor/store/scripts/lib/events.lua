-- Events of a queue: a stream of what happens to its jobs. It is kept only while conf has the field `events`, the number of them that
-- it holds; another queue costs no command. An entry has the fields e (what happened), j (id), t (task), a (attempt, from 1 on), and
-- where they are known w (worker), at (due, ms), ms (duration or delay), why (reason), by, type and text (error).
-- They tell what a step has done, and nobody loses a job if they are not told: nothing fails for them.
local events -- those of this step; nil where the queue keeps none

-- Keep the events of this step, if the queue asks for them.
-- most     the field `events` of conf
-- returns  nothing
local function begin_events(most)
  events = most and {most = most} or nil
end

-- Add an event. Call it only where `events` is there.
-- name     of what happened
-- id       of the job
-- envelope as it is stored; false when it is gone
-- attempt  its number as text
-- ...      further fields, each with its value
-- returns  nothing
local function note_event(name, id, envelope, attempt, ...)
  local task = envelope and string.match(envelope, '^[^\n]*\n([^\n\t]+)') or ''
  events[#events + 1] = {'e', name, 'j', id, 't', task, 'a', attempt, ...}
end

-- Read the number of the attempt that a job is at, or comes to next.
-- state    as it is stored; false when it has none
-- returns  text
local function attempt_in(state)
  return string.format('%.0f', (tonumber(string.match(state or '', '^%d+')) or 0) + 1)
end

-- Write the events of this step, and tell those that read them.
-- prefix   of the queue's keys
-- returns  nothing
local function write_events(prefix)
  if not events or #events == 0 then return end
  local key, clock = prefix .. 'events', redis.pcall('TIME')
  if clock.err then return end
  for _, one in ipairs(events) do
    if type(redis.pcall('XADD', key, 'MAXLEN', events.most, '*', unpack(one))) ~= 'string' then return end
  end
  redis.pcall('PEXPIRE', key, '604800000')
  local now = string.format('%.0f', clock[1] * 1000)
  local readers = redis.pcall('ZRANGE', prefix .. 'event-readers', now, '+inf', 'BYSCORE')
  for _, channel in ipairs(readers.err and {} or readers) do redis.pcall('PUBLISH', channel, '\t\t' .. prefix .. '\ne') end
end
