-- Read the counters of queues at one server since they were begun: those of all minutes that are over, and of the last one.
--
-- KEYS  jobs of each queue
-- ARGV  none
-- returns for each queue {field, number…} of the minutes that are over, then {field, number…} of the last, then {1 when it has
--         schedules, 1 when it declares limits}, else 0; more than 5,000 fields are left out
local function counters(key)
  if redis.call('HLEN', key) > 5000 then return {} end
  return redis.call('HGETALL', key)
end

-- Tell whether code has declared limits of a queue, which conf keeps; also when conf has too many fields to look at.
local function has_limits(conf)
  if redis.call('HLEN', conf) > 5000 then return 1 end
  for _, field in ipairs(redis.call('HKEYS', conf)) do
    if string.sub(field, 1, 6) == 'limit:' then return 1 end
  end
  return 0
end

local answers = {}
for _, jobs in ipairs(KEYS) do
  local prefix = string.sub(jobs, 1, -5)
  local last = redis.call('GET', prefix .. 'stats:last')
  answers[#answers + 1] = counters(prefix .. 'stats:total')
  answers[#answers + 1] = last and counters(prefix .. 'stats:' .. last) or {}
  answers[#answers + 1] = {redis.call('EXISTS', prefix .. 'schedules'), has_limits(prefix .. 'conf')}
end
return answers
