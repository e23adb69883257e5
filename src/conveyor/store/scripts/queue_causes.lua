-- Read why the jobs of a queue wait: a look at the first of them, of a few milliseconds at most. Nothing is written.
-- needs: numbers listed serving
--
-- KEYS  1 jobs  2 due  3 workers  4 conf  5-14 ready:0 … ready:9
-- ARGV  1 how many jobs are looked at, of those that are ready and of those that are scheduled
-- returns {now_ms, 1 when the queue is paused, workers, consumers of messages, jobs that are scheduled, when the first of them is due (ms; -1)}
--         then, of the jobs that were looked at, for each task that no worker knows: {task, jobs, when one was last seen (ms) and its name}
--         behind it how many jobs were looked at, and how many of them are messages
local queue = {prefix = string.sub(KEYS[1], 1, -5), conf = KEYS[4], workers = KEYS[3]}
local most, now = number_in(ARGV[1]), clock()
local first = redis.call('ZRANGE', KEYS[2], 0, most - 1, 'WITHSCORES')
local ids = {}
for i = 14, 5, -1 do
  if #ids < most then
    for _, id in ipairs(redis.call('LRANGE', KEYS[i], 0, most - #ids - 1)) do ids[#ids + 1] = id end
  end
end
for i = 1, #first, 2 do ids[#ids + 1] = first[i] end

local counts, names, looked, messages, size = {}, {}, 0, 0, 0
for _, id in ipairs(ids) do
  local envelope = size < 1048576 and redis.call('HGET', KEYS[1], id)
  if envelope and string.byte(envelope) ~= 120 then
    size, looked = size + #envelope, looked + 1
    local task = string.match(envelope, '^[^\n]*\n([^\n\t]*)') or ''
    if task == '' then messages = messages + 1
    else
      if not counts[task] then names[#names + 1] = task end
      counts[task] = (counts[task] or 0) + 1
    end
  end
end
local workers, consumers, sets = serving(queue, now)
local known, unknown = #names > 0 and task_sets(queue) or {}, {}
for _, task in ipairs(workers > 0 and names or {}) do
  local knows, seen = knows_task(task, sets, known)
  if knows == 0 then unknown[#unknown + 1] = {task, counts[task], seen} end
end
return {
  {now, redis.call('HGET', queue.conf, 'paused') == '1' and 1 or 0, workers, consumers, redis.call('ZCARD', KEYS[2]),
    first[2] and tonumber(first[2]) or -1},
  unknown, looked, messages,
}
