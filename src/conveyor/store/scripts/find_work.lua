-- Find the queues in which a turn would find something, of many at one server. Nothing is written but when a queue expires.
-- needs: numbers look expiry
--
-- KEYS  for each queue: 1 workers  2 conf  3 none  4 due  5 dead  6-15 ready:0 … ready:9
--       16 the list and 17 the intake of a plain list; of another queue none, twice
-- ARGV  for each queue: lease_ms of the one that asks
-- returns for each queue in how many ms its first job is due, -1 when none is scheduled, or -2: a turn would find something
local now = clock()
local answers, expiring = {}, {}
for queue = 1, #KEYS / 17 do
  local at = 17 * (queue - 1)
  local conf = redis.call('HMGET', KEYS[at + 2], 'paused', 'expires')
  local paused = conf[1] == '1'
  local due = not paused and tonumber(redis.call('ZRANGE', KEYS[at + 4], 0, 0, 'WITHSCORES')[2])
  local waits = not paused and ((due and due <= now) or redis.call('EXISTS', unpack(KEYS, at + 6, at + 17)) > 0)
  local prefix = string.sub(KEYS[at + 2], 1, -5)
  local outbox = prefix .. 'outbox'
  if conf[2] then expiring[#expiring + 1] = prefix end
  if waits or needs_upkeep(KEYS[at + 1], KEYS[at + 5], outbox, now, number_in(ARGV[queue])) then
    answers[queue] = -2
  else
    answers[queue] = due and due - now or -1
  end
end
for _, prefix in ipairs(expiring) do renew_expiry(prefix, now) end
return answers
