-- Read why the jobs of a queue wait: a look at the first of them, of a few milliseconds at most. Nothing is written.
-- needs: numbers listed envelope paused_tasks worker_name serving
--
-- KEYS  1 jobs  2 due  3 workers  4 conf  5-14 ready:0 … ready:9
-- ARGV  1 how many jobs are looked at, of those that are ready and of those that are scheduled
-- returns {now_ms, 1 when the queue is paused, workers, consumers of messages, jobs that are scheduled, when the first of them is due (ms; -1)}
--         then, of the jobs that were looked at, for each task that no worker knows: {task, jobs, when one was last seen (ms) and its name}
--         behind it how many jobs were looked at, and how many of them are messages
--         for each task that is paused: {task, jobs that wait for it, a group as one, but for those that no turn has met yet}
--         what the jobs that were looked at require: {build, a tab and labels as JSON, jobs}, and the same of the workers (lib/serving.lua)
--         for each limit at which groups wait, of a thousand groups: {limit, groups, what conf says of it}
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

-- Read what a job requires of a worker, from the options in the second line of its envelope; nil when it requires nothing.
local function needs_of(envelope)
  local line = string.match(envelope, '^[^\n]*\n[^\n\t]*\t([^\n]*)\n')
  if not line then return nil end
  local build, labels = string.match(line, '^{"pin":"([^"]+)"') or '', string.match(line, '"requires":(%[.-%])') or '[]'
  return (build ~= '' or labels ~= '[]') and build .. '\t' .. labels or nil
end

local needs, needed = {}, {}
local counts, names, looked, messages, size = {}, {}, 0, 0, 0
for _, id in ipairs(ids) do
  local envelope = size < 1048576 and redis.call('HGET', KEYS[1], id)
  if envelope and string.byte(envelope) ~= 120 then
    size, looked = size + #envelope, looked + 1
    local task = task_of(envelope) or ''
    if task == '' then messages = messages + 1
    else
      if not counts[task] then names[#names + 1] = task end
      counts[task] = (counts[task] or 0) + 1
      local need = needs_of(envelope)
      if need then
        if not needs[need] then needed[#needed + 1] = need end
        needs[need] = (needs[need] or 0) + 1
      end
    end
  end
end
-- Count what waits for paused tasks, and at limits.
local function held_up()
  local conf = redis.call('HMGET', queue.conf, 'paused_tasks', 'waiting')
  local tasks, limits, found = {}, {}, {}
  for task, paused in pairs(read_paused(conf[1]) or {}) do
    local waiting = 0
    for priority = 0, 9 do waiting = waiting + redis.call('LLEN', queue.prefix .. 'group:' .. priority .. ':p' .. task) end
    for _, member in ipairs(redis.call('ZRANGE', queue.prefix .. 'limit:;' .. task, 0, 999)) do
      if string.byte(member, 2) ~= 112 then waiting = waiting + 1 end
    end
    if paused then tasks[#tasks + 1] = {task, waiting} end
  end
  table.sort(tasks, function(a, b) return a[1] < b[1] end)
  local page = conf[2] and redis.call('HSCAN', queue.prefix .. 'waits', '0', 'COUNT', 1000)[2] or {}
  for i = 2, #page, 2 do
    local name = page[i]
    if not found[name] and string.byte(name) ~= 58 and string.byte(name) ~= 59 then
      local base = string.match(name, '^[^:]*')
      local texts = redis.call('HMGET', queue.conf, 'override:' .. name, 'override:' .. base, 'limit:' .. base)
      found[name] = {name, 0, texts[1] or texts[2] or texts[3] or ''}
      limits[#limits + 1] = found[name]
    end
    if found[name] then found[name][2] = found[name][2] + 1 end
  end
  table.sort(limits, function(a, b) return a[2] > b[2] or (a[2] == b[2] and a[1] < b[1]) end)
  for i = #limits, 21, -1 do limits[i] = nil end
  return tasks, limits
end

local workers, consumers, sets, skills = serving(queue, now)
local paused_tasks, limits = held_up()
local known, unknown = #names > 0 and task_sets(queue) or {}, {}
for _, task in ipairs(workers > 0 and names or {}) do
  local knows, seen = knows_task(task, sets, known)
  if knows == 0 then unknown[#unknown + 1] = {task, counts[task], seen} end
end
for i, need in ipairs(needed) do needed[i] = {need, needs[need]} end
return {
  {now, redis.call('HGET', queue.conf, 'paused') == '1' and 1 or 0, workers, consumers, redis.call('ZCARD', KEYS[2]),
    first[2] and tonumber(first[2]) or -1},
  unknown, looked, messages, paused_tasks, needed, skills, limits,
}
