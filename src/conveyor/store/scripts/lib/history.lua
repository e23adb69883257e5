-- The events that a job's history has beside its attempts: attributes `h` in the first line of its state, each JSON without control characters.

-- Write an event of a history.
-- name     the state that the job came into
-- now      ms
-- by       who asked for it; "": nobody says
-- returns  JSON
local function past_event(name, now, by)
  return string.format('{"state":"%s","at":%.0f%s}', name, now, by ~= '' and ',"by":' .. cjson.encode(by) or '')
end

-- Add an event to a state. The newest 20 are kept.
-- state    as it is stored; false when the job has none
-- event    as past_event returns it
-- returns  the state with it
local function with_event(state, event)
  local head, rest = string.match(state or '', '^([^\n]*)(.*)$')
  if head == '' then head = '0 0 0' end
  local _, count = string.gsub(head, ' \th', '')
  if count >= 20 then head = string.gsub(head, ' \th.-( \t)', '%1', 1) end
  return head .. ' \th' .. event .. rest
end
