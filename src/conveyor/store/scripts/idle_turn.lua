-- The turn of a worker that holds nothing and has nothing to report, in many queues at once: renew its leases, and find the
-- queues that need a turn. A queue with nothing to do costs one command.
-- needs: numbers leased look
--
-- KEYS  for each queue: 1 workers  2 leased:<worker>  3 upkeep  4 due  5 dead  6 outbox  7-16 ready:0 … ready:9
-- ARGV  for each queue: 1 worker  2 lease_ms  3 "c" compare: tell also when Redis says that the worker holds something
-- returns now_ms, then for each queue when its first job is due (ms), -1 when none is scheduled, or -2: it needs a turn, since
--         the worker is not registered, or something is to be leased, settled, delivered or removed
local now = clock()
local count = #KEYS / 16
local places, marks = {}, {}
for queue = 1, count do
  local at = 16 * (queue - 1)
  places[#places + 1] = KEYS[at + 4]
  for priority = 7, 16 do places[#places + 1] = KEYS[at + priority] end
  marks[queue] = KEYS[at + 3]
end

-- Read everything first. One command tells in most cases that nothing waits anywhere.
local waits = redis.call('EXISTS', unpack(places)) > 0
local known = redis.call('MGET', unpack(marks))
local answers, looked = {}, {}
for queue = 1, count do
  local at = 16 * (queue - 1)
  answers[queue] = -1
  if waits then
    local due = redis.call('ZRANGE', KEYS[at + 4], 0, 0, 'WITHSCORES')[2]
    if due then answers[queue] = tonumber(due) end
    if (due and tonumber(due) <= now) or redis.call('EXISTS', unpack(KEYS, at + 7, at + 16)) > 0 then answers[queue] = -2 end
  end
  if ARGV[3 * queue] == 'c' and count_held(KEYS[at + 2]) > 0 then answers[queue] = -2 end
  -- The workers of a queue share this look: one of them takes it when the mark of the last one has expired.
  if not known[queue] then
    local lease_ms = number_in(ARGV[3 * queue - 1])
    known[queue] = needs_upkeep(KEYS[at + 1], KEYS[at + 5], KEYS[at + 6], now, lease_ms) and '1' or '0'
    looked[#looked + 1] = queue
  end
  if known[queue] == '1' then answers[queue] = -2 end
end

redis.call('ZREM', KEYS[1], '\t') -- a removal first, so that a full Redis renews too
for queue = 1, count do
  local worker, ends = ARGV[3 * queue - 2], now + number_in(ARGV[3 * queue - 1])
  if redis.call('ZADD', KEYS[16 * (queue - 1) + 1], 'XX', 'CH', ends, worker) == 0 then answers[queue] = -2 end
end
for _, queue in ipairs(looked) do
  redis.pcall('SET', marks[queue], known[queue], 'PX', math.max(1, math.floor(number_in(ARGV[3 * queue - 1]) / 3)))
end
return {now, unpack(answers)}
