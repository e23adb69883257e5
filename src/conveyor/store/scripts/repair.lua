-- Put jobs back that have a record and are in no place: neither ready, in a group, scheduled, dead nor leased. Others are left
-- alone. A group whose ticket is lost gets a new one.
-- needs: numbers keys tokens envelope is_leased rights limits group_limits groups
--
-- KEYS  1 jobs  2 state  3 due  4 dead  5 workers  6 conf  7 wake  8-17 ready:0 … ready:9  18 none
-- ARGV  ids, the newest first: each is put before the one that came before it
-- returns {jobs put back, cancelled jobs whose record was removed}
local jobs, state, due = KEYS[1], KEYS[2], KEYS[3]
local prefix, now = string.sub(jobs, 1, -5), clock()
check('HLEN', state, KEYS[6])
local workers, envelopes = redis.call('ZRANGE', KEYS[5], 0, -1), redis.call('HMGET', jobs, unpack(ARGV))
local states = redis.call('HMGET', state, unpack(ARGV))

local queue, grouped = {prefix = prefix, jobs = jobs, due = due, conf = KEYS[6]}, {}
begin_groups(queue)

-- Make the ticket of a group that has jobs and none. Of what is lost, nothing else tells it.
local function mend_ticket(priority, group)
  local member, ready = priority .. group, KEYS[8 + priority]
  local limit = redis.call('HGET', prefix .. 'waits', member)
  if limit and redis.call('ZSCORE', prefix .. 'limit:' .. limit, member) or redis.call('LPOS', ready, '\t' .. group) then return end
  if redis.call('LLEN', prefix .. 'group:' .. priority .. ':' .. group) == 0 then return end
  redis.call('HDEL', prefix .. 'waits', member)
  redis.call('SADD', prefix .. 'tickets', member)
  redis.call('LPUSH', ready, '\t' .. group)
  queue.moved = priority
end

-- Forget the ticket of a group whose list is lost: it is made anew with its first job.
local function forget_ticket(priority, group)
  local member = priority .. group
  if redis.call('EXISTS', prefix .. 'group:' .. priority .. ':' .. group) == 1 then return end
  redis.call('LREM', KEYS[8 + priority], 0, '\t' .. group)
  redis.call('SREM', prefix .. 'tickets', member)
  local limit = redis.call('HGET', prefix .. 'waits', member)
  if limit then redis.call('ZREM', prefix .. 'limit:' .. limit, member) end
  redis.call('HDEL', prefix .. 'waits', member)
end

local function is_placed(id, found, envelope)
  if found and found.after and redis.call('HEXISTS', jobs, found.after) == 1 and redis.call('HGET', prefix .. 'reruns', found.after) == id then
    return true
  end
  local group = found and group_of(found)
  if not group and task_of(envelope) then
    local key = prefix .. 'group:' .. (found and found.priority or 0) .. ':p' .. task_of(envelope)
    if redis.call('LPOS', key, id) then return true end
  end
  if group then
    grouped[#grouped + 1] = {found.priority, group}
    if redis.call('LPOS', prefix .. 'group:' .. found.priority .. ':' .. group, id) then return true end
  end
  if redis.call('ZSCORE', due, id) or redis.call('ZSCORE', KEYS[4], id) or is_leased(prefix, id, workers) then return true end
  for ready = 8, 17 do
    if redis.call('LPOS', KEYS[ready], id) then return true end
  end
  return false
end

local lost = {}
for i, id in ipairs(ARGV) do
  if envelopes[i] and not is_placed(id, marks(envelopes[i]), envelopes[i]) then lost[#lost + 1] = i end
end
if #lost == 0 and #grouped == 0 then return {0, 0} end
prove(KEYS[18], 'HDEL', 'HGET', 'HSET', 'HINCRBY', 'ZADD', 'LPUSH')
prove_groups(KEYS[18])
prove(KEYS[18], 'LLEN', 'LREM', 'SREM')
local back, removed = 0, 0
for _, i in ipairs(lost) do
  local id, found = ARGV[i], marks(envelopes[i]) or {}
  if found.stub then
    redis.call('HDEL', jobs, id)
    redis.call('HINCRBY', KEYS[6], 'stubs', -1)
    removed = removed + 1
  else
    if found.after and redis.call('HGET', prefix .. 'reruns', found.after) == id then
      redis.call('HDEL', prefix .. 'reruns', found.after)
    end
    -- It may have been started when it was lost, so a start counts: no attempt has its number twice.
    local starts, rest = string.match(states[i] or '0 0 0', '^(%d+)(.*)$')
    redis.call('HSET', state, id, int((starts or 0) + 1) .. (rest or ' 0 0'))
    if found.due and found.due > now then redis.call('ZADD', due, found.due, id)
    else
      local group = group_of(found)
      if group then
        -- The slots that it held when it was lost are free.
        give_back(queue, {id})
        forget_ticket(found.priority, group)
        join_group(queue, found.priority, group, id, true)
      else
        redis.call('LPUSH', KEYS[8 + (found.priority or 0)], id)
      end
    end
    back = back + 1
  end
end
for _, one in ipairs(grouped) do mend_ticket(one[1], one[2]) end
pass_on(queue, now, 1)
write_counters(queue)
if back > 0 or queue.moved then wake(KEYS[7]) end
return {back, removed}
