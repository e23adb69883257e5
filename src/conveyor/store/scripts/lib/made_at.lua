-- The instant at which a job was made, as its id tells it.

-- Read the instant at which a generated id was made.
-- id       of 22 characters, the first 8 of which are 48 bits of ms in an alphabet that sorts like the numbers
-- returns  ms since the epoch; nil of an id that a caller chose, and of a ticket
local function made_at(id)
  if #id ~= 22 or not string.find(id, '^[%w_~]+$') then return nil end
  local ms = 0
  for i = 1, 8 do
    local byte = string.byte(id, i)
    local digit = byte < 58 and byte - 48 or byte < 91 and byte - 55 or byte == 95 and 36 or byte == 126 and 63 or byte - 60
    ms = ms * 64 + digit
  end
  return ms
end
