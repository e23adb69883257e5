-- Read why a job waits, from the keys that a lease reads. Nothing is written.
-- needs: numbers kept_result ended_mark leased listed envelope job_place heads serving
--
-- KEYS  1 jobs  2 state  3 due  4 dead  5 workers  6 result:<id>  7 results:<window>  8 conf  9-18 ready:0 … ready:9
-- ARGV  1 id  2 entries of a list that are looked at from either end, at most
-- returns {what get_job.lua returns, the envelope without its body and of the errors the last, without its traceback}, now_ms
--         then, of one that is ready or scheduled: 1 when the queue is paused; workers; consumers of messages
--         1 when one of the workers may know the task, else 0, when one that did was last seen (ms) and its name, "" never
--         {jobs before it, -1 when it is further from both ends than was looked, entries that stand ready, jobs that ended lately, in how many ms}
local queue = {
  prefix = string.sub(KEYS[1], 1, -5), jobs = KEYS[1], state = KEYS[2], due = KEYS[3], dead = KEYS[4], workers = KEYS[5], conf = KEYS[8],
}
local id, most, now = ARGV[1], number_in(ARGV[2]), clock()
local place = job_place(queue, id, KEYS[6], KEYS[7])
local envelope = place[2]
place[2], place[3] = without_body(envelope), with_last_error(place[3])
if place[1] ~= 'ready' and place[1] ~= 'scheduled' then return {place, now} end

-- Find how many entries of the ready lists come before this one.
local function position()
  local priority, before, total = priority_of(envelope), 0, 0
  for i = 9, 0, -1 do
    local length = redis.call('LLEN', KEYS[9 + i])
    total = total + length
    if i > priority then before = before + length end
  end
  local key = KEYS[9 + priority]
  local at = redis.call('LPOS', key, id, 'MAXLEN', most) or redis.call('LPOS', key, id, 'RANK', -1, 'MAXLEN', most)
  return at and before + at or -1, total
end

-- Count the attempts of jobs that ended in this minute and the two before; not in a queue of very many tasks.
local function drain()
  local minute, ended, since = math.floor(now / 60000), 0, now
  for one = minute - 2, minute do
    local key = queue.prefix .. 'stats:' .. int(one)
    local counters = redis.call('HLEN', key) <= 3000 and redis.call('HGETALL', key) or {}
    if counters[1] then since = math.min(since, one * 60000) end
    for i = 1, #counters, 2 do
      local kind = string.match(counters[i], '^(%a+):')
      if kind == 'done' or kind == 'failed' then ended = ended + tonumber(counters[i + 1]) end
    end
  end
  return ended, now - since
end

local workers, consumers, sets = serving(queue, now)
local task = string.match(envelope, '^[^\n]*\n([^\n\t]*)') or ''
local known, seen = 1, ''
if task ~= '' then known, seen = knows_task(task, sets, task_sets(queue)) end
local ahead, total, ended, window = -1, 0, 0, 0
if place[1] == 'ready' then
  ahead, total = position()
  ended, window = drain()
end
return {
  place, now, redis.call('HGET', queue.conf, 'paused') == '1' and 1 or 0, workers, consumers, known, seen,
  {ahead, total, ended, window},
}
