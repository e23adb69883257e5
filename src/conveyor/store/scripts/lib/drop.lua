-- Dropping of what waits longest, for newer jobs (full="drop-oldest"). Leased jobs stay, and so do those in groups and at limits.

-- Find the jobs that are dropped: of the lowest priority first those at the front of its list, then those that are scheduled, the one
-- that is due first before the others. Jobs of a task that was paused have been at the front, and come before that list.
-- Nothing is written.
-- KEYS      as in push.lua
-- count     how many
-- returns   {ids, envelopes, count found, taken: {list, entries at its front}…, aside: {priority, group of a task, entries}…,
--           scheduled: ids, stubs: their number}
local function find_oldest(KEYS, count)
  local jobs, due, prefix = KEYS[2], KEYS[3], string.sub(KEYS[2], 1, -5)
  local drops = {ids = {}, envelopes = {}, count = 0, taken = {}, aside = {}, scheduled = {}, stubs = 0}
  local conf = redis.call('HMGET', KEYS[5], 'paused_tasks', 'alarms')
  -- Return how many entries at the front of a list are taken. The tickets of groups that are taken whole go with it.
  local function take_front(key, whole)
    local looked, page = 0, nil
    while drops.count < count and (not page or #page == 500) do
      page = redis.call('LRANGE', key, looked, looked + 499)
      local envelopes = #page > 0 and redis.call('HMGET', jobs, unpack(page)) or page
      for i, id in ipairs(page) do
        local ticket = string.byte(id) == 9
        if drops.count == count or (ticket and not whole[id]) then
          page = {} -- a ticket stands for a group: what is behind it stays
          break
        end
        looked = looked + 1
        if not ticket then drops.ids[#drops.ids + 1], drops.envelopes[#drops.envelopes + 1] = id, envelopes[i] end
        if envelopes[i] and string.byte(envelopes[i]) == 120 then drops.stubs = drops.stubs + 1
        elseif envelopes[i] then drops.count = drops.count + 1 end
      end
    end
    return looked
  end
  for priority = 0, 9 do
    local whole = {}
    for task in pairs(read_paused(conf[1]) or {}) do
      local looked = take_front(prefix .. 'group:' .. priority .. ':p' .. task, whole)
      whole['\tp' .. task] = true
      if looked > 0 then drops.aside[#drops.aside + 1] = {priority, 'p' .. task, looked} end
    end
    local looked = take_front(KEYS[7 + priority], whole)
    if looked > 0 then drops.taken[#drops.taken + 1] = {KEYS[7 + priority], looked} end
  end
  -- Alarms of limits and schedules stand among the scheduled jobs.
  local wanted = count - drops.count
  for _, id in ipairs(wanted > 0 and redis.call('ZRANGE', due, 0, wanted + math.min(tonumber(conf[2] or 0), 1000) - 1) or {}) do
    local envelope = drops.count < count and string.byte(id) ~= 9 and redis.call('HGET', jobs, id)
    local found = envelope and marks(envelope) or {}
    if envelope and not (found.group or found.limits) then
      drops.scheduled[#drops.scheduled + 1], drops.count = id, drops.count + 1
      drops.ids[#drops.ids + 1], drops.envelopes[#drops.envelopes + 1] = id, envelope
    end
  end
  return drops
end

-- Drop jobs. Who waits for one of them is told that it was cancelled; no record is kept, as of a purge.
-- KEYS      as in push.lua
-- prefix    of the queue's keys
-- drops     as find_oldest returns them
-- returns   nothing
local function drop(KEYS, prefix, drops)
  local jobs, conf, waiters, untagged = KEYS[2], KEYS[5], prefix .. 'waiters', {}
  local record, awaited = cancelled_record(clock(), 'dropped'), redis.call('EXISTS', waiters) == 1
  for _, one in ipairs(drops.taken) do redis.call('LTRIM', one[1], one[2], -1) end
  for _, one in ipairs(drops.aside) do
    local priority, group, count = one[1], one[2], one[3]
    local key, member = prefix .. 'group:' .. priority .. ':' .. group, priority .. group
    redis.call('LTRIM', key, count, -1)
    redis.call('HINCRBY', conf, 'waiting', -count)
    if redis.call('EXISTS', key) == 0 then
      local limit = redis.call('HGET', prefix .. 'waits', member)
      if limit then redis.call('ZREM', prefix .. 'limit:' .. limit, member)
      else redis.call('LREM', KEYS[7 + priority], 1, '\t' .. group) end
      redis.call('HDEL', prefix .. 'waits', member)
      redis.call('HDEL', prefix .. 'credits', member)
      redis.call('SREM', prefix .. 'tickets', member)
    end
  end
  if #drops.scheduled > 0 then in_chunks('ZREM', KEYS[3], drops.scheduled, 1, #drops.scheduled) end
  for i, id in ipairs(drops.ids) do
    local found = drops.envelopes[i] and marks(drops.envelopes[i])
    if found and not found.stub then
      list_tags(untagged, found.tags, id)
      release(prefix, id, found)
    end
    if awaited then announce(waiters, id, record) end
    if events and drops.envelopes[i] and not (found and found.stub) then
      note_event('cancelled', id, drops.envelopes[i], '1', 'why', 'dropped')
    end
  end
  in_chunks('HDEL', jobs, drops.ids, 1, #drops.ids)
  in_chunks('HDEL', prefix .. 'state', drops.ids, 1, #drops.ids)
  change_tags('ZREM', prefix, untagged)
  if drops.stubs > 0 then redis.call('HINCRBY', conf, 'stubs', -drops.stubs) end
  redis.call('HINCRBY', conf, 'dropped', drops.count)
end
