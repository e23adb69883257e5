-- Numbers: the clock of the server, and numbers as text.

-- Read the clock of the server.
-- returns ms since the epoch
local function clock()
  local t = redis.call('TIME')
  return t[1] * 1000 + math.floor(t[2] / 1000)
end

-- Write a whole number as text. The operator ".." keeps 14 digits, this keeps all.
-- n        the number
-- returns  its digits
local function int(n)
  return string.format('%.0f', n)
end

-- Read the number in an argument. Anything else fails the step.
-- text     the argument
-- returns  the number
local function number_in(text)
  return tonumber(text) or error('not a number: ' .. tostring(text))
end
