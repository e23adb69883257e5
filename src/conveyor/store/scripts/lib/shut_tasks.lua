-- Tasks of which no job may start. lib/paused_tasks.lua says how they stand in conf.

-- Read the names of paused tasks.
-- text     field paused_tasks of conf, false when there is none
-- returns  name → true when it is paused, false when it was resumed or is held; nil when there is none
local function read_paused(text)
  if not text then return nil end
  local tasks = {}
  for name, mark in string.gmatch(text, '([^\t\n]+)(\t?)') do tasks[name] = mark == '' end
  return tasks
end

-- Tell whether no job of a task may start.
-- prefix   of the queue's keys
-- tasks    as read_paused returns them
-- task     its name, nil of a message
-- returns  true or false
local function is_shut(prefix, tasks, task)
  if not task or tasks[task] == nil then return false end
  return tasks[task] or tonumber(redis.call('HGET', prefix .. 'limits', '\t;' .. task) or 0) > clock()
end
