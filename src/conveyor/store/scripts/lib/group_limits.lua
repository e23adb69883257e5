-- Groups: jobs with a group or a limit wait in the list of their group, group:<priority>:<group>. A group is called g<key> by
-- its key; l<name>:<key> or l<name> by the first of its jobs' limits with a key, else by the first. A group that is not empty
-- has one ticket: the entry \t<group> in the ready list of its priority (set tickets: <priority><group>), or, while a limit
-- of its first job is full, a member of the sorted set limit:<limit> (hash waits: <priority><group> → limit).
-- Slots of concurrency limits belong to ids (hash slots: id → limits), and limits counts them. Whoever touches a limit and
-- leaves room moves its first ticket to the front of its ready list; a limit that only time opens has an alarm \t<limit> in due.

-- Name the list of a group.
-- queue    field prefix is used
-- priority, group  as said
-- returns  the key
local function list_of(queue, priority, group)
  return queue.prefix .. 'group:' .. priority .. ':' .. group
end

-- Name the limit of a group's key: what an operator pauses and weighs, and what a group that runs one at a time holds.
-- group    its name
-- returns  :<key>
local function key_limit(group)
  if string.byte(group) == 112 then return ';' .. string.sub(group, 2) end
  if string.byte(group) == 103 then return ':' .. string.sub(group, 2) end
  local colon = string.find(group, ':', 1, true)
  return ':' .. string.sub(group, colon and colon + 1 or 2)
end

-- List the limits of a job.
-- found    its marks
-- group    its group
-- returns  names, the limit of its key first; their costs
local function limits_of(found, group)
  local names, costs = {key_limit(group)}, {1}
  for _, limit in ipairs(found.limits or {}) do
    local cost, name = string.match(limit, '^(%d+):(.*)$')
    if cost then names[#names + 1], costs[#costs + 1] = name, math.max(tonumber(cost), 1) end
  end
  return names, costs
end

-- List the limits of a job, and that of its task when it is paused or held.
-- queue    field tasks is used
-- found, group  as for limits_of
-- envelope as it is stored
-- returns  as limits_of
local function limits_of_job(queue, found, group, envelope)
  local names, costs = limits_of(found or {}, group)
  local task = queue.tasks and string.byte(group) ~= 112 and task_of(envelope)
  if task and queue.tasks[task] ~= nil then names[#names + 1], costs[#costs + 1] = ';' .. task, 1 end
  return names, costs
end

-- Make what the functions below remember within one step.
-- queue    fields prefix, jobs, conf and due are used by them; the others are added here
-- returns  nothing
local function begin_groups(queue)
  queue.limits, queue.touched, queue.touches = {}, 0, {}
  queue.counters = {waiting = 0, waiting_stubs = 0, alarms = 0, stubs = 0}
  queue.unused = {kind = 'k', count = 0, held = 0, paused = false, weight = 1}
  queue.taken = {kind = 'k', count = 1, held = 0, paused = false, weight = 1}
end

-- Find the limit at which a job must wait.
-- queue    as begin_groups makes it; the limits are loaded
-- group    of the job
-- fact     its limits as third, their costs as fourth
-- now      ms
-- returns  its name, nil when all have room; true when the job's group runs one at a time; how many jobs like it have room
local function full_limit(queue, group, fact, now)
  local names, costs, closed = fact[3], fact[4], string.byte(group) == 103
  for i = 2, closed and #names or 0 do
    -- A concurrency limit by the group's key says how many may run.
    local s, colon = queue.limits[names[i]], string.find(names[i], ':', 1, true)
    if s.kind == 'c' and colon and string.sub(names[i], colon) == names[1] then closed = false end
  end
  local least = 1000000
  for i, name in ipairs(names) do
    local s = queue.limits[name]
    local room = room_of(queue, s, now, closed)
    if s.kind == 'r' then room = math.floor(room / math.min(costs[i], s.n)) end
    if room < 1 then return name, closed, 0 end
    if room < least then least = room end
  end
  return nil, closed, least
end
