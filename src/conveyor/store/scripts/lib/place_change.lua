-- Changing the place of a job that waits, when its priority, its group, its limits or the time when it is due have changed.

-- Tell whether a job is to run after another one, and has no place yet.
-- prefix, id  of the job
-- after    the job that it was put behind; nil: it never was
-- returns  true or false
local function follows(prefix, id, after)
  return after ~= nil and redis.call('HGET', prefix .. 'reruns', after) == id
end

-- Remove a job from the list of a group. Its ticket leaves with the last one.
-- queue    as begin_groups makes it
-- id, before  the job, and its marks
-- group    its name
-- returns  nothing
local function leave_group(queue, id, before, group)
  local key, member = list_of(queue, before.priority, group), before.priority .. group
  local first = redis.pcall('LINDEX', key, 0) == id
  if redis.pcall('LREM', key, 1, id) ~= 1 then return end
  queue.counters.waiting = queue.counters.waiting - 1
  if redis.call('EXISTS', key) == 0 then
    local limit = redis.call('HGET', queue.prefix .. 'waits', member)
    if limit then
      redis.call('ZREM', queue.prefix .. 'limit:' .. limit, member)
      redis.call('HDEL', queue.prefix .. 'waits', member)
    else
      redis.call('LREM', queue.prefix .. 'ready:' .. before.priority, 1, '\t' .. group)
      redis.call('SREM', queue.prefix .. 'tickets', member)
      redis.call('HDEL', queue.prefix .. 'credits', member)
    end
  end
  if first then
    readmit(queue, member)
    touch(queue, (limits_of(before, group)))
  end
end

-- Remove a job from its ready list: that of its priority, one above it (lib/ageing.lua), or the group of its paused task.
-- queue, id, before  as for leave_group
-- envelope as it was stored
-- returns  nothing
local function leave_ready(queue, id, before, envelope)
  for list = before.priority, 9 do
    if redis.call('LREM', queue.prefix .. 'ready:' .. list, 1, id) > 0 then return end
  end
  local task = task_of(envelope)
  if task then leave_group(queue, id, before, 'p' .. task) end
end

-- Move a job that waits to where it belongs by now. Its new envelope is stored. Keys were checked and rights proven, LREM and SREM too.
-- queue    as begin_groups makes it; the caller passes on what was touched
-- id, envelope  of the job: as it was stored before
-- priority, group  of the new envelope; nil: it has no group
-- instant  when it is due by now (ms); nil: as before
-- now      ms
-- returns  true when a worker may have to be woken
local function change_place(queue, id, envelope, priority, group, instant, now)
  local before = marks(envelope) or {priority = 0}
  if follows(queue.prefix, id, before.after) then return false end
  local group_before, later, takeable = group_of(before), instant ~= nil and instant > now, false
  local moves = priority ~= before.priority or group ~= group_before
  if redis.call('ZSCORE', queue.due, id) then
    if later then
      redis.call('ZADD', queue.due, int(instant), id)
      takeable = redis.call('ZRANGE', queue.due, 0, 0)[1] == id
    elseif instant then
      redis.call('ZREM', queue.due, id)
    end
    if group ~= group_before then give_back(queue, {id}) end
    moves = instant ~= nil and not later
  elseif later or moves then
    if group_before then leave_group(queue, id, before, group_before) else leave_ready(queue, id, before, envelope) end
    if later then redis.call('ZADD', queue.due, int(instant), id) end
    moves = not later
  elseif group and redis.pcall('LINDEX', list_of(queue, priority, group), 0) == id then
    readmit(queue, priority .. group) -- its limits, or their costs, may be others
    touch(queue, (limits_of(before, group)))
  end
  if moves and group then rejoin(queue, {{id, priority, group}}, now)
  elseif moves then redis.call('RPUSH', queue.prefix .. 'ready:' .. priority, id) end
  if group_before or group then redis.call('HINCRBY', queue.conf, 'waiting', 0) end -- the field tells a turn that there are groups
  return moves or takeable
end
