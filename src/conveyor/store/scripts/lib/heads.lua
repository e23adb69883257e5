-- Heads: what is read of a job when its body and old errors are not needed.

-- Cut the body off an envelope.
-- envelope  as it is stored in jobs
-- returns   its first two lines
local function without_body(envelope)
  local first = string.find(envelope, '\n', 1, true) or 0
  return string.sub(envelope, 1, string.find(envelope, '\n', first + 1, true) or first)
end

-- Cut the body of an envelope to its first 2,048 bytes. A sealed or compressed one, which begins with a control character, is
-- of no use in parts.
-- envelope  as it is stored in jobs
-- returns   the shorter one
local function with_short_body(envelope)
  local head = #without_body(envelope)
  local sealed = #envelope <= head + 2048 or string.byte(envelope, head + 1) < 32 or string.byte(envelope, head + 1) > 126
  return sealed and envelope or string.sub(envelope, 1, head + 2048)
end

-- Cut off a state all errors but the last, and the traceback of that. No text within JSON holds a bare quotation mark, so that
-- what is cut at is the member itself.
-- state    as it is stored
-- returns  its first line and the last error
local function with_last_error(state)
  local first = string.find(state, '\n', 1, true)
  if not first then return state end
  local last, at = first, first
  while at do last, at = at, string.find(state, '\n', at + 1, true) end
  local cut = string.find(state, ',"traceback":"', last, true)
  return string.sub(state, 1, first) .. (cut and string.sub(state, last + 1, cut - 1) .. '}' or string.sub(state, last + 1))
end
