-- Read all that is known of one job.
-- needs: numbers kept_result
--
-- KEYS  1 jobs  2 state  3 due  4 dead  5 workers  6 result:<id>  7 results:<window>
-- ARGV  1 id
-- returns {place, envelope or "", state or "", extra}    place: ready scheduled leased dead cancelled result none
--         extra: due or death in ms, the worker that holds it, or the record of its outcome
local prefix, id = string.sub(KEYS[1], 1, -5), ARGV[1]
local envelope = redis.call('HGET', KEYS[1], id)
local attempts = redis.call('HGET', KEYS[2], id) or ''
if not envelope or string.byte(envelope) == 120 then
  local record = kept_result(KEYS[6], KEYS[7], id)
  if record then return {'result', '', '', record} end
  if envelope then return {'cancelled', '', '', ''} end
  return {'none', '', '', redis.call('EXISTS', prefix .. 'unique:i:' .. id) == 1 and '1' or ''}
end
local due = redis.call('ZSCORE', KEYS[3], id)
if due then return {'scheduled', envelope, attempts, int(tonumber(due))} end
local died = redis.call('ZSCORE', KEYS[4], id)
if died then return {'dead', envelope, attempts, int(tonumber(died))} end
for _, worker in ipairs(redis.call('ZRANGE', KEYS[5], 0, 999)) do
  if redis.call('HEXISTS', prefix .. 'leased:' .. worker, id) == 1 then return {'leased', envelope, attempts, worker} end
end
return {'ready', envelope, attempts, ''}
