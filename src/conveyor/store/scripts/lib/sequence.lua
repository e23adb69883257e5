-- The sequence of a producer (key lane:<producer>): the number of its last push, a line break, and the reply to that push.
-- Numbers rise, and one push is in flight, so a push that is sent again is answered and stores nothing twice.
-- A push may stand for several numbers, "<last> <first>": then it is new when none of them was taken.

-- Answer a push that is not new.
-- key      of the sequence
-- text     number of the push
-- returns  the reply that this push had; "<number>\nlate\n<last number>" when a later one was answered already, or a part of
--          this one; nil when it is new
local function answered(key, text)
  local last, number = redis.call('GET', key), tonumber(string.match(text, '^%d+'))
  if not last then return nil end
  local found = string.match(last, '^%d+')
  local seen, first = tonumber(found), tonumber(string.match(text, '%d+$'))
  if seen == number then return last end
  if seen >= first then return text .. '\nlate\n' .. found end
end

-- Tell how long a sequence is kept. Two hours, so that a clock set right by an hour does not make it forget. A day when the
-- name ends in + (byte 43): a buffer may send its pushes again after a long outage.
-- key      of the sequence
-- returns  ms
local function sequence_ms(key)
  return string.byte(key, -1) == 43 and 86400000 or 7200000
end
