-- Parts of audit.lua: schedules, what running jobs tell, and those that watch.

-- Prove that each schedule that goes on has its alarm, in time, and that no other has one.
-- prefix   of the queue's keys
-- alarms   names of the schedules whose alarms stand in due, as keys, with their instants (ms)
-- now      ms
-- problem  a function that gets what is wrong, and where
-- returns  nothing
local function audit_schedules(prefix, alarms, now, problem)
  for _, name in ipairs(redis.call('SMEMBERS', prefix .. 'schedules')) do
    local one = redis.call('HMGET', prefix .. 'schedule:' .. name, 'digest', 'next', 'paused')
    local instant = one[3] ~= '1' and tonumber(one[2] or '')
    local alarm = alarms[name]
    alarms[name] = nil
    if not one[1] then problem('listed schedule that is gone', name)
    elseif instant and not alarm then problem('schedule without an alarm', name)
    elseif alarm and not instant then problem('alarm of a schedule that stands still', name)
    -- A worker that does not know the task puts it off by 30 s.
    elseif alarm and alarm > math.max(instant, now + 30000) then problem('alarm behind the instant of its schedule', name) end
  end
  for name in pairs(alarms) do problem('alarm of no schedule', name) end
end

-- Prove that the record of a job's attempts can be read, with one progress and one set of notes at most.
-- id       of the job
-- state    its field of state
-- problem  as for audit_schedules
-- returns  nothing
local function audit_record(id, state, problem)
  local head, errors = string.match(state, '^([^\n]*)(.*)$')
  local seen, rest = {}, string.match(head, '^%d+ %d+ %d+[^\t]*(.*)$')
  rest = rest and string.gsub(rest, '\t(%a)({[^\t]*}) ?', function(letter)
    if letter ~= 'h' and seen[letter] then problem('told twice in its record: ' .. letter, id) end
    seen[letter] = true
    return ''
  end)
  if rest ~= '' or string.find(errors, '\n[^{]') or string.find(errors, '\n$') then problem('record that cannot be read', id) end
end

-- Prove that a key that one job has beside its place goes by itself.
-- key      stream:<id> or logs:<id>, with the prefix
-- name     the same without it
-- problem  as for audit_schedules
-- returns  nothing
local function audit_life(key, name, problem)
  if redis.call('PTTL', key) == -1 then problem('no time to live', name) end
end

-- Prove that nobody waits for a job that has ended.
-- prefix   of the queue's keys
-- problem  as for audit_schedules
-- returns  nothing
local function audit_watchers(prefix, problem)
  for _, id in ipairs(redis.call('HKEYS', prefix .. 'waiters')) do
    local ended = redis.call('ZSCORE', prefix .. 'dead', id)
      or redis.call('HEXISTS', prefix .. 'jobs', id) == 0 and redis.call('EXISTS', prefix .. 'result:' .. id) == 1
    if ended then problem('somebody waits for it, and it has ended', id) end
  end
end
