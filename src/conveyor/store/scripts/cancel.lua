-- Cancel or delete jobs, wherever they are. For a leased job its worker is asked. One step of a walk.
-- needs: numbers keys tokens listed envelope tags unique events announce outcome rights limits group_limits groups kept_result ended_mark leased leased_order heads shut_tasks made_at walk room expiry
--
-- KEYS  1 jobs  2 state  3 due  4 dead  5 workers  6 conf  7 waiters  8 none  9 wake
-- ARGV  1 "cancel" leaves a record, "delete" leaves nothing and takes dead letters too  2 who asks  3… as in lib/walk.lua
-- returns {now_ms, 1 at the end, cursor, looked at, ids that may be chosen, (id, code)…}
--         code  1 gone · 2 asked of the worker that holds it, which has not answered · 3 asked, and it runs
--         4 gone: its worker was asked before it had started it · 0 it has ended · -1 leased (delete only)
--         -2 not known, or no longer
local jobs, cancels = KEYS[1], ARGV[1] == 'cancel'
local queue, untagged = {
  prefix = string.sub(jobs, 1, -5), jobs = jobs, state = KEYS[2], waiters = KEYS[7], due = KEYS[3], conf = KEYS[6],
}, {}
local walk, workers, line, expires, reruns = walk_jobs(queue.prefix, 3, false, 8), nil, nil, nil, false

-- Tell whether a job is in a group. The first that is costs the proof of what leaving a group needs.
local function is_grouped(found)
  local group = group_of(found)
  if group and not queue.limits then
    begin_groups(queue)
    prove_groups(queue.prefix .. 'none')
  end
  return group
end

local function note_cancelled(id, envelope)
  if cancels then count_end(queue.prefix, 'cancelled', envelope) end
  if not events then return end
  note_event('cancelled', id, envelope, attempt_in(redis.call('HGET', queue.state, id)), 'why', cancels and '' or 'deleted', 'by', ARGV[2])
end

local function cancel_job(id)
  local envelope = redis.call('HGET', jobs, id)
  local found = envelope and marks(envelope) or {}
  if not envelope or found.stub then
    local record = kept_result(queue.prefix .. 'result:' .. id, queue.prefix .. 'results:' .. string.sub(id, 1, 7), id)
    if record then return cancels and not found.stub and string.find(record, '"reason":"not started"', 1, true) and 4 or 0 end
    return not envelope and ended_mark(queue.prefix, id) and 0 or -2
  end
  local buried = redis.call('ZSCORE', KEYS[4], id)
  if buried and cancels then return 0 end

  if not workers then
    check('HLEN', queue.state, queue.waiters)
    local conf = redis.call('HMGET', KEYS[6], 'line', 'expires', 'events')
    line, expires = conf[1], conf[2]
    begin_events(conf[3])
    workers = redis.call('ZRANGE', KEYS[5], 0, -1)
    prove(queue.prefix .. 'none', 'HDEL', 'ZREM', 'HEXISTS', 'HSET', 'HINCRBY', 'SET', 'GET', 'DEL', 'PEXPIRE')
  end
  local group = is_grouped(found)
  local follows = found.after and redis.call('HGET', queue.prefix .. 'reruns', found.after) == id
  if found.keys and not reruns then
    check('HLEN', queue.prefix .. 'reruns')
    prove(queue.prefix .. 'none', 'ZADD', 'RPUSH', 'HGET')
    reruns = true
  end
  local keep, record = 0, '{"status":"cancelled"}'
  if cancels then keep, record = 600000, cancelled_record(clock(), nil, ARGV[2]) end

  if follows then redis.call('HDEL', queue.prefix .. 'reruns', found.after) end
  if follows or redis.call('ZREM', KEYS[3], id) == 1 or (buried and redis.call('ZREM', KEYS[4], id) == 1) then
    note_cancelled(id, envelope)
    redis.call('HDEL', jobs, id)
    list_tags(untagged, found.tags, id)
    finish(queue, id, keep, record, found)
    if group then give_back(queue, {id}) end
    return 1
  end
  local holder = walk.holders and walk.holders.held and (walk.holders.held[id] or {})
  for _, worker in ipairs(holder or workers) do
    local leased = queue.prefix .. 'leased:' .. worker
    if redis.call('HEXISTS', leased, id) == 1 then
      if not cancels then return -1 end
      local asked = redis.call('HGET', leased, '\tcancel')
      local at = asked and listed(asked, '\n', id)
      if at and listed(string.sub(asked, at + #id), '\n', id) then return 3 end
      if not at then
        redis.call('HDEL', leased, '\t')
        redis.call('HSET', leased, '\tcancel', (asked and asked .. '\n' .. id or id) .. (ARGV[2] ~= '' and '\n\t' .. id .. '\t' .. ARGV[2] or ''))
        local token = queue.prefix .. 'wake:' .. worker
        if redis.pcall('EXISTS', token) ~= 1 then redis.pcall('RPUSH', token, '1') end
        redis.pcall('PEXPIRE', token, 60000)
      end
      return 2
    end
  end
  -- Its entry stands in a ready list, which is never searched. A stub stays for the turn that reaches the entry. The first
  -- write is a removal, so that a full Redis takes the stub too.
  note_cancelled(id, envelope)
  redis.call('HDEL', queue.state, id)
  redis.call('HSET', jobs, id, 'x' .. string.match(envelope, '^[^\n]*') .. '\n')
  redis.call('HINCRBY', KEYS[6], 'stubs', 1)
  list_tags(untagged, found.tags, id)
  finish(queue, id, keep, record, found)
  if group then
    queue.counters.waiting_stubs = queue.counters.waiting_stubs + 1
    -- A group whose first job this was may have one behind it that need not wait.
    if redis.pcall('LINDEX', queue.prefix .. 'group:' .. found.priority .. ':' .. group, 0) == id then
      readmit(queue, found.priority .. group)
    end
  end
  return 1
end

local gone, codes = {}, {}
for _, job in ipairs(walk.found) do
  local code = cancel_job(job.id)
  gone[job.id] = code == 1
  codes[#codes + 1], codes[#codes + 2] = job.id, code
end
if ARGV[3] == 'tag' then
  for _, id in ipairs(walk.lost) do list_tags(untagged, {ARGV[6]}, id) end
end
change_tags('ZREM', queue.prefix, untagged)
if queue.limits then
  pass_on(queue, clock(), 1)
  write_counters(queue)
  if queue.moved or queue.counters.alarms > 0 then wake(KEYS[9]) end
end
if line then call_next(queue.prefix) end
if expires then pcall(function() renew_expiry(queue.prefix, clock()) end) end
write_events(queue.prefix)
local reply = reply_of(walk, gone)
for _, one in ipairs(codes) do reply[#reply + 1] = one end
return reply
