-- A worker's whole round trip: settle what it has finished, then lease up to N more jobs to it.
-- needs: numbers keys tokens rights ended results announce changes report lease counters
-- lazy: listed envelope tags unique released worker_name events outcome leased leased_order parts limits shut_tasks paused_tasks group_limits groups requirements unusual settle promote rotation made_at ageing upkeep room expiry
--
-- KEYS  1 jobs  2 state  3 leased:<worker>  4 workers  5 due  6 wake  7 conf  8 dead  9 recent  10 waiters
--       11-20 ready:0 … ready:9  21 none
-- ARGV  1 worker  2 number of this turn: its instant (lib/leased.lua), above that of the last  3 how many more  4 lease_ms
--       5 flags: k keep the lease's end, l look for overdue workers, t leave when nothing is held, e remember the ends,
--         a<ms> raise what waits longer than that (lib/ageing.lua)
--         s<n> this worker runs up to n jobs of a group one after the other, when they are leased together; behind it for each group
--         that it goes on with: a tab, how many jobs of it the worker holds, those settled here left out, a colon and the key
--       6 count, ids of jobs that are simply done, at their end those that have one unique key until then and no other attribute
--       then count, and for each group of these, from the first id on, a result that is kept: ms count record…   0 ms: it is not
--       then count, and the names of these unique keys, in the order of their ids
--       then count, and of others of them that have unique keys or tags: id attributes
--       then count, and for each other settlement: kind id ms record state attributes own
--            D done: keep the record ms, state "+" when a value is not kept, "-" when the record has none
--            X dead: announce the record, keep the state; it died no earlier than its last error, at ms since the epoch
--            C cancelled: keep the record ms      R again after ms, with this state
--            F back to the front, with this state ("" as it was)      M still held, with this state
--            L as F, and the limit in record is held for ms
--            G still held; the limit in record is charged with ms more, or less, than the cost in state
--            R with a record: another worker is to run it; the record says what it needs (lib/requirements.lua)
--            R, F and L of a job whose cancellation was asked: it ends cancelled
--            K still held: it runs, and was told of its cancellation
--            T still held; the record, lines that the job has logged, is added to logs:<id>, which is kept for ms
--            E still held; the record has parts of its stream (lib/parts.lua), which is kept for ms
--            S still held; the record goes into the outbox (the D that follows it is then accepted, too)
--       then count, (field increment)… for this minute's counters
--       then count, entries for the list of recently finished jobs
-- returns {0} the worker is not registered · {-1} a late copy of an older turn · else
--         {number of the turn, now_ms, held, next_due_ms or -1, 1 when there is more plus 2 when several of a group run in their order, lost ids, ids, envelopes, states, overdue (worker end)…, cancelled ids, 1 when it is paused plus 2 when it expires,
--          ids whose envelope is gone, 1 when the flag l was given and the outbox is not empty, names of schedules to carry out}
local queue = {
  prefix = string.sub(KEYS[1], 1, -5), jobs = KEYS[1], state = KEYS[2], due = KEYS[5], conf = KEYS[7], dead = KEYS[8],
  -- The position in KEYS of the first ready list.
  waiters = KEYS[10], ready = 11,
  -- The ids of jobs that are gone, by their tags.
  untagged = {},
  -- By the limit of its key how many jobs of a group the worker holds, when others may follow them.
  own = {},
  -- The names of those whose instant has come.
  schedules = {},
}
local leased, workers, recent = KEYS[3], KEYS[4], KEYS[9]
local worker, number, want, lease_ms = ARGV[1], number_in(ARGV[2]), number_in(ARGV[3]), number_in(ARGV[4])
local flags = string.match(ARGV[5], '^[^\t]*')
for count, limit in string.gmatch(ARGV[5], '\t(%d+)(:[^\t]*)') do queue.own[limit] = tonumber(count) end
local looks = string.find(flags, 'l', 1, true)
queue.series = tonumber(string.match(flags, 's(%d+)'))
local now = clock()

-- Read, and check, before anything is written.
local about = redis.call('HMGET', leased, '\tturn', '\tcancel', '\tleft')
local last = tonumber(about[1])
-- A worker that has left only gets its last reply again: its hash expires, and new leases would expire with it.
if not last or (about[3] and number ~= last) then return {0} end
if number < last then return {-1} end
local conf = redis.call('HMGET', queue.conf, 'paused', 'line', 'waiting', 'paused_tasks', 'expires', 'events', 'needs')
-- A queue that never had a job with a group or a limit costs no command for them.
local paused, line, grouped = conf[1] == '1', conf[2], conf[3]

-- The same turn again: its first reply was lost, and nothing is settled or leased twice.
if number == last then
  local ids, envelopes, states = lazy().ids_in_order(leased, number), {}, {}
  local held = redis.call('HLEN', leased) - 3 - (about[2] and 1 or 0) - (about[3] and 1 or 0)
  if #ids > 0 then
    envelopes = redis.call('HMGET', queue.jobs, unpack(ids))
    states = redis.call('HMGET', queue.state, unpack(ids))
  end
  return {number, now, held, -1, queue.series and 3 or 1, {}, ids, envelopes, states, {}, {}, 0, {}, 0, {}}
end

local done_count = tonumber(ARGV[6])
local groups = tonumber(ARGV[7 + done_count])
local groups_at = 8 + done_count
local released_at = groups_at
for _ = 1, groups do released_at = released_at + 2 + tonumber(ARGV[released_at + 1]) end
local owned = tonumber(ARGV[released_at])
released_at = released_at + 1 + owned
local released_count = tonumber(ARGV[released_at])
local other_at = released_at + 2 + 2 * released_count
local other_count = tonumber(ARGV[other_at - 1])
local stats_at = other_at + 7 * other_count
local stats_count = tonumber(ARGV[stats_at])
local recent_at = stats_at + 1 + 2 * stats_count
local recent_count = tonumber(ARGV[recent_at])
local minute = math.floor(now / 60000)
local keeps = string.find(flags, 'k', 1, true)
if keeps then redis.call('ZCARD', workers) end
local first_due = redis.call('ZRANGE', queue.due, 0, 0, 'WITHSCORES')
if recent_count > 0 then redis.call('LLEN', recent) end
local counters = read_counters(queue.prefix, minute, stats_at + 1, stats_count)
if looks then redis.call('ZCARD', queue.dead) end
local stateful = redis.call('HLEN', queue.state) > 0
local awaited = redis.call('HLEN', queue.waiters) > 0
-- Ids of jobs that live, whose state changes.
if awaited then queue.changed = {} end
local done, others, lost, kinds = read_settlements(queue, leased, 7, done_count, other_at, other_count)
grouped = grouped or kinds.L
if grouped then
  lazy().begin_groups(queue)
  lazy().check_groups(queue.prefix)
  queue.tasks = lazy().read_paused(conf[4]) or (kinds.L and {})
  queue.grouped, queue.freed, queue.retried, queue.charges = true, {}, {}, {}
end
-- Some that are simply done have unique keys.
local keyed = owned > 0
for i = released_at + 2, released_at + 2 * released_count, 2 do
  keyed = keyed or string.find(ARGV[i], '\tu', 1, true) or string.find(ARGV[i], '\tk', 1, true)
end
local releases = keyed or kinds.unique or (about[2] and (kinds.R or kinds.F))
if releases then redis.call('HLEN', queue.prefix .. 'reruns') end
local ended = {}
local results = groups > 0 and plan_results(queue, done, 7, groups_at, groups, now, ended)
local leases = want > 0 and not paused
local ageing = leases and tonumber(string.match(flags, 'a(%d+)'))
-- Jobs that other workers have put off, and this one may run, come first.
local about_worker = leases and conf[7] and redis.call('HGET', leased, '\tabout')
local admits = about_worker and lazy().is_able(about_worker, '')
local promotes = kinds.R or (first_due[2] and tonumber(first_due[2]) <= now)
-- The jobs that this turn will lease are known before the first write, unless other lists have some, or it adds to them itself.
local heads, envelopes_ahead, unusual, urgent = nil, nil, true, false
-- A turn that only reports what is simply done touches no ready list.
local lists = leases or grouped or promotes or releases or #others > 0
if lists then
  urgent = redis.call('EXISTS', unpack(KEYS, 12, 20)) > 0
  if urgent then check('LLEN', unpack(KEYS, 12, 20)) end
end
if leases and not (grouped or urgent or promotes or kinds.F or releases or ageing or admits) then
  heads, envelopes_ahead, unusual = head_of(queue, KEYS[11], math.min(want, 1000))
elseif lists then
  redis.call('LRANGE', KEYS[11], 0, 0)
end
if not heads or done_count + other_count > 0 then redis.call('HLEN', queue.jobs) end

-- The first write is a removal, so a full Redis still lets work drain. Then each command is proven before a write that counts:
-- HDEL, ZADD and HSET by their first use, and those that this turn needs besides. The lease is renewed first.
redis.call('HDEL', leased, '\t')
if results or #others > 0 then prove_settlements(KEYS[21], kinds, results, about[2]) end
if keyed then prove(KEYS[21], 'MGET', 'DEL', 'SET', 'HGET', 'RPUSH') end
if promotes then prove(KEYS[21], 'ZREM', 'RPUSH') end
if kinds.needs or admits then prove(KEYS[21], 'ZADD', 'ZREM', 'HSET', 'PEXPIRE', 'LPUSH', 'HGETALL', 'HGET') end
if ageing then prove(KEYS[21], 'RPUSH', 'LPUSH', 'LTRIM') end
if grouped then
  -- A turn of one job is the usual one of a group that runs one at a time: what makes a key is proven with few removals.
  redis.call('DEL', KEYS[21])
  redis.call('RPUSH', KEYS[21], '')
  redis.call('LPUSH', KEYS[21], '')
  redis.call('DEL', KEYS[21])
  redis.call('SADD', KEYS[21], '')
  redis.call('DEL', KEYS[21])
  redis.call('HINCRBY', KEYS[21], '', 1)
  redis.call('DEL', KEYS[21])
  prove(KEYS[21], 'TYPE', 'HGETALL', 'LINDEX', 'HGET', 'ZADD', 'ZPOPMIN', 'ZREM', 'GET', 'LPOP', 'LTRIM', 'SREM', 'SET', 'PEXPIRE', 'LLEN')
end
if leases and (not heads or heads[1]) then
  redis.call('LTRIM', KEYS[21], 0, 0)
  if unusual or queue.starts then prove(KEYS[21], 'HINCRBY', 'SET', 'GET', 'DEL', 'PEXPIRE') end
end
if not keeps then redis.call('ZADD', workers, now + lease_ms, worker)
elseif kinds.R or kinds.X or releases then prove(KEYS[21], 'ZADD') end
redis.call('HSET', leased, '\tturn', number)
if conf[6] then
  lazy().begin_events(conf[6])
  queue.asked, queue.worker = about[2], worker
  pcall(function()
    queue.worker = lazy().name_of(redis.call('HGET', leased, '\tabout') or '') or worker
    lazy().note_done(queue, leased, done, now, queue.worker)
  end)
end
if #done > 0 then settle_done(queue, leased, done, results, stateful, awaited) end
if owned + released_count > 0 then
  lazy().release_done(queue, lost, released_at - owned, 7 + done_count - owned, owned, released_at + 1, released_count)
end
for _, i in ipairs(others) do
  if lazy().settle_other(queue, leased, i, now, about[2], ended) then urgent = true end
end
if queue.needed then lazy().call_able(queue, workers, worker) end
if grouped then lazy().settle_groups(queue, done, now) end
if releases and not urgent then urgent = redis.call('EXISTS', unpack(KEYS, 12, 20)) > 0 end
if string.find(flags, 'e', 1, true) then
  for _, id in ipairs(done) do
    if not (results and results.records[id]) then note_ended(ended, id, '-') end
  end
  remember_ended(queue.prefix, ended)
end

local cancelled = about[2] and lazy().held_cancellations(leased, about[2]) or {}

local missing = {}
if admits and lazy().admit_needed(queue, about_worker, want) then urgent = true end
local due_next, promoted = tonumber(first_due[2]), false
if promotes or admits then due_next, promoted = lazy().promote_due(queue, now, missing) end
local ids, envelopes, states, taken, unfinished = {}, {}, {}, 0, false
local size -- of what it holds, with three fields of its own
if grouped or leases then
  size = redis.call('HLEN', leased)
  want = math.min(want, 1000 - (size - 3))
end
if grouped then lazy().pass_on(queue, now, math.max(want, 1)) end
if want > 0 and leases then
  if ageing and lazy().raise_aged(queue, want, ageing, now) then urgent = true end
  if grouped then
    for limit in pairs(queue.own) do lazy().readmit(queue, '0g' .. string.sub(limit, 2)) end
    ids, envelopes, taken, unfinished = lazy().take_rotating(queue, leased, number, want, urgent or promoted or (queue.moved or 0) > 0, now, missing)
  else
    ids, envelopes, taken = take_ready(queue, want, urgent or promoted, heads, envelopes_ahead, unusual, now, missing)
    if taken > 0 then size = size + hold(leased, number, ids, taken) end
  end
end
if grouped then
  if queue.tasks then lazy().forget_resumed(queue) end
  lazy().write_counters(queue)
  -- Alarms are new.
  due_next = tonumber(redis.call('ZRANGE', queue.due, 0, 0, 'WITHSCORES')[2])
end
if taken > 0 then
  if queue.starts then lazy().release_started(queue.prefix, ids, envelopes, taken) end
  if (stateful or #others > 0) and redis.call('EXISTS', queue.state) == 1 then states = redis.call('HMGET', queue.state, unpack(ids)) end
end
for i = 1, conf[6] and taken or 0 do
  lazy().note_event('started', ids[i], envelopes[i], lazy().attempt_in(states[i]), 'w', queue.worker)
end
local held = (not grouped and size or redis.call('HLEN', leased)) - 3 - (cancelled[1] and 1 or 0)
local leaves = held == 0 and string.find(flags, 't', 1, true)

-- A worker that leaves, or that got all it wanted, wakes another one while ready or scheduled jobs remain.
local more, next_due = 0, -1
if not paused then
  next_due = due_next or -1
  if leaves or taken >= want or unfinished then
    if redis.call('EXISTS', unpack(KEYS, 11, 20)) > 0 then more = 1 end
    if more == 1 or next_due >= 0 then wake(KEYS[6]) end
  end
end

if leaves then
  -- Kept for a moment, so that a repeat of this turn is still known as one.
  redis.call('HSET', leased, '\tleft', '1')
  if type(redis.pcall('PEXPIRE', leased, 10000)) == 'number' then redis.pcall('ZREM', workers, worker) end
end

if stats_count > 0 then add_counters(queue.prefix, minute, stats_at + 1, stats_count, counters) end
if recent_count > 0 then add_recent(recent, recent_at + 1, recent_count) end
local overdue, outbox = {}, 0
if looks then
  outbox = redis.call('EXISTS', queue.prefix .. 'outbox')
  overdue = lazy().find_overdue(queue, workers, now, lease_ms)
  lazy().trim_dead(queue, now)
end
if line then lazy().call_next(queue.prefix) end
if next(queue.untagged) then lazy().change_tags('ZREM', queue.prefix, queue.untagged) end
if conf[5] then pcall(function() lazy().renew_expiry(queue.prefix, now) end) end
if conf[6] then lazy().write_events(queue.prefix) end
if queue.changed then
  for i = 1, taken do queue.changed[#queue.changed + 1] = ids[i] end
  announce_changes(queue.waiters, queue.changed, 's')
end
return {number, now, held, next_due, more + (queue.has_series and 2 or 0), lost, ids, envelopes, states, overdue, cancelled, (paused and 1 or 0) + (conf[5] and 2 or 0), missing, outbox,
  queue.schedules}
