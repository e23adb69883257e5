-- Read why a job waits, from the keys that a lease reads. Nothing is written.
-- needs: numbers kept_result ended_mark leased listed envelope limits limit_use shut_tasks group_limits job_place heads worker_name serving
--
-- KEYS  1 jobs  2 state  3 due  4 dead  5 workers  6 result:<id>  7 results:<window>  8 conf  9-18 ready:0 … ready:9
-- ARGV  1 id  2 entries of a list that are looked at from either end, at most
-- returns {what get_job.lua returns, the envelope without its body and of the errors the last, without its traceback}, now_ms
--         then, of one whose worker's lease has ended: when that was (ms); workers and consumers of messages whose leases hold
--         then, of one that has not ended and is not leased: 1 when the queue is paused; workers; consumers of messages
--         1 when one of the workers may know the task, else 0, when one that did was last seen (ms) and its name, "" never
--         {jobs before it at least, 1 when it is exact, entries that stand ready and jobs that wait, attempts that ended lately, in how many ms}
--         {1 when its task is paused; until when it is held (ms; 0)}
--         {key of its group, or ""; 1 when that is paused; the job that it waits for, or ""; the place of that, and when that is due (ms), or -1}
--         {the limit that is full, or ""; what conf says of it, "" while it is held; slots or starts in use; jobs and groups before it; when it opens (ms), or -1}
--         what lib/serving.lua says of the builds and labels of the workers
local queue = {
  prefix = string.sub(KEYS[1], 1, -5), jobs = KEYS[1], state = KEYS[2], due = KEYS[3], dead = KEYS[4], workers = KEYS[5], conf = KEYS[8],
}
local id, most, now = ARGV[1], number_in(ARGV[2]), clock()
local place = job_place(queue, id, KEYS[6], KEYS[7])
local envelope = place[2]
place[2], place[3] = without_body(envelope), with_last_error(place[3])
if place[1] == 'leased' then
  local ends = tonumber(redis.call('ZSCORE', queue.workers, place[4]) or now + 1)
  if ends <= now then
    local workers, consumers = serving(queue, now)
    return {place, now, ends, workers, consumers}
  end
end
if place[1] ~= 'ready' and place[1] ~= 'waiting' and place[1] ~= 'scheduled' then return {place, now} end
local conf = redis.call('HMGET', queue.conf, 'paused', 'paused_tasks', 'waiting')
local found, task, priority = marks(envelope) or {}, task_of(envelope) or '', priority_of(envelope)
begin_groups(queue)
queue.tasks = read_paused(conf[2])
local group = group_of(found)

-- Find an entry in a list, without a look at more than so many of its ends. Returns how many come before it at least, and whether that is exact.
local function entries_before(key, entry)
  local at = redis.call('LPOS', key, entry, 'MAXLEN', most) or redis.call('LPOS', key, entry, 'RANK', -1, 'MAXLEN', most)
  return at or math.min(most, redis.call('LLEN', key)), at and 1 or 0
end

-- Find how many jobs come before this one at least: in a group each ticket before its own counts as one.
local function position()
  local before, total = 0, tonumber(conf[3] or 0)
  for i = 9, 0, -1 do
    local length = redis.call('LLEN', KEYS[9 + i])
    total = total + length
    if i > priority then before = before + length end
  end
  if not group and queue.tasks and queue.tasks[task] ~= nil then
    local at, exact = entries_before(queue.prefix .. 'group:' .. priority .. ':p' .. task, id)
    if exact == 1 then return at, 1, total end
  end
  if not group then
    local at, exact = entries_before(KEYS[9 + priority], id)
    return before + at, exact, total
  end
  local inside = entries_before(queue.prefix .. 'group:' .. priority .. ':' .. group, id)
  local outside = entries_before(KEYS[9 + priority], '\t' .. group)
  return before + inside + outside, 0, total - redis.call('SCARD', queue.prefix .. 'tickets')
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

-- Find the job that holds the slot of a group's key: it runs, or waits for its retry.
local function holder_of(limit)
  local slots = redis.call('HSCAN', queue.prefix .. 'slots', '0', 'COUNT', 2000)[2]
  for i = 1, #slots, 2 do
    if slots[i] ~= id and listed(slots[i + 1], '\t', limit) then return slots[i] end
  end
end

-- Find the first job of a group, without the cancelled and expired ones before it: a lease drops them.
local function first_of(list)
  for _, one in ipairs(redis.call('LRANGE', list, 0, 99)) do
    local text = redis.call('HGET', queue.jobs, one)
    local its = text and (marks(text) or {})
    if its and not its.stub and not (its.expires and its.expires <= now) then return one end
  end
end

-- Tell whether a limit of the first job of the group is full: then nothing behind it is leased either.
local function is_shut_out(first)
  local text = redis.call('HGET', queue.jobs, first)
  local its = marks(text) or {}
  local names, costs = limits_of_job(queue, its, group, text)
  load_limits(queue, names)
  return full_limit(queue, group, {nil, its, names, costs}, now) ~= nil
end

-- Find what a job of a group waits for: the job before it in a group that runs one at a time, and the limit that is full.
local function group_causes()
  local names, costs = limits_of_job(queue, found, group, envelope)
  load_limits(queue, names)
  local key, paused = string.byte(group) == 103 and string.sub(group, 2) or '', queue.limits[names[1]].paused and 1 or 0
  local full, closed = full_limit(queue, group, {nil, found, names, costs}, now)
  local list, behind = queue.prefix .. 'group:' .. priority .. ':' .. group, nil
  if key ~= '' and closed and queue.limits[names[1]].count > 0 then behind = holder_of(names[1]) end
  local first = first_of(list)
  if not behind and first and first ~= id and (key ~= '' and (full or closed) or not full and is_shut_out(first)) then
    behind, key = first, key ~= '' and key or string.sub(group, 2)
  end
  local known = behind and redis.call('HEXISTS', queue.jobs, behind) == 1
  local held = known and job_place(queue, behind, '', '') or {'', '', '', ''}
  local causes = {key, paused, behind or '', held[1], held[1] == 'scheduled' and tonumber(held[4]) or -1}
  local its_key = full and string.byte(full) == 58
  if not full or string.byte(full) == 59 or (its_key and queue.limits[full].held <= now) then return causes, {'', '', 0, 0, -1} end
  local colon, s, cost = string.find(full, ':', 1, true), queue.limits[full], 1
  for i, name in ipairs(names) do
    if name == full then cost = costs[i] end
  end
  local base, member = colon and string.sub(full, 1, colon - 1) or full, priority .. group
  local texts = redis.call('HMGET', queue.conf, 'override:' .. full, 'override:' .. base, 'limit:' .. base)
  local before = redis.call('ZRANK', queue.prefix .. 'limit:' .. full, member) or redis.call('ZCARD', queue.prefix .. 'limit:' .. full)
  return causes, {
    full, s.held <= now and (texts[1] or texts[2] or texts[3]) or '', used_of(queue, s, now), before + (entries_before(list, id)),
    opens_at(queue, s, cost, now) or -1,
  }
end

local workers, consumers, sets, skills = serving(queue, now)
local known, seen = 1, ''
if task ~= '' then known, seen = knows_task(task, sets, task_sets(queue)) end
local where, in_group, at_limit = {0, 1, 0, 0, 0}, {'', 0, '', '', -1}, {'', '', 0, 0, -1}
if place[1] ~= 'scheduled' then
  local ahead, exact, total = position()
  where = {ahead, exact, total, drain()}
  if group then in_group, at_limit = group_causes() end
end
local held_until = queue.tasks and tonumber(redis.call('HGET', queue.prefix .. 'limits', '\t;' .. task) or 0) or 0
return {
  place, now, conf[1] == '1' and 1 or 0, workers, consumers, known, seen, where,
  {queue.tasks and queue.tasks[task] and 1 or 0, held_until > now and held_until or 0}, in_group, at_limit, skills,
}
