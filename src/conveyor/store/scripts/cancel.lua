-- Cancel or delete a job, wherever it is. A leased one is asked of its worker.
--
-- KEYS  1 jobs  2 state  3 due  4 dead  5 workers  6 conf  7 waiters
-- ARGV  1 id  2 "cancel" leaves a record, "delete" leaves nothing and takes dead letters too
-- returns 1 gone · 2 asked of the worker that runs it · 0 finished or unknown · -1 leased (delete only)
local jobs, state, id = KEYS[1], KEYS[2], ARGV[1]
local prefix = string.sub(jobs, 1, -5)
local envelope = redis.call('HGET', jobs, id)
if not envelope then return 0 end
local found = marks(envelope)
if found and found.stub then return 0 end
local buried = redis.call('ZSCORE', KEYS[4], id)
if buried and ARGV[2] == 'cancel' then return 0 end

check('HLEN', state, KEYS[6], KEYS[7])
local workers = redis.call('ZRANGE', KEYS[5], 0, -1)

local function forget(record)
  redis.call('HDEL', state, id)
  if record then redis.call('SET', prefix .. 'result:' .. id, record, 'PX', 600000) end
  release(prefix, id, found and found.unique, found and found.own)
  announce(KEYS[7], id, record or '{"status":"cancelled"}')
end
local record = ARGV[2] == 'cancel' and '{"status":"cancelled","at":' .. int(clock()) .. '}' or nil

if redis.call('ZREM', KEYS[3], id) == 1 or (buried and redis.call('ZREM', KEYS[4], id) == 1) then
  redis.call('HDEL', jobs, id)
  forget(record)
  return 1
end
for _, worker in ipairs(workers) do
  local leased = prefix .. 'leased:' .. worker
  if redis.call('HEXISTS', leased, id) == 1 then
    if ARGV[2] == 'delete' then return -1 end
    local asked = redis.call('HGET', leased, '\tcancel')
    if not (asked and string.find('\n' .. asked .. '\n', '\n' .. id .. '\n', 1, true)) then
      redis.call('HDEL', leased, '\t')
      redis.call('HSET', leased, '\tcancel', asked and asked .. '\n' .. id or id)
    end
    local call = prefix .. 'wake:' .. worker
    if redis.call('EXISTS', call) == 0 then redis.call('RPUSH', call, '1') end
    redis.call('PEXPIRE', call, 60000)
    return 2
  end
end
-- It stands in a ready list, which is never searched: leave a stub for the turn that reaches its entry.
redis.call('HDEL', state, id)
redis.call('HSET', jobs, id, 'x' .. string.match(envelope, '^[^\n]*') .. '\n')
redis.call('HINCRBY', KEYS[6], 'stubs', 1)
forget(record)
return 1
