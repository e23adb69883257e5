-- Read why the jobs of a queue wait: a look at the first of them, of a few milliseconds at most. Nothing is written.
-- needs: numbers listed envelope limits shut_tasks group_limits worker_name serving
--
-- KEYS  1 jobs  2 due  3 workers  4 conf  5-14 ready:0 … ready:9
-- ARGV  1 how many jobs are looked at, of those that are ready, the first of each group among them, and of those that are scheduled
-- returns {now_ms, 1 when the queue is paused, workers, consumers of messages, jobs that are scheduled, when the first of them is due (ms; -1)}
--         then, of the jobs that were looked at, for each task that no worker knows: {task, jobs, when one was last seen (ms) and its name}
--         behind it how many jobs were looked at, and how many of them are messages
--         for each task that is paused: {task, jobs that wait for it, a group as one, but for those that no turn has met yet}
--         what the jobs that were looked at require: {build, a tab and labels as JSON, jobs}, and the same of the workers (lib/serving.lua)
--         for each limit at which jobs wait, of a thousand groups: {limit, jobs, what conf says of it}
--         for each group whose key is paused, the largest first: {key, jobs that wait in it}
--         of groups that run one job at a time and have one, of a thousand groups that wait and of those that were looked at:
--         {jobs that wait in them, groups, the largest, jobs that wait in that}
local queue = {prefix = string.sub(KEYS[1], 1, -5), jobs = KEYS[1], due = KEYS[2], workers = KEYS[3], conf = KEYS[4]}
local most, now = number_in(ARGV[1]), clock()
local ids = {}
-- Groups that wait at limits, and the limits: (<priority><group> limit)…
local waits = redis.call('HSCAN', queue.prefix .. 'waits', '0', 'COUNT', 1000)[2]
-- Groups whose tickets stand in ready, by the first job of each; and what that needs of its limits.
local groups, facts, names_of_limits = {}, {}, {}

-- Add the first job of a group, which stands for it. Returns its id.
local function add_first(priority, group)
  local id = #ids < most and redis.call('LINDEX', queue.prefix .. 'group:' .. priority .. ':' .. group, 0)
  if id then ids[#ids + 1] = id end
  return id
end
for i = 14, 5, -1 do
  if #ids < most then
    for _, id in ipairs(redis.call('LRANGE', KEYS[i], 0, most - #ids - 1)) do
      if string.byte(id) == 9 then
        local first = add_first(i - 5, string.sub(id, 2))
        if first then groups[first] = i - 5 .. string.sub(id, 2) end
      else ids[#ids + 1] = id end
    end
  end
end
for i = 1, #waits, 2 do add_first(string.sub(waits[i], 1, 1), string.sub(waits[i], 2)) end

-- Alarms of limits and of schedules stand among the scheduled jobs.
local alarms, first_due, scheduled = tonumber(redis.call('HGET', KEYS[4], 'alarms') or 0), -1, 0
local due = redis.call('ZRANGE', KEYS[2], 0, most + math.min(alarms, 1000) - 1, 'WITHSCORES')
for i = 1, #due, 2 do
  if string.byte(due[i]) ~= 9 and scheduled < most then
    if scheduled == 0 then first_due = tonumber(due[i + 1]) end
    ids[#ids + 1], scheduled = due[i], scheduled + 1
  end
end

-- Read what a job requires of a worker, from the options in the second line of its envelope; nil when it requires nothing.
local function needs_of(envelope)
  local line = string.match(envelope, '^[^\n]*\n[^\n\t]*\t([^\n]*)\n')
  if not line then return nil end
  local build, labels = string.match(line, '^{"pin":"([^"]+)"') or '', string.match(line, '"requires":(%[.-%])') or '[]'
  return (build ~= '' or labels ~= '[]') and build .. '\t' .. labels or nil
end

-- Note the limits of a job that is the first of its group.
local function add_fact(member, envelope)
  local found, group = marks(envelope) or {}, string.sub(member, 2)
  if #facts == 0 then
    begin_groups(queue)
    queue.tasks = read_paused(redis.call('HGET', queue.conf, 'paused_tasks'))
  end
  local names, costs = limits_of_job(queue, found, group, envelope)
  facts[#facts + 1] = {member, found, names, costs}
  for _, name in ipairs(names) do names_of_limits[#names_of_limits + 1] = name end
end

local needs, needed = {}, {}
local counts, names, looked, messages, size = {}, {}, 0, 0, 0
for _, id in ipairs(ids) do
  local envelope = size < 1048576 and redis.call('HGET', KEYS[1], id)
  if envelope and string.byte(envelope) ~= 120 then
    size, looked = size + #envelope, looked + 1
    local task = task_of(envelope) or ''
    if groups[id] then add_fact(groups[id], envelope) end
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
-- A ticket in ready that no turn has met yet waits too, where a limit of the group's first job is full.
if #facts > 0 then load_limits(queue, names_of_limits) end
for _, fact in ipairs(facts) do
  local full = full_limit(queue, string.sub(fact[1], 2), fact, now)
  if full then
    waits[#waits + 1] = fact[1]
    waits[#waits + 1] = full
  end
end

-- Return how many jobs wait in a group, <priority><group>.
local function jobs_in(member)
  return redis.call('LLEN', queue.prefix .. 'group:' .. string.sub(member, 1, 1) .. ':' .. string.sub(member, 2))
end

-- Count what waits for paused tasks, and at limits.
local function held_up()
  local tasks, limits, found = {}, {}, {}
  for task, paused in pairs(read_paused(redis.call('HGET', queue.conf, 'paused_tasks')) or {}) do
    local waiting = 0
    for priority = 0, 9 do waiting = waiting + redis.call('LLEN', queue.prefix .. 'group:' .. priority .. ':p' .. task) end
    for _, member in ipairs(redis.call('ZRANGE', queue.prefix .. 'limit:;' .. task, 0, 999)) do
      if string.byte(member, 2) ~= 112 then waiting = waiting + 1 end
    end
    if paused then tasks[#tasks + 1] = {task, waiting} end
  end
  table.sort(tasks, function(a, b) return a[1] < b[1] end)
  for i = 2, #waits, 2 do
    local name = waits[i]
    if not found[name] and string.byte(name) ~= 58 and string.byte(name) ~= 59 then
      local base = string.match(name, '^[^:]*')
      local texts = redis.call('HMGET', queue.conf, 'override:' .. name, 'override:' .. base, 'limit:' .. base)
      found[name] = {name, 0, texts[1] or texts[2] or texts[3] or ''}
      limits[#limits + 1] = found[name]
    end
    if found[name] then found[name][2] = found[name][2] + jobs_in(waits[i - 1]) end
  end
  table.sort(limits, function(a, b) return a[2] > b[2] or (a[2] == b[2] and a[1] < b[1]) end)
  for i = #limits, 21, -1 do limits[i] = nil end
  return tasks, limits
end

-- Count what waits in groups whose key is paused, of a thousand settings and of a hundred keys.
local function shut_groups()
  local groups, jobs = {}, {}
  for i = 1, #waits, 2 do
    local name = waits[i + 1]
    if string.byte(name) == 58 and string.byte(waits[i], 2) ~= 103 then
      jobs[name] = (jobs[name] or 0) + jobs_in(waits[i])
    end
  end
  local page = redis.call('HSCAN', queue.conf, '0', 'MATCH', 'paused:*', 'COUNT', 1000)[2]
  for i = 1, math.min(#page, 200), 2 do
    local key = string.sub(page[i], 8)
    local waiting = jobs[':' .. key] or 0
    for priority = 0, 9 do waiting = waiting + redis.call('LLEN', queue.prefix .. 'group:' .. priority .. ':g' .. key) end
    if page[i + 1] == '1' and waiting > 0 then groups[#groups + 1] = {key, waiting} end
  end
  table.sort(groups, function(a, b) return a[2] > b[2] or (a[2] == b[2] and a[1] < b[1]) end)
  for i = #groups, 21, -1 do groups[i] = nil end
  return groups
end

-- Count what waits in groups behind the job that holds the slot of their key.
local function busy_groups()
  local keys, jobs, busy = {}, {}, {0, 0, '', 0}
  for i = 1, #waits, 2 do
    local name = waits[i + 1]
    if string.byte(name) == 58 and string.byte(waits[i], 2) == 103 then
      if not jobs[name] then keys[#keys + 1] = name end
      jobs[name] = (jobs[name] or 0) + jobs_in(waits[i])
    end
  end
  for i, count in ipairs(read_fields(queue.prefix .. 'limits', keys)) do
    local key, waiting = string.sub(keys[i], 2), jobs[keys[i]]
    if tonumber(count or 0) > 0 and waiting > 0 then
      busy[1], busy[2] = busy[1] + waiting, busy[2] + 1
      if waiting > busy[4] or (waiting == busy[4] and key < busy[3]) then busy[3], busy[4] = key, waiting end
    end
  end
  return busy
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
  {now, redis.call('HGET', queue.conf, 'paused') == '1' and 1 or 0, workers, consumers,
    math.max(0, redis.call('ZCARD', KEYS[2]) - alarms), first_due},
  unknown, looked, messages, paused_tasks, needed, skills, limits, shut_groups(), busy_groups(),
}
