-- Schedules. Each is a hash schedule:<name> beside the queue that its jobs go to: digest, spec and entry (its definition), origin,
-- next (ms: the instant it has reached, "" when none comes any more), paused, last (id of its last job), fired and skipped (counts),
-- skipped:<reason> (the same by reason), runs (its last instants, a line each, the newest first) and declared (ms). Its alarm stands in due, as "\t\t<name>": a turn that
-- meets it hands the name to its worker, which computes the instant behind this one and carries both out in one step. Meanwhile
-- the alarm is put off, so that another worker is asked when this one dies.

-- Set the alarm of a schedule, or take it away.
-- due, conf, wake_list  keys of the queue
-- name     of the schedule
-- instant  ms as text; "" takes it away
-- counted  whether it has one by its definition, even if due has lost it; nil: due says it
-- returns  nothing
local function set_schedule_alarm(due, conf, wake_list, name, instant, counted)
  local member, new = '\t\t' .. name, instant ~= ''
  local changed = new and redis.call('ZADD', due, instant, member) or -redis.call('ZREM', due, member)
  if counted ~= nil then changed = (new and 1 or 0) - (counted and 1 or 0) end
  if changed ~= 0 then redis.call('HINCRBY', conf, 'alarms', changed) end
  if new and redis.call('ZRANGE', due, 0, 0)[1] == member then wake(wake_list) end
end

-- Write down what became of an instant.
-- key      schedule:<name>
-- runs     its field runs as it was read
-- line     instant (ms), now (ms), and what became of it
-- returns  nothing
local function note_run(key, runs, line)
  local lines = {line}
  for one in string.gmatch(runs or '', '[^\n]+') do
    if #lines < 20 then lines[#lines + 1] = one end
  end
  redis.call('HSET', key, 'runs', table.concat(lines, '\n'))
end

-- Write down that instants were skipped.
-- key, runs  as for note_run
-- instant    the first of them, ms
-- now        ms
-- reason     one word
-- count      their number
-- returns    nothing
local function note_skipped(key, runs, instant, now, reason, count)
  redis.call('HINCRBY', key, 'skipped', count)
  redis.call('HINCRBY', key, 'skipped:' .. reason, count)
  note_run(key, runs, int(tonumber(instant)) .. ' ' .. int(now) .. ' ' .. reason .. ' ' .. int(count))
end
