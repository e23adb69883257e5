-- Remove jobs that wait, from the front, in one bounded batch. Jobs that arrive after a purge began survive it.
-- needs: numbers keys tokens envelope tags unique events announce outcome rights limits group_limits groups room expiry
--
-- KEYS  1 jobs  2 state  3 due  4 dead  5 conf  6 waiters  7-16 ready:0 … ready:9  17 none
--       18 wake
-- ARGV  1 "ready", "due", "dead", or "rerun": those that are to run after others  2 how many at most (at most 1,000)  3 who asks
-- returns {entries taken, jobs removed}    entries of cancelled jobs are none to remove: a step passes up to 1,000 of them,
--                                  500 where jobs have groups or limits, which cost more
local jobs, grouped = KEYS[1], redis.call('HGET', KEYS[5], 'waiting')
local most = grouped and 500 or 1000
local limit = math.min(tonumber(ARGV[2]), most)
if limit < 1 then return {0, 0} end
local prefix, now = string.sub(jobs, 1, -5), clock()
local queue = {prefix = prefix, jobs = jobs, due = KEYS[3], conf = KEYS[5]}
begin_groups(queue)
local ids, envelopes, kinds, groups = {}, {}, {}, {} -- the group of each id that was taken from one
check('HLEN', KEYS[2], KEYS[6])
local conf = redis.call('HMGET', KEYS[5], 'line', 'expires', 'events', 'stubs')
begin_events(conf[3])
local line, passed = conf[1], tonumber(conf[4] or 0)
check('LLEN', unpack(KEYS, 7, 16))
local reruns = prefix .. 'reruns'
check('HLEN', reruns)
local record = cancelled_record(now, 'purged', ARGV[3])
redis.call('HDEL', jobs, '\t')
prove(prefix .. 'none', 'LRANGE', 'LPOP', 'ZREM', 'HMGET', 'HINCRBY', 'GET', 'DEL', 'PEXPIRE', 'HGET', 'HSET', 'SET', 'RPUSH', 'ZADD')
if grouped then
  prove_groups(prefix .. 'none')
  prove(prefix .. 'none', 'SREM')
end

local function add(id, envelope, group)
  local at = #ids + 1
  ids[at], envelopes[at], groups[at] = id, envelope, group
  kinds[at] = envelope and marks(envelope)
  if envelope and not (kinds[at] and kinds[at].stub) then limit = limit - 1 end
end

local function is_full() return limit < 1 or #ids >= most end

-- Remove from the front of a list as many jobs as are wanted, and what lies before them. A list of another type counts as empty.
-- ticket   takes the jobs of the group that an entry stands for, and tells whether none is left; nil where entries are jobs
local function take_front(key, group, ticket)
  local entries = redis.pcall('LRANGE', key, 0, math.min(limit + passed, most - #ids) - 1)
  if entries.err or #entries == 0 then return end
  local found, back, taken = redis.call('HMGET', jobs, unpack(entries)), {}, 0
  for i, entry in ipairs(entries) do
    if is_full() then break end
    taken = i
    if not ticket or string.byte(entry) ~= 9 then add(entry, found[i], group)
    elseif not ticket(string.sub(entry, 2)) then back[#back + 1] = entry end
  end
  redis.call('LPOP', key, taken)
  for i = #back, 1, -1 do redis.call('LPUSH', key, back[i]) end
  return taken
end

-- Remove jobs from a group, and tell whether it is empty then.
local function take_group(priority, group)
  local key = prefix .. 'group:' .. priority .. ':' .. group
  queue.counters.waiting = queue.counters.waiting - (take_front(key, group) or 0)
  return redis.call('EXISTS', key) == 0
end

local function take_list(priority)
  take_front(KEYS[7 + priority], nil, function(group)
    local emptied = take_group(priority, group)
    if emptied then
      redis.call('SREM', prefix .. 'tickets', priority .. group)
      redis.call('HDEL', prefix .. 'credits', priority .. group)
    end
    return emptied
  end)
end

local function take_waiting()
  local waits = redis.call('HSCAN', prefix .. 'waits', '0', 'COUNT', limit)[2]
  local members = {}
  for i = 1, #waits, 2 do members[#members + 1] = {waits[i], waits[i + 1]} end
  table.sort(members, function(a, b) return a[1] < b[1] end)
  for _, one in ipairs(members) do
    if is_full() then break end
    if take_group(string.sub(one[1], 1, 1), string.sub(one[1], 2)) then
      redis.pcall('ZREM', prefix .. 'limit:' .. one[2], one[1])
      redis.call('HDEL', prefix .. 'waits', one[1])
    else
      readmit(queue, one[1])
    end
  end
end

if ARGV[1] == 'ready' then
  for priority = 9, 0, -1 do
    if not is_full() then take_list(priority) end
  end
  if grouped and not is_full() then take_waiting() end
else
  local taken = {}
  if ARGV[1] == 'rerun' then
    local pairs_ = redis.call('HGETALL', reruns)
    for i = 1, math.min(#pairs_, 2 * limit), 2 do
      redis.call('HDEL', reruns, pairs_[i])
      taken[#taken + 1] = pairs_[i + 1]
    end
  else
    local from = ARGV[1] == 'due' and KEYS[3] or KEYS[4]
    -- Alarms stand among the jobs that are due. Those of limits are rung, and count as nothing that was taken; those of schedules stay.
    local beside = ARGV[1] == 'due' and math.min(1000, tonumber(redis.call('HGET', KEYS[5], 'alarms') or 0)) or 0
    for _, id in ipairs(redis.call('ZRANGE', from, 0, limit + beside - 1)) do
      if string.sub(id, 1, 2) ~= '\t\t' then taken[#taken + 1] = id end
    end
    if #taken > 0 then redis.call('ZREM', from, unpack(taken)) end
  end
  local found = #taken > 0 and redis.call('HMGET', jobs, unpack(taken))
  for i, id in ipairs(taken) do add(id, found[i]) end
end
if #ids == 0 then return {0, 0} end
local removed, untagged, alarms = 0, {}, {}
for i, id in ipairs(ids) do
  local found = kinds[i]
  if groups[i] and found then touch(queue, (limits_of(found, groups[i]))) end
  if found and found.stub then
    redis.call('HINCRBY', KEYS[5], 'stubs', -1)
    if groups[i] and string.byte(groups[i]) ~= 112 then queue.counters.waiting_stubs = queue.counters.waiting_stubs - 1 end
  elseif envelopes[i] then
    removed = removed + 1
    if events then note_event('cancelled', id, envelopes[i], attempt_in(redis.call('HGET', KEYS[2], id)), 'why', 'purged', 'by', ARGV[3]) end
    list_tags(untagged, found and found.tags, id)
    if found then release(prefix, id, found) end
  end
  announce(KEYS[6], id, record)
end
redis.call('HDEL', jobs, unpack(ids))
redis.call('HDEL', KEYS[2], unpack(ids))
change_tags('ZREM', prefix, untagged)
if grouped then
  if ARGV[1] == 'due' then
    for i, id in ipairs(ids) do
      if string.byte(id) == 9 then alarms[#alarms + 1] = string.sub(id, 2) end
    end
    if #alarms > 0 then ring(queue, alarms, now) end
    give_back(queue, ids)
  end
  pass_on(queue, now, 1)
  write_counters(queue)
  if queue.moved or queue.counters.alarms > 0 then wake(KEYS[18]) end
end
if line then call_next(prefix) end
if conf[2] then pcall(function() renew_expiry(prefix, now) end) end
write_events(prefix)
return {#ids - #alarms, removed}
