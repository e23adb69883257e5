-- Put dead letters back, with all their attempts again. Their state keeps what happened before. One step of a walk.
-- needs: numbers keys tokens envelope events history is_leased key_holder rights limits group_limits groups leased leased_order heads shut_tasks made_at walk
--
-- KEYS  1 dead  2 jobs  3 state  4 wake  5-14 ready:0 … ready:9  15 none  16 conf
-- ARGV  1 who asks  2… as in lib/walk.lua; of those that it finds the dead ones
-- returns {now_ms, 1 at the end, cursor, looked at, ids that may be chosen, ids put back, (id holder)…}
--         holder: the job that holds the unique key of a dead letter now, which therefore stays dead
local prefix, moved, kept, claimed, gone = string.sub(KEYS[2], 1, -5), {}, {}, {}, {}
local walk = walk_jobs(prefix, 2, false, 5)
local function answer()
  local reply = reply_of(walk, gone)
  reply[6], reply[7] = moved, kept
  return reply
end
local found_ids = {}
for _, job in ipairs(walk.found) do
  if job.place == 'dead' or redis.call('ZSCORE', KEYS[1], job.id) then found_ids[#found_ids + 1] = job.id end
end
-- An entry without an envelope, which the server has lost, is removed.
if ARGV[2] == 'dead' then
  for _, id in ipairs(walk.lost) do found_ids[#found_ids + 1] = id end
end
if #found_ids == 0 then return answer() end
local ids, envelopes, lists, grouped = {}, {}, {}, false
local queue = {prefix = prefix, jobs = KEYS[2], conf = KEYS[16]}
for i, envelope in ipairs(redis.call('HMGET', KEYS[2], unpack(found_ids))) do
  local id, found = found_ids[i], envelope and marks(envelope)
  local holder = nil
  for _, key in ipairs(found and found.keys or {}) do
    if key.life ~= 't' and not holder then
      holder = claimed[key.text] or holder_of(prefix, key)
      if holder == id then holder = nil end
    end
  end
  if not holder then
    for _, key in ipairs(found and found.keys or {}) do claimed[key.text] = id end
  end
  if holder then
    kept[#kept + 1], kept[#kept + 2] = id, holder
  else
    local at = #ids + 1
    ids[at], envelopes[at], lists[at] = id, envelope, KEYS[5 + priority_of(envelope)]
    check('LLEN', lists[at])
    local group = found and group_of(found)
    if group then
      check('LLEN', prefix .. 'group:' .. found.priority .. ':' .. group)
      grouped = true
    end
  end
end
if #ids == 0 then return answer() end
local states = redis.call('HMGET', KEYS[3], unpack(ids))
local event = past_event('redriven', walk.now, ARGV[1])
begin_events(redis.call('HGET', KEYS[16], 'events'))
prove(prefix .. 'none', 'ZREM', 'HSET', 'SET', 'RPUSH')
if grouped then
  begin_groups(queue)
  check('SCARD', prefix .. 'tickets')
  prove(prefix .. 'none', 'SADD', 'HINCRBY')
end
redis.call('ZREM', KEYS[1], unpack(ids))
for i, id in ipairs(ids) do
  gone[id] = true
  if envelopes[i] then
    local found = marks(envelopes[i])
    local starts, about, errors = string.match(states[i] or '', '^(%d+) %d+ %d+w?([^\n]*)(.*)$')
    redis.call('HSET', KEYS[3], id, with_event((starts or '0') .. ' 0 0' .. (about or '') .. (errors or ''), event))
    if events then note_event('redriven', id, envelopes[i], attempt_in(states[i]), 'by', ARGV[1]) end
    -- The job lives again, so its own id is taken until a day after it ends, and its unique key until it ends.
    if found and found.own then redis.call('SET', prefix .. 'unique:i:' .. id, id) end
    for _, key in ipairs(found and found.keys or {}) do
      if key.life ~= 't' then take_key(prefix, key, id) end
    end
    local group = found and group_of(found)
    if group then join_group(queue, found.priority, group, id) else redis.call('RPUSH', lists[i], id) end
    moved[#moved + 1] = id
  end
end
if grouped then write_counters(queue) end
if #moved > 0 then wake(KEYS[4]) end
write_events(prefix)
return answer()
