-- Remove a worker's registration and return the jobs that it held to the front, so that the oldest is leased first.
-- needs: numbers keys listed tokens envelope tags unique events announce outcome leased_order rights changes limits shut_tasks paused_tasks group_limits groups worker_name serving room expiry
--
-- KEYS  1 leased:<worker>  2 workers  3 jobs  4 state  5 wake  6 waiters  7-16 ready:0 … ready:9  17 none
--       18 due  19 conf
-- ARGV  1 worker  2 the end it was seen with (ms), or "" when its death is known or it leaves by itself
--       3 "crash": each job counts a start, and its first crash · "leave": a start only, since it may have begun
--         "blame": a start, and a crash of those in 4, ids by newline, which ended the worker, and in 5, which may have
--       4, 5 as said  6 what ended the worker, in words: each crash leaves an error that says so; "": none  7 how long ago, in ms
-- returns the number of jobs returned, or -1 when there is no such worker or it has renewed its lease since
local leased, workers, jobs, state = KEYS[1], KEYS[2], KEYS[3], KEYS[4]
local ends = redis.call('ZSCORE', workers, ARGV[1])
local known = redis.call('HMGET', leased, '\tturn', '\tlease', '\tcancel', '\tabout')
if not ends and not known[1] then return -1 end
if ARGV[2] ~= '' then
  if not ends or tonumber(ends) ~= tonumber(ARGV[2]) then return -1 end
  local now = clock()
  -- An end further ahead than a lease: the clock was set back.
  if tonumber(ends) > now and tonumber(ends) <= now + 1.5 * tonumber(known[2] or 0) then return -1 end
end

local ids = ids_in_order(leased)
local envelopes = #ids > 0 and redis.call('HMGET', jobs, unpack(ids)) or {}
local states = #ids > 0 and redis.call('HMGET', state, unpack(ids)) or {}
local queue = {
  prefix = string.sub(jobs, 1, -5), jobs = jobs, state = state, waiters = KEYS[6], due = KEYS[18], conf = KEYS[19],
}
local conf = redis.call('HMGET', queue.conf, 'paused_tasks', 'expires', 'events')
queue.tasks = read_paused(conf[1])
local function set_of(text)
  local found = {}
  for id in string.gmatch(text or '', '[^\n]+') do found[id] = found[id] or '' end
  for id, by in string.gmatch(text or '', '\t([^\t\n]+)\t([^\n]*)') do found[id] = by end
  return found
end
local asked, blamed, near = set_of(known[3]), set_of(ARGV[4]), set_of(ARGV[5])
local lists, groups, grouped, keyed = {}, {}, {}, false
check('HLEN', KEYS[6])
local line = known[3] and redis.call('HGET', string.sub(jobs, 1, -5) .. 'conf', 'line')
for i, id in ipairs(ids) do
  local found = envelopes[i] and marks(envelopes[i])
  local priority = found and found.priority or 0
  local group = found and group_of(found) or paused_group(queue, priority, envelopes[i])
  lists[i], keyed = KEYS[7 + priority], keyed or asked[id] and found and found.keys
  check('LLEN', lists[i])
  if group then
    groups[i], grouped[#grouped + 1] = {priority, group}, id
    check('LLEN', queue.prefix .. 'group:' .. priority .. ':' .. group)
  elseif not envelopes[i] then
    grouped[#grouped + 1] = id -- lost by the server, with slots perhaps
  end
end
if #grouped > 0 then begin_groups(queue) end
local now = clock()
local name = name_of(known[4] or '') or ARGV[1]
local died = int(now - number_in(ARGV[7] or '0'))
local crash = string.format(',"at":%s,"type":"crashed","message":%s,"worker":%s}', died, cjson.encode(ARGV[6] or ''), cjson.encode(name))
prove(queue.prefix .. 'none', 'ZREM', 'DEL', 'HSET', 'HDEL', 'SET', 'GET', 'PEXPIRE', 'HGET', 'LPUSH')
if keyed then -- one that ends gives back its keys, and its successor takes its place
  check('HLEN', queue.prefix .. 'reruns')
  prove(queue.prefix .. 'none', 'ZADD', 'RPUSH')
end
if #grouped > 0 then prove_groups(queue.prefix .. 'none') end
redis.call('ZREM', workers, ARGV[1])
redis.call('DEL', leased)
note_seen(queue.prefix .. 'conf', known[4] or '', now)
local function charge(id, attempts)
  local starts, failures, crashes, doubt, rest = string.match(attempts or '0 0 0', '^(%d+) (%d+) (%d+)([+*]?)(.*)$')
  if not starts then starts, failures, crashes, doubt, rest = 0, '0', 0, '', '' end
  crashes = tonumber(crashes)
  local charged = ARGV[3] == 'crash' or blamed[id] or (near[id] and doubt ~= '*')
  -- A job that was near a crash is a suspect and no more: from one crash on, the worker that starts it charges it before.
  if charged and crashes < 1 then crashes = 1 end
  if not charged and doubt ~= '' then crashes = crashes - 1 end
  if charged and (ARGV[6] or '') ~= '' then rest = rest .. '\n{"attempt":' .. int(starts + 1) .. crash end
  redis.call('HSET', state, id, int(starts + 1) .. ' ' .. failures .. ' ' .. int(crashes) .. rest)
end

-- Count what a worker has lost, among the sums of all time, which metrics read. One that leaves by itself loses nothing.
if ARGV[3] ~= 'leave' and #ids > 0 then
  redis.pcall('HINCRBY', queue.prefix .. 'stats:total', 'lost', #ids)
  redis.pcall('EXPIRE', queue.prefix .. 'stats:total', 2678400)
end

begin_events(conf[3])
local returned, untagged = 0, {}
for i = #ids, 1, -1 do
  local id = ids[i]
  if not envelopes[i] then
    redis.call('HDEL', state, id)
  elseif asked[id] then
    if events then note_event('cancelled', id, envelopes[i], attempt_in(states[i]), 'w', name, 'by', asked[id]) end
    local found = marks(envelopes[i]) or {}
    redis.call('HDEL', jobs, id)
    list_tags(untagged, found.tags, id)
    finish(queue, id, 600000, cancelled_record(now, nil, asked[id]), found)
    count_end(queue.prefix, 'cancelled', envelopes[i])
  else
    if events then note_event('returned', id, envelopes[i], attempt_in(states[i]), 'w', name, 'why', ARGV[3] == 'leave' and 'handed back' or 'crashed') end
    charge(id, states[i])
    if groups[i] then join_group(queue, groups[i][1], groups[i][2], id, true)
    else redis.call('LPUSH', lists[i], id) end
    returned = returned + 1
  end
end
change_tags('ZREM', queue.prefix, untagged)
if #grouped > 0 then
  give_back(queue, grouped)
  pass_on(queue, now, 1)
  write_counters(queue)
end
-- The worker may have taken a token, or been the one that is first at the next alarm: another one sees to what is ready or due.
if redis.pcall('EXISTS', KEYS[18], unpack(KEYS, 7, 16)) ~= 0 then wake(KEYS[5]) end
if redis.call('HLEN', queue.waiters) > 0 then announce_changes(queue.waiters, ids, 's') end
if line then call_next(queue.prefix) end
if conf[2] then pcall(function() renew_expiry(queue.prefix, now) end) end
write_events(queue.prefix)
return returned
