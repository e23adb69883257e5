-- A worker's whole round trip: settle what it finished, then lease it up to N more.
--
-- KEYS  1 jobs  2 state  3 leased:<worker>  4 workers  5 due  6 wake  7 conf  8 dead  9 recent  10 waiters
--       11-20 ready:0 … ready:9
-- ARGV  1 worker  2 number of this turn  3 how many more  4 lease_ms
--       5 flags: k keep the lease's end, l look for overdue workers, t leave when nothing is held
--       6 count, ids of jobs that are simply done
--       then count, and for each other settlement: kind id ms record state unique own
--            D done: keep the record ms           X dead: announce the record, keep the state
--            C cancelled: keep the record ms      R again after ms, with this state
--            F back to the front, with this state ("" as it was)      M still ours, with this state
--            S still ours; the record goes into the outbox (the D that follows it is then accepted, too)
--       then count, (field increment)… for this minute's counters
--       then count, entries for the list of recently finished jobs
-- returns {0} we are not registered · {-1} a late copy of an older turn · else
--         {1, now_ms, held, next_due_ms or -1, more, lost ids, ids, envelopes, states, overdue (worker end)…, cancelled ids, paused,
--          ids whose envelope is gone, 1 when the flag l was given and the outbox is not empty}
local jobs, state, leased, workers, due, wakes = KEYS[1], KEYS[2], KEYS[3], KEYS[4], KEYS[5], KEYS[6]
local conf, dead, recent, waiters = KEYS[7], KEYS[8], KEYS[9], KEYS[10]
local worker, number, want, lease = ARGV[1], number_in(ARGV[2]), number_in(ARGV[3]), number_in(ARGV[4])
local flags = ARGV[5]
local prefix = string.sub(jobs, 1, -5)
local now = clock()

-- Read, and check, before anything is written.
local about = redis.call('HMGET', leased, '\tturn', '\tcancel', '\tleft')
local last = tonumber(about[1])
-- Who has left is only told again what it was told: its hash expires, and would take new leases with it.
if not last or (about[3] and number ~= last) then return {0} end
if number < last then return {-1} end
local paused = redis.call('HGET', conf, 'paused') == '1'

local function again()
  local all, mine = redis.call('HGETALL', leased), {}
  for i = 1, #all, 2 do
    local place = tonumber(all[i + 1])
    if string.byte(all[i]) ~= 9 and math.floor(place / 8192) == number then mine[#mine + 1] = {place, all[i]} end
  end
  table.sort(mine, function(a, b) return a[1] < b[1] end)
  local ids = {}
  for i, pair in ipairs(mine) do ids[i] = pair[2] end
  local held = redis.call('HLEN', leased) - 3 - (about[2] and 1 or 0) - (about[3] and 1 or 0)
  if #ids == 0 then return {1, now, held, -1, 1, {}, {}, {}, {}, {}, {}, 0, {}, 0} end
  return {1, now, held, -1, 1, {}, ids, redis.call('HMGET', jobs, unpack(ids)),
    redis.call('HMGET', state, unpack(ids)), {}, {}, 0, {}, 0}
end
if number == last then return again() end

local done_count = tonumber(ARGV[6])
local other_at = 8 + done_count
local other_count = tonumber(ARGV[other_at - 1])
local stats_at = other_at + 7 * other_count
local stats_count = tonumber(ARGV[stats_at])
local recent_at = stats_at + 1 + 2 * stats_count
local recent_count = tonumber(ARGV[recent_at])
local stats = prefix .. 'stats:' .. int(math.floor(now / 60000))
redis.call('HLEN', jobs)
redis.call('ZCARD', workers)
redis.call('ZCARD', due)
redis.call('LLEN', KEYS[11])
if recent_count > 0 then redis.call('LLEN', recent) end
if stats_count > 0 then redis.call('HLEN', stats) end
if string.find(flags, 'l', 1, true) then redis.call('ZCARD', dead) end
local stateful = redis.call('HLEN', state) > 0
local urgent = redis.call('EXISTS', unpack(KEYS, 12, 20)) > 0
if urgent then check('LLEN', unpack(KEYS, 12, 20)) end
local awaited = redis.call('HLEN', waiters) > 0

local lost, done, others = {}, {}, {}
if done_count > 0 then
  for first = 7, 6 + done_count, 7000 do
    local final = math.min(first + 6999, 6 + done_count)
    local held = redis.call('HMGET', leased, unpack(ARGV, first, final))
    for i = 1, #held do
      if held[i] then done[#done + 1] = ARGV[first + i - 1] else lost[#lost + 1] = ARGV[first + i - 1] end
    end
  end
end
for i = other_at, other_at + 7 * (other_count - 1), 7 do
  number_in(ARGV[i + 2])
  if ARGV[i] == 'X' then redis.call('ZCARD', dead) end
  if ARGV[i] == 'S' then redis.call('LLEN', prefix .. 'outbox') end
  if redis.call('HEXISTS', leased, ARGV[i + 1]) == 1 then
    others[#others + 1] = i
  elseif ARGV[i] ~= 'S' then
    lost[#lost + 1] = ARGV[i + 1]
  end
end

-- The first write is a removal, so a full Redis still lets work drain.
redis.call('HDEL', leased, '\t')
redis.call('HSET', leased, '\tturn', number)
local function remove(key, ids)
  for first = 1, #ids, 7000 do redis.call('HDEL', key, unpack(ids, first, math.min(first + 6999, #ids))) end
end
if #done > 0 then
  remove(leased, done)
  remove(jobs, done)
  if stateful then remove(state, done) end
  if awaited then
    for _, id in ipairs(done) do announce(waiters, id, '') end
  end
end

local function finish(id, keep, record, unique, own)
  redis.call('HDEL', jobs, id)
  redis.call('HDEL', state, id)
  if keep > 0 then redis.call('SET', prefix .. 'result:' .. id, record, 'PX', keep) end
  release(prefix, id, unique, own)
  announce(waiters, id, record)
end

local function bury(id, record, attempts, unique, own)
  redis.call('ZADD', dead, now, id)
  redis.call('HSET', state, id, attempts)
  release(prefix, id, unique, own)
  announce(waiters, id, record)
end

local function requeue(id)
  local envelope = redis.call('HGET', jobs, id)
  local found = envelope and marks(envelope)
  if found and found.priority > 0 then urgent = true end
  redis.call('LPUSH', KEYS[11 + (found and found.priority or 0)], id)
end

local function settle(i)
  local kind, id, ms, record, attempts = ARGV[i], ARGV[i + 1], tonumber(ARGV[i + 2]), ARGV[i + 3], ARGV[i + 4]
  local unique, own = ARGV[i + 5] ~= '' and ARGV[i + 5] or nil, ARGV[i + 6] == '1'
  -- Of two settlements of one job in a report the first counts.
  local keeps = kind == 'M' or kind == 'S'
  if redis.call(keeps and 'HEXISTS' or 'HDEL', leased, id) == 0 then return end
  if kind == 'S' then
    redis.call('RPUSH', prefix .. 'outbox', record)
  elseif kind == 'D' or kind == 'C' then
    finish(id, ms, record, unique, own)
  elseif kind == 'X' then
    bury(id, record, attempts, unique, own)
  else
    if attempts ~= '' then redis.call('HSET', state, id, attempts) end
    if kind == 'R' then redis.call('ZADD', due, now + ms, id) end
    if kind == 'F' then requeue(id) end
  end
end
for _, i in ipairs(others) do settle(i) end

-- Cancellations asked of us: those whose job we still hold.
local cancelled = {}
if about[2] then
  for id in string.gmatch(about[2], '[^\n]+') do
    if redis.call('HEXISTS', leased, id) == 1 then cancelled[#cancelled + 1] = id end
  end
  if #cancelled == 0 then redis.call('HDEL', leased, '\tcancel') end
end

-- Due jobs join the tail of their priority, at most 200 a turn. No step of ours leaves an entry without an envelope, so
-- one that has none was lost by the server (evicted, or deleted by hand): it is told once, here.
local missing = {}
local first_due = redis.call('ZRANGE', due, 0, 0, 'WITHSCORES')
if first_due[2] and tonumber(first_due[2]) <= now then
  local ids = redis.call('ZRANGEBYSCORE', due, '-inf', now, 'LIMIT', 0, 200)
  local envelopes = redis.call('HMGET', jobs, unpack(ids))
  redis.call('ZREM', due, unpack(ids))
  for i, id in ipairs(ids) do
    local found = envelopes[i] and marks(envelopes[i])
    if found and found.priority > 0 then urgent = true end
    if envelopes[i] then
      redis.call('RPUSH', KEYS[11 + (found and found.priority or 0)], id)
    else
      missing[#missing + 1] = id
    end
  end
  first_due = redis.call('ZRANGE', due, 0, 0, 'WITHSCORES')
end

-- Lease, by priority. An entry whose job is gone, cancelled or expired is dropped when it is reached.
local ids, envelopes, taken = {}, {}, 0
local function usable(id, envelope)
  if not envelope then
    missing[#missing + 1] = id
    return false
  end
  local found = marks(envelope)
  if not found then return true end
  if found.stub then
    redis.call('HDEL', jobs, id)
    redis.call('HINCRBY', conf, 'stubs', -1)
    return false
  end
  if found.expires and found.expires <= now then
    finish(id, 600000, '{"status":"cancelled","reason":"expired","at":' .. int(now) .. '}', found.unique, found.own)
    return false
  end
  return true
end
local function take(key)
  while taken < want do
    local popped = redis.call('LPOP', key, want - taken)
    if not popped or #popped == 0 then return end
    local found = redis.call('HMGET', jobs, unpack(popped))
    for i, id in ipairs(popped) do
      if (found[i] and string.byte(found[i]) == 10) or usable(id, found[i]) then
        taken = taken + 1
        ids[taken], envelopes[taken] = id, found[i]
      end
    end
  end
end
want = math.min(want, 1000 - (redis.call('HLEN', leased) - 3))
if want > 0 and not paused then
  if urgent then
    for priority = 9, 1, -1 do take(KEYS[11 + priority]) end
  end
  take(KEYS[11])
end
local states = {}
if taken > 0 then
  local places, base = {}, number * 8192
  for i = 1, taken do
    places[2 * i - 1], places[2 * i] = ids[i], base + i
  end
  redis.call('HSET', leased, unpack(places))
  if redis.call('EXISTS', state) == 1 then states = redis.call('HMGET', state, unpack(ids)) end
end

local held = redis.call('HLEN', leased) - 3
if cancelled[1] then held = held - 1 end
local leaves = held == 0 and string.find(flags, 't', 1, true)

-- Whoever goes, or has its hands full, while work or a due instant remains passes the baton.
local more, next_due = 0, -1
if not paused then
  if first_due[2] then next_due = tonumber(first_due[2]) end
  if leaves or taken >= want then
    if redis.call('EXISTS', unpack(KEYS, 11, 20)) > 0 then more = 1 end
    if more == 1 or next_due >= 0 then wake(wakes) end
  end
end

if leaves then
  -- Kept for a moment, so that a repeat of this turn is still known as one.
  redis.call('HSET', leased, '\tleft', '1')
  redis.call('PEXPIRE', leased, 10000)
  redis.call('ZREM', workers, worker)
elseif not string.find(flags, 'k', 1, true) then
  redis.call('ZADD', workers, now + lease, worker)
end

if stats_count > 0 then
  for i = stats_at + 1, stats_at + 2 * stats_count, 2 do redis.call('HINCRBY', stats, ARGV[i], ARGV[i + 1]) end
  redis.call('EXPIRE', stats, 90000)
end
if recent_count > 0 then
  local final = recent_at + recent_count
  redis.call('LPUSH', recent, unpack(ARGV, math.max(recent_at + 1, final - 999), final))
  redis.call('LTRIM', recent, 0, 999)
end

-- Upkeep, a few times a lease: who is overdue, and which dead letters are too old or too many.
local overdue, outbox = {}, 0
local function look()
  outbox = redis.call('EXISTS', prefix .. 'outbox')
  overdue = redis.call('ZRANGEBYSCORE', workers, '-inf', now + lease / 2, 'WITHSCORES', 'LIMIT', 0, 100)
  local ahead = redis.call('ZRANGEBYSCORE', workers, now + 1.5 * lease, '+inf', 'WITHSCORES', 'LIMIT', 0, 100)
  for i = 1, #ahead, 2 do
    local own = tonumber(redis.call('HGET', prefix .. 'leased:' .. ahead[i], '\tlease') or 0)
    if tonumber(ahead[i + 1]) > now + 1.5 * own then
      overdue[#overdue + 1], overdue[#overdue + 2] = ahead[i], ahead[i + 1]
    end
  end
  local old = redis.call('ZRANGEBYSCORE', dead, '-inf', now - 7776000000, 'LIMIT', 0, 100)
  if #old == 0 and redis.call('ZCARD', dead) > 100000 then old = redis.call('ZRANGE', dead, 0, 99) end
  if #old > 0 then
    redis.call('ZREM', dead, unpack(old))
    redis.call('HDEL', jobs, unpack(old))
    redis.call('HDEL', state, unpack(old))
  end
end
if string.find(flags, 'l', 1, true) then look() end
return {1, now, held, next_due, more, lost, ids, envelopes, states, overdue, cancelled, paused and 1 or 0, missing, outbox}
