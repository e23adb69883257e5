-- Read the counters of queues at one server since they were begun: those of all minutes that are over, and of the last one.
--
-- KEYS  jobs of each queue
-- ARGV  none, or to read a page of one queue that has many counters: 1 "total" or "last"  2 the cursor, at first 0
-- returns {number of queues that were read}, then of each of them that has anything: its number, {field, number…} of the minutes that
--         are over, {field, number…} of the last, {1 when it has schedules, 1 when it declares limits, 1 when it has more than 5,000 fields
--         of a kind, which are left out}, else 0. A queue is not begun when a thousand fields were read.
--         of a page: {the next cursor, 0 at the end, {field, number…}, the last minute, which says whether two pages belong together}
if ARGV[1] then
  local prefix = string.sub(KEYS[1], 1, -5)
  local last = redis.call('GET', prefix .. 'stats:last') or ''
  local page = redis.call('HSCAN', prefix .. 'stats:' .. (ARGV[1] == 'total' and 'total' or last), ARGV[2], 'COUNT', 1000)
  return {page[1], page[2], last}
end

local work, many = 0, 0
local function counters(key)
  local fields = redis.call('HLEN', key)
  if fields > 5000 then many = 1 end
  if fields == 0 or fields > 5000 then return {} end
  work = work + fields
  return redis.call('HGETALL', key)
end

-- Tell whether code has declared limits of a queue, which conf keeps; also when conf has too many fields to look at.
local function has_limits(conf)
  local page = redis.call('HSCAN', conf, '0', 'MATCH', 'limit:*', 'COUNT', 300)
  if page[1] == '0' then return #page[2] > 0 and 1 or 0 end
  work = work + 300
  return 1
end

local answers, read = {0}, 0
for number, jobs in ipairs(KEYS) do
  if work >= 1000 then break end
  read, many = number, 0
  local prefix = string.sub(jobs, 1, -5)
  local limits, total, latest, schedules = has_limits(prefix .. 'conf'), prefix .. 'stats:total', prefix .. 'stats:last', prefix .. 'schedules'
  if redis.call('EXISTS', total, latest, schedules) + limits > 0 then
    local last, at = redis.call('GET', latest), #answers
    answers[at + 1], answers[at + 2] = number, counters(total)
    answers[at + 3] = last and counters(prefix .. 'stats:' .. last) or {}
    answers[at + 4] = {redis.call('EXISTS', schedules), limits, many}
  end
end
answers[1] = read
return answers
