-- Prove that every live id is in exactly one place, every group has exactly one ticket, every slot a holder, no ticket waits at a
-- limit that has room, every unique key belongs to a live job, every schedule has its alarm, and nobody waits for what has ended.
-- This reads the whole queue in one step: for tests and quiet hours.
-- needs: numbers keys leased envelope rights limits shut_tasks group_limits groups room live_audit
--
-- KEYS  1 jobs  2 state  3 due  4 dead  5 workers  6 conf  7-16 ready:0 … ready:9
-- ARGV  1 refuse above this many jobs  2… tags that have a key, behind a tab unique keys that are held and do not expire, and behind
--       two tabs keys stream:<id> and logs:<id>: no other way finds those of jobs that are gone
-- returns (problem, id)…    or {"too-large", count}
local count = redis.call('HLEN', KEYS[1])
if count > tonumber(ARGV[1]) then return {'too-large', int(count)} end
local prefix, places, problems, stubs, tagged = string.sub(KEYS[1], 1, -5), {}, {}, 0, {}
local queue, now = {prefix = prefix, jobs = KEYS[1], due = KEYS[3], conf = KEYS[6]}, clock()
begin_groups(queue)
queue.tasks = read_paused(redis.call('HGET', KEYS[6], 'paused_tasks'))
local function problem(what, id)
  problems[#problems + 1], problems[#problems + 2] = what, id
end
local function place(id, where)
  if places[id] then problem('in ' .. places[id] .. ' and ' .. where, id) end
  places[id] = where
end
local conf = redis.call('HMGET', KEYS[6], 'stubs', 'waiting', 'waiting_stubs', 'alarms')

-- Tickets in ready lists and at limits, and the jobs of their groups.
local tickets, registered, waits, alarms, waiting, waiting_stubs, schedules = {}, {}, {}, 0, 0, 0, {}
local used = {} -- limits that the first job of a group with a ticket in ready uses
local function first_limits(member, jobs)
  local envelope = jobs[1] and redis.call('HGET', KEYS[1], jobs[1])
  return envelope and (limits_of_job(queue, marks(envelope), string.sub(member, 2), envelope)) or {}
end
local function group(member, ready)
  local jobs = redis.call('LRANGE', prefix .. 'group:' .. string.sub(member, 1, 1) .. ':' .. string.sub(member, 2), 0, -1)
  if tickets[member] then return problem('ticket doubled', member) end
  tickets[member] = true
  if #jobs == 0 then problem('ticket without jobs', member) end
  waiting = waiting + #jobs
  -- Cancelled jobs of a paused task count as if they stood in ready.
  for _, id in ipairs(jobs) do place(id, string.byte(member, 2) == 112 and 'ready' or 'a group') end
  for _, name in ipairs(ready and first_limits(member, jobs) or {}) do used[name] = true end
end
for i = 7, 16 do
  for _, entry in ipairs(redis.call('LRANGE', KEYS[i], 0, -1)) do
    if string.byte(entry) == 9 then group(i - 7 .. string.sub(entry, 2), true) else place(entry, 'ready') end
  end
end
if conf[2] then
  for _, member in ipairs(redis.call('SMEMBERS', prefix .. 'tickets')) do
    registered[member] = true
    if not tickets[member] then problem('its ticket is not in ready', member) end
  end
  for member in pairs(tickets) do
    if not registered[member] then problem('ticket that is not registered', member) end
  end
  for _, member in ipairs(redis.call('HKEYS', prefix .. 'credits')) do
    if not tickets[member] then problem('rest of a weight without a ticket', member) end
  end
  local all = redis.call('HGETALL', prefix .. 'waits')
  for i = 1, #all, 2 do
    local member, name = all[i], all[i + 1]
    group(member, false)
    if not redis.call('ZSCORE', prefix .. 'limit:' .. name, member) then problem('its ticket does not wait', member) end
    if not waits[name] then waits[#waits + 1], waits[name] = name, 0 end
    waits[name] = waits[name] + 1
  end
end
local due = redis.call('ZRANGE', KEYS[3], 0, -1, 'WITHSCORES')
for i = 1, #due, 2 do
  if string.byte(due[i]) == 9 then alarms = alarms + 1 else place(due[i], 'scheduled') end
  if string.sub(due[i], 1, 2) == '\t\t' then schedules[string.sub(due[i], 3)] = tonumber(due[i + 1]) end
end
for _, id in ipairs(redis.call('ZRANGE', KEYS[4], 0, -1)) do place(id, 'dead') end
for _, worker in ipairs(redis.call('ZRANGE', KEYS[5], 0, -1)) do
  for _, id in ipairs(ids_held(prefix .. 'leased:' .. worker)) do place(id, 'leased') end
end

-- Slots: each of a leased job, or the one that a job keeps for its key while it waits for a retry; and their counts.
local function check_slots()
  local slots, held = redis.call('HGETALL', prefix .. 'slots'), {}
  for i = 1, #slots, 2 do
    local where = places[slots[i]]
    for name in string.gmatch(slots[i + 1], '[^\t]+') do
      held[name] = (held[name] or 0) + 1
      if where ~= 'leased' and not (where == 'scheduled' and string.byte(name) == 58) then problem('slot of a job that is not leased', slots[i]) end
    end
  end
  local counts = redis.call('HGETALL', prefix .. 'limits')
  for i = 1, #counts, 2 do
    local name = counts[i]
    if string.byte(name) ~= 9 then
      if tonumber(counts[i + 1]) ~= (held[name] or 0) then problem('wrong count of slots', name) end
      held[name] = nil
    end
  end
  for name in pairs(held) do problem('slots that are not counted', name) end
end

-- Limits at which tickets wait: one with room must have a ticket in ready that uses it, one that time opens an alarm.
local function check_limits()
  load_limits(queue, waits)
  for _, name in ipairs(waits) do
    local members = redis.call('ZRANGE', prefix .. 'limit:' .. name, 0, -1)
    if #members ~= waits[name] then problem('wrong tickets at limit', name) end
    local s = queue.limits[name]
    local cost = members[1] and s.kind == 'r' and math.min(first_cost(queue, members[1], name), s.n) or 1
    local room = members[1] and room_of(queue, s, now, string.byte(members[1], 2) == 103) or 0
    local alarm = redis.call('ZSCORE', KEYS[3], '\t' .. name)
    if room >= cost then
      if not used[name] and not alarm then problem('ticket at a limit with room', name) end
    elseif (s.kind == 'r' or s.held > now) and not alarm and not used[name] then
      problem('tickets at a limit without an alarm', name)
    end
  end
end
if conf[2] then
  check_slots()
  check_limits()
end

local reruns = redis.call('HGETALL', prefix .. 'reruns')
for i = 1, #reruns, 2 do
  place(reruns[i + 1], 'waiting')
  local envelope = redis.call('HGET', KEYS[1], reruns[i])
  if not envelope or string.byte(envelope) == 120 or places[reruns[i]] == 'dead' then problem('waits for a job that is gone', reruns[i + 1]) end
end
local all = redis.call('HGETALL', KEYS[1])
for i = 1, #all, 2 do
  local stub = string.byte(all[i + 1]) == 120
  local where = places[all[i]]
  if stub then stubs = stubs + 1 end
  if stub and where == 'a group' then waiting_stubs = waiting_stubs + 1 end
  if not where then problem('nowhere', all[i]) end
  audit_life(prefix .. 'stream:' .. all[i], 'stream:' .. all[i], problem)
  audit_life(prefix .. 'logs:' .. all[i], 'logs:' .. all[i], problem)
  if stub and where and where ~= 'ready' and where ~= 'a group' then problem('stub outside ready', all[i]) end
  local keyed = marks(all[i + 1])
  for _, key in ipairs(keyed and not stub and keyed.keys or {}) do
    -- One that has expired keeps no other out, and lies there until a lease reaches it.
    if key.life == 'd' and where ~= 'dead' and where ~= 'waiting' and not (keyed.expires and keyed.expires <= clock())
      and redis.call('GET', prefix .. 'unique:k:' .. key.text) ~= all[i] then problem('does not hold its key', all[i]) end
  end
  places[all[i]] = nil
  local found = not stub and marks(all[i + 1])
  for _, tag in ipairs(found and found.tags or {}) do
    tagged[tag] = (tagged[tag] or 0) + 1
    if not redis.call('ZSCORE', prefix .. 'tag:' .. tag, all[i]) then problem('not found by tag ' .. tag, all[i]) end
  end
end
local keys = {}
for i = 2, #ARGV do
  local lived = string.match(ARGV[i], '^\t\t(.*)$')
  if lived then
    if redis.call('HEXISTS', KEYS[1], string.match(lived, ':(.*)$')) == 0 then audit_life(prefix .. lived, lived, problem) end
  elseif string.byte(ARGV[i]) == 9 then keys[#keys + 1] = string.sub(ARGV[i], 2) else tagged[ARGV[i]] = tagged[ARGV[i]] or 0 end
end
for tag, count in pairs(tagged) do
  local listed = redis.call('ZCARD', prefix .. 'tag:' .. tag)
  if listed > count then problem('tag without a live job', tag .. ' ' .. int(listed - count)) end
end
for id, where in pairs(places) do problem('no envelope, but in ' .. where, id) end
local records = redis.call('HGETALL', KEYS[2])
for i = 1, #records, 2 do
  if redis.call('HEXISTS', KEYS[1], records[i]) == 0 then problem('state without a job', records[i]) end
  audit_record(records[i], records[i + 1], problem)
end
audit_schedules(prefix, schedules, now, problem)
audit_watchers(prefix, problem)
if stubs ~= tonumber(conf[1] or 0) then problem('wrong count of stubs', int(stubs)) end
if waiting ~= tonumber(conf[2] or 0) then problem('wrong count of waiting jobs', int(waiting)) end
if waiting_stubs ~= tonumber(conf[3] or 0) then problem('wrong count of waiting stubs', int(waiting_stubs)) end
if alarms ~= tonumber(conf[4] or 0) then problem('wrong count of alarms', int(alarms)) end
audit_line(prefix, problem)
for _, name in ipairs(keys) do
  local id = redis.call('GET', prefix .. 'unique:k:' .. name)
  local envelope = id and redis.call('HGET', KEYS[1], id)
  if id and (not envelope or string.byte(envelope) == 120) then problem('key without a live job', name) end
end
return problems
