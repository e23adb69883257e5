-- Change a job that waits: when it is due, its priority, and its arguments with the group and the limits that follow from them.
-- needs: numbers keys tokens envelope is_leased events history rights changes limits group_limits groups place_change
--
-- KEYS  1 jobs  2 due  3 wake  4-13 ready:0 … ready:9  14 conf  15 none  16 workers  17 dead
-- ARGV  1 id  2 SHA-1 of its envelope, as the caller has read it  3 delay_ms  4 due_at_ms   "" both: when it is due stays
--       5 priority  6 attributes  7 the envelope behind its first line  8 who asks
-- returns 1 changed · 0 it does not wait, or not any more · -1 its envelope is another by now; with 0 and -1 nothing is changed
local id, jobs, due, none, now = ARGV[1], KEYS[1], KEYS[2], KEYS[15], clock()
local queue = {prefix = string.sub(jobs, 1, -5), jobs = jobs, due = due, conf = KEYS[14]}
local prefix, priority = queue.prefix, tonumber(ARGV[5])
local envelope = redis.call('HGET', jobs, id)
if not envelope or string.byte(envelope) == 120 or redis.call('ZSCORE', KEYS[17], id) then return 0 end
if is_leased(prefix, id, redis.call('ZRANGE', KEYS[16], 0, -1)) then return 0 end
if redis.sha1hex(envelope) ~= ARGV[2] then return -1 end

local before = marks(envelope) or {priority = 0}
local group = group_of(attributes(ARGV[6], {}))
local instant = ARGV[3] ~= '' and now + number_in(ARGV[3]) or ARGV[4] ~= '' and number_in(ARGV[4]) or nil
local later = instant ~= nil and instant > now
local is_behind = follows(prefix, id, before.after)

local head = string.match(envelope, '^([^\t\n]*)')
local older = string.find(head, 'u', 1, true) -- the unique key, in an older layout
if older then head = string.sub(head, 1, older - 1) end
head = string.gsub(head, 'p%d', '')
if later or (instant and is_behind) then
  -- The instant that a schedule has planned stands before the one at which the job is due, and stays.
  local planned = string.match(head, 'd%d+.-d%d+') and string.match(head, 'd%d+')
  head = string.gsub(head, 'd%d+', '') .. (planned and ' ' .. planned or '') .. (later and ' d' .. int(instant) or '')
end
if priority > 0 then head = 'p' .. priority .. ' ' .. head end
head = string.gsub(string.gsub(head, '  +', ' '), '^ *(.-) *$', '%1')

check('ZCARD', due)
check('LLEN', unpack(KEYS, 4, 13))
check('HLEN', queue.conf, prefix .. 'waits', prefix .. 'slots', prefix .. 'waiters', prefix .. 'state')
if group then check('LLEN', prefix .. 'group:' .. priority .. ':' .. group) end
begin_groups(queue)
prove(none, 'HSET', 'LREM', 'ZADD')
prove_groups(none)
prove(none, 'SREM')
redis.call('HSET', jobs, id, head .. ARGV[6] .. ARGV[7])
local state = redis.call('HGET', prefix .. 'state', id)
redis.call('HSET', prefix .. 'state', id, with_event(state, past_event('updated', now, ARGV[8])))
begin_events(redis.call('HGET', queue.conf, 'events'))
if events then note_event('updated', id, envelope, attempt_in(state), 'at', later and int(instant) or '', 'by', ARGV[8]) end
write_events(prefix)

local takeable = change_place(queue, id, envelope, priority, group, instant, now)
pass_on(queue, now, 1)
write_counters(queue)
if takeable or queue.moved or queue.counters.alarms > 0 then wake(KEYS[3]) end
if redis.call('HLEN', prefix .. 'waiters') > 0 then announce_changes(prefix .. 'waiters', {id}, 's') end
return 1
