-- Read all that is known of one job.
-- needs: numbers kept_result ended_mark leased
--
-- KEYS  1 jobs  2 state  3 due  4 dead  5 workers  6 result:<id>  7 results:<window>
-- ARGV  1 id
-- returns {place, envelope or "", state or "", extra}    place: ready scheduled leased dead result ended cancelled none
--         ended: well, and no record is kept · cancelled: a stub without a record · none: not known, or no longer
--         extra: due or death in ms, the worker that holds it, the record of its outcome, the mark of an end (lib/ended.lua),
--         or "1" for an own id that was here within a day
--         and of a leased job: since when (ms, or ""), and what its worker said of itself
local prefix, id = string.sub(KEYS[1], 1, -5), ARGV[1]
local envelope = redis.call('HGET', KEYS[1], id)
local attempts = redis.call('HGET', KEYS[2], id) or ''
if not envelope or string.byte(envelope) == 120 then
  local record = kept_result(KEYS[6], KEYS[7], id)
  if record then return {'result', '', '', record} end
  if envelope then return {'cancelled', '', '', ''} end
  local mark, known = ended_mark(prefix, id)
  if mark then return {'ended', '', '', mark} end
  return {'none', '', '', known and '1' or ''}
end
local due = redis.call('ZSCORE', KEYS[3], id)
if due then return {'scheduled', envelope, attempts, int(tonumber(due))} end
local died = redis.call('ZSCORE', KEYS[4], id)
if died then return {'dead', envelope, attempts, int(tonumber(died))} end
for _, worker in ipairs(redis.call('ZRANGE', KEYS[5], 0, 999)) do
  local held = redis.call('HMGET', prefix .. 'leased:' .. worker, id, '\tabout')
  if held[1] then return {'leased', envelope, attempts, worker, leased_at(held[1]) or '', held[2] or ''} end
end
return {'ready', envelope, attempts, ''}
