-- Make scheduled jobs ready now. One step of a walk.
-- needs: numbers keys tokens envelope rights leased leased_order heads walk
--
-- KEYS  1 due  2 jobs  3 wake  4-13 ready:0 … ready:9
-- ARGV  1… as in lib/walk.lua; of those that it finds the scheduled ones
-- returns {now_ms, 1 at the end, cursor, looked at, ids that may be chosen, ids that are ready now…}
local prefix, moved, gone = string.sub(KEYS[2], 1, -5), {}, {}
local walk = walk_jobs(prefix, 1, false, 4)
local envelopes = {}
for i, job in ipairs(walk.found) do
  envelopes[i] = redis.call('HGET', KEYS[2], job.id)
  check('LLEN', KEYS[4 + priority_of(envelopes[i])])
end
if #walk.found > 0 then prove(prefix .. 'none', 'ZREM', 'RPUSH') end
for i, job in ipairs(walk.found) do
  if redis.call('ZREM', KEYS[1], job.id) == 1 and envelopes[i] then
    redis.call('RPUSH', KEYS[4 + priority_of(envelopes[i])], job.id)
    moved[#moved + 1], gone[job.id] = job.id, true
  end
end
if #moved > 0 then wake(KEYS[3]) end
local reply = reply_of(walk, gone)
for _, id in ipairs(moved) do reply[#reply + 1] = id end
return reply
