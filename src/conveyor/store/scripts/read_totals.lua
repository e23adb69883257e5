-- Read the counters of queues at one server since they were begun: those of all minutes that are over, and of the last one.
--
-- KEYS  jobs of each queue
-- ARGV  none
-- returns for each queue {field, number…} of the minutes that are over, then {field, number…} of the last; more than 5,000 fields
--         are left out
local function counters(key)
  if redis.call('HLEN', key) > 5000 then return {} end
  return redis.call('HGETALL', key)
end

local answers = {}
for _, jobs in ipairs(KEYS) do
  local prefix = string.sub(jobs, 1, -5)
  local last = redis.call('GET', prefix .. 'stats:last')
  answers[#answers + 1] = counters(prefix .. 'stats:total')
  answers[#answers + 1] = last and counters(prefix .. 'stats:' .. last) or {}
end
return answers
