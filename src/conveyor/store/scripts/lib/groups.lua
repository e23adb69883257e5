-- Groups: jobs join them, tickets move between ready lists and limits, slots are given back. lib/group_limits.lua says what they are.

-- Note that limits may have room, or that the entry in a ready list that would have used it is not one any more.
-- queue    as begin_groups makes it
-- names    of the limits; the list is not changed any more
-- returns  nothing
local function touch(queue, names)
  local lists = queue.touches
  if lists[#lists] == names then return end
  queue.touched, lists[#lists + 1] = queue.touched + #names, names
end

-- Move tickets that wait at limits to the front of their ready lists, in their order.
-- queue    as begin_groups makes it; moved: the highest priority to which one was moved
-- members  <priority><group>, which were removed from the limits' sets
-- returns  nothing
local function move_to_ready(queue, members)
  local lists = {}
  in_chunks('HDEL', queue.prefix .. 'waits', members, 1, #members)
  in_chunks('SADD', queue.prefix .. 'tickets', members, 1, #members)
  for i = #members, 1, -1 do
    local priority = string.sub(members[i], 1, 1)
    local list = lists[priority] or {}
    lists[priority], list[#list + 1] = list, '\t' .. string.sub(members[i], 2)
  end
  for priority, list in pairs(lists) do
    in_chunks('LPUSH', queue.prefix .. 'ready:' .. priority, list, 1, #list)
    queue.moved = math.max(queue.moved or 0, tonumber(priority))
  end
end

-- Let a group be looked at again whose first job has changed: its ticket may wait at a limit that this job does not have.
-- queue    as begin_groups makes it
-- member   <priority><group>
-- returns  true when its ticket waited
local function readmit(queue, member)
  local limit = redis.call('HGET', queue.prefix .. 'waits', member)
  if not limit then return false end
  redis.pcall('ZREM', queue.prefix .. 'limit:' .. limit, member)
  move_to_ready(queue, {member})
  return true
end

-- Put a job into its group, and make the ticket when it is the only one there. The job in front of which it comes may be what
-- the group's ticket stands in ready for, so its limits are touched.
-- queue     as begin_groups makes it
-- priority  of the job
-- group, id as said
-- front     true: before the others
-- returns   true when there is a new ticket
local function join_group(queue, priority, group, id, front)
  local key = list_of(queue, priority, group)
  local length = redis.call(front and 'LPUSH' or 'RPUSH', key, id)
  queue.counters.waiting = queue.counters.waiting + 1
  if length == 1 then
    redis.call('SADD', queue.prefix .. 'tickets', priority .. group)
    redis.call(front and 'LPUSH' or 'RPUSH', queue.prefix .. 'ready:' .. priority, '\t' .. group)
    return true
  end
  if front and not readmit(queue, priority .. group) then
    local found = marks(redis.call('HGET', queue.jobs, redis.call('LINDEX', key, 1)) or '\n')
    if found then touch(queue, (limits_of(found, group))) end
  end
  return false
end

-- Count what jobs hold, by the texts of their slots: many have the same.
-- ids      of the jobs; one that is there twice counts once
-- texts    field slots of each, false when it holds none
-- keeps    true: the slot of a group's key is left out
-- returns  names of the limits; name → how many slots; text → the slot that is left out, nil when there is none
local function count_slots(ids, texts, keeps)
  local counts, different, count, seen, alone, find = {}, {}, 0, {}, not keeps, string.find
  for i = 1, #ids do
    local text, id = texts[i], ids[i]
    if text and not seen[id] then
      local so_far = counts[text]
      if not so_far then
        local tab = find(text, '\t', 1, true)
        if tab and alone and string.byte(text, tab + 1) == 9 then -- one slot, which is filled up
          text, tab = string.sub(text, 1, tab - 1), nil
          so_far = counts[text]
        end
        if not so_far then
          count = count + 1
          different[count] = text
        end
        alone = alone and not tab
      end
      counts[text], seen[id] = (so_far or 0) + 1, true
    end
  end
  -- One slot each.
  if alone then return different, counts, {} end
  local names, given, kept = {}, {}, {}
  for _, text in ipairs(different) do
    for name in string.gmatch(text, '[^\t]+') do
      if keeps and string.byte(name) == 58 then kept[text] = name
      else
        if not given[name] then names[#names + 1] = name end
        given[name] = (given[name] or 0) + counts[text]
      end
    end
  end
  return names, given, kept
end

-- Give back the slots that jobs hold.
-- queue    as begin_groups makes it
-- ids      of the jobs; those that hold none count too
-- keeps    true: the slot of their group's key stays with them, while they wait for a retry
-- returns  nothing
local function give_back(queue, ids, keeps)
  if #ids == 0 then return end
  local slots, limits = queue.prefix .. 'slots', queue.prefix .. 'limits'
  local texts = read_fields(slots, ids)
  local names, given, stays = count_slots(ids, texts, keeps)
  local gone, kept = {}, {}
  if not keeps and #names > 0 then gone = ids end
  for i = 1, keeps and #ids or 0 do
    local text = texts[i]
    if text and not stays[text] then gone[#gone + 1] = ids[i]
    elseif text and stays[text] ~= text then kept[#kept + 1], kept[#kept + 2] = ids[i], stays[text] end
  end
  if #gone > 0 then in_chunks('HDEL', slots, gone, 1, #gone) end
  if #kept > 0 then in_chunks('HSET', slots, kept, 1, #kept) end
  if #names == 0 then return end
  local counts, changed, empty = read_fields(limits, names), {}, {}
  local states = queue.limits
  local unused = 0
  for i, name in ipairs(names) do
    local left = (counts[i] or 0) - given[name]
    if left > 0 then changed[#changed + 1], changed[#changed + 2] = name, left
    else
      unused = unused + 1
      empty[unused] = name
    end
    if states[name] then own_state(queue, name).count = math.max(left, 0) end
  end
  if #empty > 0 then in_chunks('HDEL', limits, empty, 1, #empty) end
  if #changed > 0 then in_chunks('HSET', limits, changed, 1, #changed) end
  touch(queue, names)
end

-- Put jobs that were scheduled into their groups: in front where they kept their group's slot while they waited for a retry.
-- queue    as begin_groups makes it
-- jobs     {id, priority, group}…
-- now      ms; a job whose group has a key of another type is looked at again in a minute
-- returns  true when one has a priority above 0
local function rejoin(queue, jobs, now)
  local ids, urgent, able = {}, false, {}
  for _, job in ipairs(jobs) do
    if type(redis.pcall('LLEN', list_of(queue, job[2], job[3]))) == 'number' then
      able[#able + 1], ids[#ids + 1] = job, job[1]
    else
      redis.call('ZADD', queue.due, int(now + 60000), job[1])
    end
  end
  local slots = read_fields(queue.prefix .. 'slots', ids)
  give_back(queue, ids)
  for i, job in ipairs(able) do
    join_group(queue, job[2], job[3], job[1], slots[i] ~= false)
    if job[2] > 0 then urgent = true end
  end
  return urgent
end

-- Set the alarm of a limit that time opens. Of two instants the earlier stands: what comes too early sets it again.
-- queue    as begin_groups makes it
-- s        state of the limit
-- cost     that must find room
-- now      ms
-- returns  nothing
local function set_alarm(queue, s, cost, now)
  local at = opens_at(queue, s, cost, now)
  if at then
    queue.counters.alarms = queue.counters.alarms + redis.call('ZADD', queue.due, 'LT', int(math.max(at, now + 1)), '\t' .. s.name)
  end
end

-- Read the envelope of the first job of a group.
-- queue    as begin_groups makes it
-- priority, group  as said
-- returns  that of a plain job when there is none
local function first_envelope(queue, priority, group)
  local id = redis.pcall('LINDEX', list_of(queue, priority, group), 0)
  return type(id) == 'string' and redis.call('HGET', queue.jobs, id) or '\n'
end

-- Read what the first job of a group costs at a limit.
-- queue    as begin_groups makes it
-- member   <priority><group>
-- name     of the limit
-- returns  its cost
local function first_cost(queue, member, name)
  local found = marks(first_envelope(queue, string.sub(member, 1, 1), string.sub(member, 2)))
  for _, limit in ipairs(found and found.limits or {}) do
    local cost, other = string.match(limit, '^(%d+):(.*)$')
    if other == name then return tonumber(cost) end
  end
  return 1
end

-- Pass on what was touched: of each limit with room the first ticket goes to the front of its ready list; a limit that is full
-- and that time opens gets an alarm if a ticket waits there.
-- queue    as begin_groups makes it
-- now      ms
-- most     how many tickets a limit may pass on, when so much has room: those that the next round can lease
-- returns  nothing
local function pass_on(queue, now, most)
  local lists, touched, names, keys, seen, waited = queue.touches, queue.touched, {}, {}, {}, 0
  if touched == 0 then return end
  queue.touched, queue.touches = 0, {}
  -- Where many are asked about, most often nothing waits at all.
  if touched > 8 and redis.call('EXISTS', queue.prefix .. 'waits') == 0 then return end
  for _, list in ipairs(lists) do
    for _, name in ipairs(list) do
      if not seen[name] then
        seen[name], names[#names + 1], keys[#keys + 1] = true, name, queue.prefix .. 'limit:' .. name
      end
    end
  end
  for first = 1, #keys, 7000 do waited = waited + redis.call('EXISTS', unpack(keys, first, math.min(first + 6999, #keys))) end
  if waited == 0 then return end
  local waiting, firsts = {}, {}
  for i, name in ipairs(names) do
    -- Nil also of a key of another type.
    local first = redis.pcall('ZRANGE', keys[i], 0, 0)[1]
    if first then waiting[#waiting + 1], firsts[#firsts + 1] = name, first end
  end
  load_limits(queue, waiting)
  local members = {}
  for i, name in ipairs(waiting) do
    local s = queue.limits[name]
    local room = room_of(queue, s, now, string.byte(firsts[i], 2) == 103)
    local cost = s.kind == 'r' and room < s.n and s.n > 1 and math.min(first_cost(queue, firsts[i], name), s.n) or 1
    if room >= cost then
      local popped = redis.call('ZPOPMIN', queue.prefix .. 'limit:' .. name, int(math.max(1, math.min(room, most))))
      for at = 1, #popped, 2 do members[#members + 1] = popped[at] end
    else
      set_alarm(queue, s, cost, now)
    end
  end
  if #members > 0 then move_to_ready(queue, members) end
end

-- Ring alarms: each limit is touched, and one whose hold is over is free of it.
-- queue    as begin_groups makes it
-- names    of the limits, whose alarms were removed
-- now      ms
-- returns  nothing
local function ring(queue, names, now)
  queue.counters.alarms = queue.counters.alarms - #names
  load_limits(queue, names)
  for _, name in ipairs(names) do
    local s = queue.limits[name]
    if s.held > now then set_alarm(queue, s, 1, now)
    elseif s.held > 0 then redis.call('HDEL', queue.prefix .. 'limits', '\t' .. name) end
  end
  touch(queue, names)
end

-- Hold a limit: nothing passes it until an instant.
-- queue    as begin_groups makes it
-- name     of the limit
-- ends     the instant, ms since the epoch; an earlier one than it has changes nothing
-- now      ms
-- returns  nothing
local function hold_limit(queue, name, ends, now)
  load_limits(queue, {name})
  local s = own_state(queue, name)
  if ends <= s.held then return end
  s.held = ends
  redis.call('HSET', queue.prefix .. 'limits', '\t' .. name, int(ends))
  set_alarm(queue, s, 1, now)
end

-- Write down what the counters in conf have gained.
-- queue    as begin_groups makes it
-- returns  nothing
local function write_counters(queue)
  for name, gained in pairs(queue.counters) do
    if gained ~= 0 then redis.call('HINCRBY', queue.conf, name, int(gained)) end
  end
end

-- Check the types of the keys that all groups and limits of a queue share.
-- prefix   of the queue's keys
-- returns  nothing
local function check_groups(prefix)
  check('HLEN', prefix .. 'slots', prefix .. 'limits', prefix .. 'waits', prefix .. 'credits')
  check('SCARD', prefix .. 'tickets')
end

-- Check types, and prove that this user may do all of this. What was written before it changes nothing.
-- none     the key that never exists
-- returns  nothing
local function prove_groups(none)
  check_groups(string.sub(none, 1, -5))
  prove(none, 'HMGET', 'TYPE', 'HGETALL', 'LRANGE', 'LINDEX', 'HGET', 'EXISTS', 'ZRANGE', 'RPUSH', 'LPUSH', 'SADD', 'HSET', 'HDEL',
    'HINCRBY', 'ZADD', 'ZPOPMIN', 'ZREM', 'GET')
end
