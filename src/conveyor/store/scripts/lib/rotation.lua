-- Leasing from ready lists that have tickets: round robin between groups and plain jobs. One round reads the head of a list,
-- decides about each entry in order without a write, and then writes all of it, so that a job is held before the next round.
-- Only jobs of groups that surely have room leave their lists before (take_singles).

-- Tell whether the first job of a group with a key has a limit by this key, which may let more than one run at a time.
-- queue, priority  as for read_groups
-- one      {group, limit (of its key)}
-- returns  true or false
local function may_be_open(queue, priority, one)
  local found = marks(first_envelope(queue, priority, one.group))
  for _, limit in ipairs(found and found.limits or {}) do
    if string.sub(limit, -#one.limit) == one.limit then return true end
  end
  return false
end

-- Pop the first jobs of groups that run one at a time and run none, where each ticket stands for one job at most. Among many groups
-- most are such, and each costs one command: its job leaves the list before it is looked at. One that needs more than its turn
-- comes back, and its group is read like the others.
-- queue, entries  as for read_groups, for a list of priority 0
-- names    by the position of its ticket the limit of a group's key
-- keyed    by the position of its ticket the key of a group that has one; false of another
-- returns  by the position of the ticket the id of its job; its envelope; true when no other job waits in the group
local function take_singles(queue, entries, names, keyed)
  local found, envelopes, last, places, keys, ids, count, byte, find = {}, {}, {}, {}, {}, {}, 0, string.byte, string.find
  local lead, limits, unused, taken, pcall, type = list_of(queue, 0, 'g'), queue.limits, queue.unused, queue.taken, redis.pcall, type
  -- A job that has a group and no more: its first line is the ticket.
  local function is_single(envelope, entry)
    return envelope and byte(envelope, #entry + 1) == 10 and find(envelope, entry, 1, true) == 1
  end
  -- Find the groups that are empty by now, with few commands where most are, or most are not.
  local function find_empty(from, to)
    local there, middle = redis.call('EXISTS', unpack(keys, from, to)), math.floor((from + to) / 2)
    if there == 0 then
      for at = from, to do last[places[at]] = true end
    elseif there <= to - from then
      find_empty(from, middle)
      find_empty(middle + 1, to)
    end
  end
  for i, entry in ipairs(entries) do
    local key, name = keyed[i], names[i]
    if key and limits[name] == unused then
      if count == 0 and not is_single(first_envelope(queue, 0, 'g' .. key), entry) then return found end
      key = lead .. key
      local id = pcall('LPOP', key)
      if type(id) == 'string' then
        count = count + 1
        ids[count], keys[count], places[count], limits[name] = id, key, i, taken
      end
    end
  end
  if count == 0 then return found end
  for at, envelope in ipairs(read_fields(queue.jobs, ids)) do
    local i = places[at]
    if is_single(envelope, entries[i]) then found[i], envelopes[i] = ids[at], envelope
    else
      redis.call('LPUSH', keys[at], ids[at])
      limits[names[i]] = unused
    end
  end
  find_empty(1, count)
  return found, envelopes, last
end

-- Read what a round needs of its tickets' groups.
-- queue    as begin_groups makes it, and ready; series: how many jobs of a group that runs one at a time may be leased together;
--          own: by the limit of its key how many jobs of a group the worker holds, which others may follow
-- priority of the list
-- entries  the head of the list
-- room     how many jobs the round may lease
-- whole    true when the list has no other entries: then its groups share what room there is
-- now      ms
-- returns  for each entry nil of a plain job, or {group, limit (of its key), most (jobs it may lease), ids (those, and one more),
--          series (how many of them may be leased together though they run one after the other), own (true when they follow
--          those that the worker holds)}; the limits of the groups' keys; and what take_singles returns, whose groups are left out
local function read_groups(queue, priority, entries, room, whole, now)
  local groups, names, keyed, keys, tickets, plain, byte, sub = {}, {}, {}, {}, 0, 0, string.byte, string.sub
  for i, entry in ipairs(entries) do
    local first, kind = byte(entry, 1, 2)
    if first == 9 then
      local key = kind == 103 and sub(entry, 3)
      local name = key and ':' .. key or key_limit(sub(entry, 2))
      tickets = tickets + 1
      keyed[i], names[i], keys[tickets] = key, name, name
    else
      plain = plain + 1
    end
  end
  load_limits(queue, keys)
  local shares, members, owners, credits = 0, {}, {}, {}
  for i, name in pairs(names) do
    local weight = queue.limits[name].weight
    shares = shares + weight
    if weight > 1 then members[#members + 1], owners[#owners + 1] = priority .. string.sub(entries[i], 2), i end
  end
  -- A turn that asked for less than a weight has left the rest of it, and the ticket in front.
  for at, rest in ipairs(read_fields(queue.prefix .. 'credits', members)) do credits[owners[at]] = tonumber(rest or nil) end
  local lead = list_of(queue, priority, '')
  local rounds = whole and math.max(1, math.floor((room - plain) / shares)) or 1
  local singles, envelopes, last = {}, nil, nil
  if rounds == 1 and tickets > 2 and priority == 0 and not (members[1] or queue.tasks) then
    singles, envelopes, last = take_singles(queue, entries, names, keyed)
  end
  for i, name in pairs(names) do
    if not singles[i] then
      local s, group = queue.limits[name], string.sub(entries[i], 2)
      local one = {group = group, limit = name, share = 1, most = 1, first = 0, ids = false, credit = credits[i], series = 1}
      local closed = string.byte(group) == 103
      groups[i] = one
      -- Of a group that runs one at a time, and runs, the first job is enough: it tells which other limits are left unused.
      -- The rest is what the group has left of its turn in the first round.
      one.share = (one.credit or s.weight) + s.weight * (rounds - 1)
      one.most = math.min(one.share, room)
      if closed and (s.count > 0 or (rounds > 1 and not may_be_open(queue, priority, one))) then
        -- Several only where every group and plain job of the list has its turn too, and room is left.
        -- All that hold the key are the worker's own: what comes now starts behind them.
        one.own = rounds > 1 and s.count > 0 and s.count == queue.own[name] and not s.paused and s.held <= now
        one.series = s.count > 0 and not one.own and 1 or math.min(one.most, queue.series or 1)
        one.most = one.series
      end
      -- A list of another type is set aside as an empty one: its ticket goes, and the jobs that it had are found by a repair.
      one.ids = redis.pcall('LRANGE', lead .. group, '0', one.most == 1 and '1' or one.most)
      if one.ids.err then one.ids = {} end
    end
  end
  return groups, names, singles, envelopes, last
end

-- Read what is said of a job that cannot be leased as it is, or is in a group.
-- queue, now  as for read_groups
-- one      its group
-- envelope as it is stored; false when there is none
-- names    its limits are added to this list
-- returns  {fate, marks, limits' names, their costs}
local function read_fact(queue, one, envelope, names, now)
  local fate, found = fate_of(envelope, now)
  local limits, costs = limits_of_job(queue, found, one.group, envelope)
  for at = 2, #limits do names[#names + 1] = limits[at] end
  return {fate, found, limits, costs}
end

-- Read the envelopes of a round, and the limits of its jobs.
-- queue, entries, now  as for read_groups
-- groups, singles  as it returns them; each of groups gets first: where its ids stand before the first
-- returns  ids, those of plain jobs and those that groups may lease, in order; their envelopes; of those that are in a group
--          or cannot be leased {fate, marks, limits' names, their costs}, the same for jobs with the same first line
local function read_jobs(queue, entries, groups, singles, now)
  local ids, count, facts, names = {}, 0, {}, {}
  for i, entry in ipairs(entries) do
    local one = groups[i]
    if one then
      one.first = count
      for at = 1, math.min(#one.ids, one.most) do
        count = count + 1
        ids[count] = one.ids[at]
      end
    elseif not singles[i] then
      count = count + 1
      ids[count] = entry
    end
  end
  local envelopes = read_fields(queue.jobs, ids)
  local at = 0
  for i, entry in ipairs(entries) do
    local one, envelope = groups[i], nil
    if one then
      local lines, last, fact = {}, at + math.min(#one.ids, one.most), nil
      -- The first line of a job that has this group and no more.
      local own = entry .. '\n'
      local line = own
      while at < last do
        at = at + 1
        envelope = envelopes[at]
        if not envelope or queue.tasks then
          facts[at] = read_fact(queue, one, envelope, names, now)
        else
          if string.sub(envelope, 1, #line) ~= line then
            line = string.match(envelope, '^[^\n]*\n') or envelope
            fact = lines[line]
          end
          if not fact then
            local closed = line == own and string.byte(one.group) == 103
            fact = closed and {nil, nil, {one.limit}, {1}} or read_fact(queue, one, envelope, names, now)
            lines[line] = fact
          end
          facts[at] = fact
        end
      end
    elseif not singles[i] then
      at = at + 1
      envelope = envelopes[at]
      if not envelope or string.byte(envelope) ~= 10 then facts[at] = {fate_of(envelope, now)} end
      local task = queue.tasks and task_of(envelope)
      if task and queue.tasks[task] ~= nil then
        facts[at] = facts[at] or {}
        facts[at].task, names[#names + 1] = task, ';' .. task
      end
    end
  end
  load_limits(queue, names)
  return ids, envelopes, facts
end

-- Lease jobs.
-- queue    starts is set when one has a unique key, which may end when it starts
-- plan     fields ids, envelopes and count are filled
-- ids, envelopes, first, count  the jobs are those behind the first ones
-- fact     as read_jobs returns it, nil of a plain job
-- returns  nothing
local function lease_next(queue, plan, ids, envelopes, first, count, fact)
  local taken = plan.count
  if fact and fact[2] and fact[2].keys then queue.starts = true end
  for at = 1, count do plan.ids[taken + at], plan.envelopes[taken + at] = ids[first + at], envelopes[first + at] end
  plan.count = taken + count
end

-- Let jobs with the same limits pass them. Nothing is written here.
-- queue    as for read_groups
-- fact     as read_jobs returns it
-- closed   as full_limit returns it
-- plan     fields slots, changed and passed are filled
-- ids, first, count  the jobs are those behind the first ones
-- returns  nothing
local function pass(queue, fact, closed, plan, ids, first, count)
  local names, costs, held = fact[3], fact[4], {}
  for i, name in ipairs(names) do
    local s = queue.limits[name]
    if s.kind == 'c' or (s.kind == 'k' and closed) then
      s, held[#held + 1] = own_state(queue, name), name
      s.count = s.count + count
      plan.changed[name] = s
    elseif s.kind == 'r' then
      local cost, so_far = math.min(costs[i], s.n) * count, plan.passed[name] or {0, 0}
      s.free = s.free - cost
      plan.passed[name] = {so_far[1] + count, so_far[2] + cost}
    end
  end
  if #held > 0 then
    local slots, text, size = plan.slots, held[2] and table.concat(held, '\t') or held[1], #plan.slots
    for at = 1, count do slots[size + 2 * at - 1], slots[size + 2 * at] = ids[first + at], text end
  end
  touch(queue, names)
end

-- Decide what becomes of a ticket and of the first jobs of its group. Nothing is written here.
-- queue, now  as for read_groups
-- one      the group, as read_groups returns it
-- ids, envelopes, facts  as read_jobs returns them
-- room     how many jobs the round may lease
-- plan     is filled
-- returns  nothing
local function plan_group(queue, one, ids, envelopes, facts, room, plan, now)
  local before, removed, full, last, alone = plan.count, 0, nil, math.min(#one.ids, one.most), one.own
  while removed < last do
    local first = one.first + removed
    local fact = facts[first + 1]
    if fact[1] then
      plan.dropped[#plan.dropped + 1] = {ids[first + 1], fact}
      touch(queue, fact[3])
      removed = removed + 1
    else
      if plan.count >= room then break end
      local name, closed, most
      if alone and #fact[3] == 1 then
        closed, queue.has_series = true, true
      else
        name, closed, most = full_limit(queue, one.group, fact, now)
      end
      if name then
        full = name
        touch(queue, fact[3])
        break
      end
      -- A series: jobs that no other limit holds, one after the other, until the last of them has left its worker.
      alone = closed and (one.own or one.series > 1) and #fact[3] == 1
      if alone then most = last end
      local count = 1
      most = math.min(most, room - plan.count, last - removed)
      while count < most and facts[first + count + 1] == fact do count = count + 1 end
      if alone and count > 1 then queue.has_series = true end
      pass(queue, fact, closed, plan, ids, first, count)
      lease_next(queue, plan, ids, envelopes, first, count, fact)
      removed = removed + count
    end
  end
  local leased = plan.count - before
  plan.removed[#plan.removed + 1] = {one.group, removed}
  if full then plan.waiting[#plan.waiting + 1] = {one.group, full}
  elseif #one.ids == removed and removed <= one.most then plan.ended[#plan.ended + 1] = one.group
  -- Jobs of a task that was paused go before others: their ticket stays in front.
  elseif string.byte(one.group) == 112 then plan.front[#plan.front + 1] = '\t' .. one.group
  elseif leased == 0 or (one.share - leased) % queue.limits[one.limit].weight > 0 then
    plan.front[#plan.front + 1] = '\t' .. one.group
    if leased > 0 then
      plan.credits[#plan.credits + 1] = {one.group, (one.share - leased) % queue.limits[one.limit].weight}
    end
    return
  else plan.tail[#plan.tail + 1] = '\t' .. one.group end
  if one.credit then plan.credits[#plan.credits + 1] = {one.group} end
end

-- Move tickets to the limits at which they wait.
-- queue    as for read_groups
-- priority of the list
-- waiting  {group, limit}…
-- returns  nothing
local function park(queue, priority, waiting)
  local last, members, waits = redis.call('HINCRBY', queue.conf, 'waits', #waiting), {}, {}
  for i, one in ipairs(waiting) do
    local member = priority .. one[1]
    members[i], waits[2 * i - 1], waits[2 * i] = member, member, one[2]
    -- A higher priority comes first, and else who waits longer.
    local place = (9 - priority) * 2 ^ 45 + last - #waiting + i
    local limit = queue.prefix .. 'limit:' .. one[2]
    -- Of another type: the tickets in it were lost.
    if type(redis.pcall('ZADD', limit, int(place), member)) ~= 'number' then
      redis.call('DEL', limit)
      redis.call('ZADD', limit, int(place), member)
    end
  end
  redis.call('SREM', queue.prefix .. 'tickets', unpack(members))
  redis.call('HDEL', queue.prefix .. 'credits', unpack(members))
  redis.call('HSET', queue.prefix .. 'waits', unpack(waits))
end

-- Have jobs of paused tasks wait, behind those that wait already.
-- queue, priority  as for read_groups
-- aside    {task, id}… in their order
-- returns  nothing
local function set_aside(queue, priority, aside)
  local tasks, ids = {}, {}
  for _, one in ipairs(aside) do
    local task = one[1]
    if not ids[task] then tasks[#tasks + 1], ids[task] = task, {} end
    ids[task][#ids[task] + 1] = one[2]
  end
  for _, task in ipairs(tasks) do
    local key, count = list_of(queue, priority, 'p' .. task), #ids[task]
    in_chunks('RPUSH', key, ids[task], 1, count)
    queue.counters.waiting = queue.counters.waiting + count
    if redis.call('LLEN', key) == count then park(queue, priority, {{'p' .. task, ';' .. task}}) end
  end
end

-- Write what a round has decided, apart from the jobs that are held.
-- queue, priority, now  as for read_groups
-- plan     what plan_group has filled, and used: how many entries were decided about
-- missing  ids without an envelope are added to this list
-- returns  nothing
local function write_round(queue, priority, plan, now, missing)
  local ready, prefix = KEYS[queue.ready + priority], queue.prefix
  redis.call('LTRIM', ready, plan.used, -1)
  local lead, left = list_of(queue, priority, ''), plan.singles
  for _, one in ipairs(plan.removed) do
    local key, count = lead .. one[1], one[2]
    if count == 1 then redis.call('LPOP', key) elseif count > 1 then redis.call('LTRIM', key, count, -1) end
    left = left + count
  end
  queue.counters.waiting = queue.counters.waiting - left
  if #plan.tail > 0 then redis.call('RPUSH', ready, unpack(plan.tail)) end
  for i = #plan.front, 1, -1 do redis.call('LPUSH', ready, plan.front[i]) end
  for _, one in ipairs(plan.credits) do
    if one[2] then redis.call('HSET', prefix .. 'credits', priority .. one[1], int(one[2]))
    else redis.call('HDEL', prefix .. 'credits', priority .. one[1]) end
  end
  if #plan.ended > 0 then
    local digit = int(priority)
    for i, group in ipairs(plan.ended) do plan.ended[i] = digit .. group end
    redis.call('SREM', prefix .. 'tickets', unpack(plan.ended))
    -- Its weight may be 1 by now, and then nothing else looks for a rest.
    redis.call('HDEL', prefix .. 'credits', unpack(plan.ended))
  end
  if #plan.slots > 0 then
    widen(plan.slots, '\t')
    redis.call('HSET', prefix .. 'slots', unpack(plan.slots))
  end
  local counts = plan.counts
  for name, s in pairs(plan.changed) do counts[#counts + 1], counts[#counts + 2] = name, s.count end
  if #counts > 0 then
    widen(counts, ' ')
    in_chunks('HSET', prefix .. 'limits', counts, 1, #counts)
  end
  for name, passed in pairs(plan.passed) do write_rate(queue, queue.limits[name], passed, now) end
  if #plan.waiting > 0 then park(queue, priority, plan.waiting) end
  if #plan.aside > 0 then set_aside(queue, priority, plan.aside) end
  for _, one in ipairs(plan.dropped) do
    local id, fact = one[1], one[2]
    if fact[1] == 'stub' and fact[3] and string.byte(fact[3][1]) ~= 59 then queue.counters.waiting_stubs = queue.counters.waiting_stubs - 1 end
    discard(queue, id, fact[1], fact[2], now, missing)
  end
end

-- Make one round.
-- queue, priority, room, now  as for read_groups
-- most     how many tickets it may decide about
-- hold_all function(ids, envelopes, count) holds what is leased
-- missing  as for write_round
-- returns  true when the list may have more, the number of entries decided about
local function make_round(queue, priority, room, most, hold_all, now, missing)
  -- Where a task is paused, more entries than are wanted may have to be passed over.
  local count = math.min(queue.tasks and math.max(room, 200) or room, most)
  local entries = redis.call('LRANGE', KEYS[queue.ready + priority], 0, count)
  local whole = #entries <= count
  if not whole then entries[count + 1] = nil end
  if #entries == 0 then return false, 0 end
  local groups, names, singles, texts, last = read_groups(queue, priority, entries, room, whole, now)
  local ids, envelopes, facts = read_jobs(queue, entries, groups, singles, now)
  local plan = {
    used = 0, ids = {}, envelopes = {}, count = 0, dropped = {}, slots = {}, counts = {}, singles = 0, changed = {}, passed = {},
    removed = {}, waiting = {}, ended = {}, tail = {}, front = {}, credits = {}, aside = {},
  }
  local at, size, taken, taken_envelopes, slots, counts = 0, 0, plan.ids, plan.envelopes, {}, plan.counts
  for i, entry in ipairs(entries) do
    if plan.count >= room then break end
    local one, fact = groups[i], facts[at + 1]
    if singles[i] then
      -- Nobody waits for room in the limit of its key, which was free and is full now.
      local id, limit, count = singles[i], names[i], plan.count + 1
      taken[count], taken_envelopes[count], plan.count = id, texts[i], count
      slots[size + 1], slots[size + 2], counts[size + 1], counts[size + 2] = id, limit, limit, '1'
      size = size + 2
      if last[i] then plan.ended[#plan.ended + 1] = string.sub(entry, 2) else plan.tail[#plan.tail + 1] = entry end
    elseif one then
      plan_group(queue, one, ids, envelopes, facts, room, plan, now)
      at = at + math.min(#one.ids, one.most)
    else
      if fact and fact[1] then
        plan.dropped[#plan.dropped + 1] = {entry, fact}
      elseif fact and fact.task and room_of(queue, queue.limits[';' .. fact.task], now) < 1 then
        plan.aside[#plan.aside + 1] = {fact.task, entry}
      else
        lease_next(queue, plan, ids, envelopes, at, 1, fact)
      end
      at = at + 1
    end
    plan.used = i
  end
  if size > 0 then
    for i, text in ipairs(plan.slots) do slots[size + i] = text end
    plan.slots, plan.singles = slots, size / 2
  end
  if plan.count > 0 then hold_all(plan.ids, plan.envelopes, plan.count) end
  write_round(queue, priority, plan, now, missing)
  pass_on(queue, now, room - plan.count)
  return plan.used < #entries or not whole or #plan.tail > 0 or #plan.front > 0 or queue.moved ~= nil, plan.used
end

-- Lease jobs from ready lists that may have tickets, by priority.
-- queue    as for read_groups
-- leased, number  key leased:<worker>, and the number of the turn
-- want     how many at most
-- urgent   true when a list of a priority above 0 may have entries
-- now, missing  as for write_round
-- returns  ids, their envelopes, their number, true when it has stopped though there may be more
local function take_rotating(queue, leased, number, want, urgent, now, missing)
  local ids, envelopes, taken, decided, priority = {}, {}, 0, 0, urgent and 9 or 0
  local function hold_found(found, texts, count)
    if taken == 0 then ids, envelopes = found, texts end
    for i = 1, taken > 0 and count or 0 do ids[taken + i], envelopes[taken + i] = found[i], texts[i] end
    hold(leased, number, found, count, taken)
    taken = taken + count
  end
  -- A step takes a few milliseconds at most: tickets that all must wait are left to the next.
  local most = 2 * want + 100
  while priority >= 0 and taken < want and decided < most do
    queue.moved = nil
    local more, used = make_round(queue, priority, want - taken, most - decided, hold_found, now, missing)
    decided = decided + used
    if queue.moved and queue.moved > priority then priority = queue.moved elseif not more then priority = priority - 1 end
  end
  return ids, envelopes, taken, decided >= most
end
