-- Paused tasks. Field paused_tasks of conf has a line for each: its name while it is paused, and its name and a tab when it was resumed,
-- or is held for a time, and some of its jobs may still wait. Such a task is a limit of its jobs, ;<task>. A job that is in no
-- group waits in group p<task> of its priority, whose ticket goes to the front of its ready list when the limit opens, and
-- stays there until the group is empty. Cancelled jobs in such a group count as stubs in ready: it is not known where they stand.

-- Write the names of paused tasks. With one of them a turn leases the way of groups, also in a queue that never had any.
-- queue    fields conf and tasks are used
-- returns  nothing
local function write_paused(queue)
  local lines = {}
  for name, paused in pairs(queue.tasks) do lines[#lines + 1] = name .. (paused and '' or '\t') end
  table.sort(lines)
  if lines[1] then redis.call('HSET', queue.conf, 'paused_tasks', table.concat(lines, '\n'))
  else redis.call('HDEL', queue.conf, 'paused_tasks') end
  if lines[1] then redis.call('HINCRBY', queue.conf, 'waiting', 0) end
end

-- Name the group in which a job waits that is in none of its own, because its task is paused and others of it wait.
-- queue    fields prefix and tasks are used
-- priority, envelope  of the job
-- returns  nil: it need not wait behind others
local function paused_group(queue, priority, envelope)
  local task = queue.tasks and task_of(envelope)
  local group = task and queue.tasks[task] and 'p' .. task
  return group and redis.call('EXISTS', queue.prefix .. 'group:' .. priority .. ':' .. group) == 1 and group or nil
end

-- Tell whether jobs of a task wait because it was paused or held.
-- prefix   of the queue's keys
-- task     its name
-- returns  true or false
local function has_paused(prefix, task)
  local keys = {prefix .. 'limit:;' .. task}
  for priority = 0, 9 do keys[#keys + 1] = prefix .. 'group:' .. priority .. ':p' .. task end
  return redis.call('EXISTS', unpack(keys)) > 0 or redis.call('HEXISTS', prefix .. 'limits', '\t;' .. task) == 1
end

-- Forget the tasks that are not paused any more, and of which no job waits.
-- queue    as for write_paused, and prefix
-- returns  nothing
local function forget_resumed(queue)
  local changed = false
  for name, paused in pairs(queue.tasks) do
    if not paused and not has_paused(queue.prefix, name) then
      queue.tasks[name] = nil
      changed = true
    end
  end
  if changed then write_paused(queue) end
end
