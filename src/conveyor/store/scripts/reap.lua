-- Take a worker's registration away and return what it held to the front, newest first.
--
-- KEYS  1 leased:<worker>  2 workers  3 jobs  4 state  5 wake  6 waiters  7-16 ready:0 … ready:9
-- ARGV  1 worker  2 the end it was seen with (ms), or "" when its death is known or it leaves by itself
--       3 "crash": each job counts a start, and its first crash · "leave": a start only, since it may have begun
--         "blame": a start, and a crash of those in 4, ids by newline, which ended the worker, and in 5, which may have
-- returns the number of jobs returned, or -1 when there is no such worker or it has beaten since
local leased, workers, jobs, state = KEYS[1], KEYS[2], KEYS[3], KEYS[4]
local ends = redis.call('ZSCORE', workers, ARGV[1])
local known = redis.call('HMGET', leased, '\tturn', '\tlease', '\tcancel')
if not ends and not known[1] then return -1 end
if ARGV[2] ~= '' then
  if not ends or tonumber(ends) ~= tonumber(ARGV[2]) then return -1 end
  local now = clock()
  -- An end further ahead than a lease: the clock was stepped back.
  if tonumber(ends) > now and tonumber(ends) <= now + 1.5 * tonumber(known[2] or 0) then return -1 end
end

local held, order = redis.call('HGETALL', leased), {}
for i = 1, #held, 2 do
  if string.byte(held[i]) ~= 9 then order[#order + 1] = {tonumber(held[i + 1]), held[i]} end
end
table.sort(order, function(a, b) return a[1] > b[1] end)
local ids = {}
for i, pair in ipairs(order) do ids[i] = pair[2] end
local envelopes = #ids > 0 and redis.call('HMGET', jobs, unpack(ids)) or {}
local states = #ids > 0 and redis.call('HMGET', state, unpack(ids)) or {}

check('HLEN', KEYS[6])
for i in ipairs(ids) do
  local found = envelopes[i] and marks(envelopes[i])
  check('LLEN', KEYS[7 + (found and found.priority or 0)])
end

redis.call('ZREM', workers, ARGV[1])
redis.call('DEL', leased)
local asked = {}
for id in string.gmatch(known[3] or '', '[^\n]+') do asked[id] = true end

local blamed, near = {}, {}
for id in string.gmatch(ARGV[4] or '', '[^\n]+') do blamed[id] = true end
for id in string.gmatch(ARGV[5] or '', '[^\n]+') do near[id] = true end

local function charge(id, attempts)
  local starts, failures, crashes, doubt, rest = string.match(attempts or '0 0 0', '^(%d+) (%d+) (%d+)([+*]?)(.*)$')
  if not starts then starts, failures, crashes, doubt, rest = 0, '0', 0, '', '' end
  crashes = tonumber(crashes)
  local charged = ARGV[3] == 'crash' or blamed[id] or (near[id] and doubt ~= '*')
  -- Nearness makes a suspect and no more: from one crash on a job is charged before it starts, by whoever starts it.
  if charged and crashes < 1 then crashes = 1 end
  if not charged and doubt ~= '' then crashes = crashes - 1 end
  redis.call('HSET', state, id, int(starts + 1) .. ' ' .. failures .. ' ' .. int(crashes) .. rest)
end

local returned = 0
for i, id in ipairs(ids) do
  local found = envelopes[i] and marks(envelopes[i])
  if not envelopes[i] then
    redis.call('HDEL', state, id)
  elseif asked[id] then
    local record = '{"status":"cancelled","at":' .. int(clock()) .. '}'
    redis.call('HDEL', jobs, id)
    redis.call('HDEL', state, id)
    local prefix = string.sub(jobs, 1, -5)
    redis.call('SET', prefix .. 'result:' .. id, record, 'PX', 600000)
    release(prefix, id, found and found.unique, found and found.own)
    announce(KEYS[6], id, record)
  else
    charge(id, states[i])
    redis.call('LPUSH', KEYS[7 + (found and found.priority or 0)], id)
    returned = returned + 1
  end
end
if returned > 0 then wake(KEYS[5]) end
return returned
