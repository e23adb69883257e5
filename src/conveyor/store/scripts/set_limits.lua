-- Change what operators have set of limits and groups, or pause a task. What waits for it goes on.
-- needs: numbers keys tokens envelope rights limits shut_tasks paused_tasks group_limits groups declared
--
-- KEYS  1 conf  2 jobs  3 due  4 wake  5 none
-- ARGV  1 "set"  2 the limit concerned: <name> for all its keys too, <name>:<key>, or :<key> of a group  3… (field value)…, "" removes
--       1 "reset"  2 name, "" all  3 key, "" the limit and all its keys
--       1 "task"  2 name  3 "1" it is paused, "" it goes on: then those of its jobs that waited come before others, in their order
-- returns the number of fields that were there and are removed; of a task 1, or 0 when that was so already
local queue, now = {prefix = string.sub(KEYS[2], 1, -5), jobs = KEYS[2], due = KEYS[3], conf = KEYS[1]}, clock()
begin_groups(queue)

local function pause_task(task, pauses)
  queue.tasks = read_paused(redis.call('HGET', queue.conf, 'paused_tasks')) or {}
  if (queue.tasks[task] or false) == pauses then return 0 end
  redis.call('HDEL', queue.conf, '\t')
  prove_groups(KEYS[5])
  queue.tasks[task] = pauses
  write_paused(queue)
  if not pauses then
    touch(queue, {';' .. task})
    pass_on(queue, now, 1000)
    write_counters(queue)
    forget_resumed(queue)
    wake(KEYS[4])
  end
  return 1
end
if ARGV[1] == 'task' then return pause_task(ARGV[2], ARGV[3] == '1') end

local name, values, gone, limit = ARGV[2], {}, {}, ARGV[2]
if ARGV[1] == 'set' then
  for i = 3, #ARGV, 2 do
    if ARGV[i + 1] == '' then gone[#gone + 1] = ARGV[i] else values[#values + 1], values[#values + 2] = ARGV[i], ARGV[i + 1] end
  end
elseif name ~= '' and ARGV[3] ~= '' then
  limit = name .. ':' .. ARGV[3]
  gone[1] = 'override:' .. limit
else
  local own, keyed = 'override:' .. name, 'override:' .. (name == '' and '' or name .. ':')
  for _, field in ipairs(redis.call('HKEYS', KEYS[1])) do
    if field == own or string.sub(field, 1, #keyed) == keyed then gone[#gone + 1] = field end
  end
end
redis.call('HDEL', KEYS[1], '\t')
prove_groups(KEYS[5])
prove(KEYS[5], 'HSCAN')
local removed = 0
for first = 1, #gone, 7000 do
  removed = removed + redis.call('HDEL', KEYS[1], unpack(gone, first, math.min(first + 6999, #gone)))
end
if #values > 0 then redis.call('HSET', KEYS[1], unpack(values)) end
touch_changed(queue, function(one)
  return limit == '' or one == limit or string.match(one, '^[^:]*') == limit
end, now)
wake(KEYS[4])
return removed
