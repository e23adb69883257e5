-- Make scheduled jobs ready now. One step of a walk.
-- needs: numbers keys tokens envelope events history rights changes limits group_limits groups leased leased_order heads shut_tasks made_at walk
--
-- KEYS  1 due  2 jobs  3 wake  4-13 ready:0 … ready:9  14 conf  15 none
-- ARGV  1 who asks  2… as in lib/walk.lua; of those that it finds the scheduled ones
-- returns {now_ms, 1 at the end, cursor, looked at, ids that may be chosen, ids that are ready now…}
local prefix, moved, gone = string.sub(KEYS[2], 1, -5), {}, {}
local walk = walk_jobs(prefix, 2, false, 4)
local queue = {prefix = prefix, jobs = KEYS[2], due = KEYS[1], conf = KEYS[14]}
local envelopes, grouped, joining = {}, {}, false
for i, job in ipairs(walk.found) do
  envelopes[i] = redis.call('HGET', KEYS[2], job.id)
  check('LLEN', KEYS[4 + priority_of(envelopes[i])])
  local found = envelopes[i] and marks(envelopes[i])
  local group = found and group_of(found)
  if group then
    check('LLEN', prefix .. 'group:' .. found.priority .. ':' .. group)
    grouped[i], joining = {job.id, found.priority, group}, true
  end
end
check('HLEN', prefix .. 'waiters', prefix .. 'state')
if #walk.found > 0 then
  prove(prefix .. 'none', 'ZREM', 'HSET', 'RPUSH', 'HMGET')
  begin_events(redis.call('HGET', KEYS[14], 'events'))
end
if joining then
  begin_groups(queue)
  prove_groups(prefix .. 'none')
end
local event = past_event('promoted', walk.now, ARGV[1])
for i, job in ipairs(walk.found) do
  -- An alarm, whose name begins with a tab, has no envelope.
  if envelopes[i] and redis.call('ZREM', KEYS[1], job.id) == 1 then
    if grouped[i] then rejoin(queue, {grouped[i]}, walk.now) else redis.call('RPUSH', KEYS[4 + priority_of(envelopes[i])], job.id) end
    local state = redis.call('HGET', prefix .. 'state', job.id)
    redis.call('HSET', prefix .. 'state', job.id, with_event(state, event))
    if events then note_event('promoted', job.id, envelopes[i], attempt_in(state), 'by', ARGV[1]) end
    moved[#moved + 1], gone[job.id] = job.id, true
  end
end
if joining then
  pass_on(queue, clock(), 1)
  write_counters(queue)
end
if #moved > 0 then wake(KEYS[3]) end
write_events(prefix)
if #moved > 0 and redis.call('HLEN', prefix .. 'waiters') > 0 then announce_changes(prefix .. 'waiters', moved, 's') end
local reply = reply_of(walk, gone)
for _, id in ipairs(moved) do reply[#reply + 1] = id end
return reply
