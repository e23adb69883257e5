-- The first line of an envelope. It is empty for a plain job, so a plain envelope begins with a line break (byte 10).

-- Read the marks of an envelope.
-- envelope  as it is stored in jobs
-- returns   nil for a plain job, else {stub, priority, expires (ms), due (ms), own (the id is the caller's), unique (key)}
local function marks(envelope)
  if string.byte(envelope, 1) == 10 then return nil end
  local line = string.match(envelope, '^[^\n]*')
  local head, unique = string.match(line, '^([^u]*)u?(.*)$')
  return {
    stub = string.byte(head, 1) == 120,
    priority = tonumber(string.match(head, 'p(%d)')) or 0,
    expires = tonumber(string.match(head, 'e(%d+)')),
    due = tonumber(string.match(head, 'd(%d+)')),
    own = string.find(head, 'i', 1, true) ~= nil,
    unique = unique ~= '' and unique or nil,
  }
end

-- Read the priority of a job.
-- envelope  as it is stored in jobs; false when there is none
-- returns   0 to 9; 0 also for a job without an envelope
local function priority_of(envelope)
  if not envelope or string.byte(envelope, 1) == 10 then return 0 end
  return marks(envelope).priority
end
