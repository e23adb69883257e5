-- Read the counters of queues at one server since they were begun: those of all minutes that are over, and of the last one.
--
-- KEYS  jobs of each queue
-- ARGV  none
-- returns for each queue {field, number…} of the minutes that are over, then {field, number…} of the last, then {1 when it has
--         schedules, 1 when it declares limits}, else 0; more than 5,000 fields are left out. A queue is not begun when a thousand
--         fields were read.
local work = 0
local function counters(key)
  local fields = redis.call('HLEN', key)
  if fields == 0 or fields > 5000 then return {} end
  work = work + fields
  return redis.call('HGETALL', key)
end

-- Tell whether code has declared limits of a queue, which conf keeps; also when conf has too many fields to look at.
local function has_limits(conf)
  local fields = redis.call('HLEN', conf)
  if fields > 5000 then return 1 end
  work = work + fields
  for _, field in ipairs(redis.call('HKEYS', conf)) do
    if string.sub(field, 1, 6) == 'limit:' then return 1 end
  end
  return 0
end

local answers = {}
for _, jobs in ipairs(KEYS) do
  if work >= 1000 then break end
  local prefix = string.sub(jobs, 1, -5)
  local last = redis.call('GET', prefix .. 'stats:last')
  answers[#answers + 1] = counters(prefix .. 'stats:total')
  answers[#answers + 1] = last and counters(prefix .. 'stats:' .. last) or {}
  answers[#answers + 1] = {redis.call('EXISTS', prefix .. 'schedules'), has_limits(prefix .. 'conf')}
end
return answers
