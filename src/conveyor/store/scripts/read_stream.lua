-- Read parts of a job's stream, or register a process that waits for more.
-- needs: numbers listed waiters kept_result ended_mark
--
-- KEYS  1 jobs  2 dead  3 waiters  4 result:<id>  5 results:<window>  6 stream:<id>
-- ARGV  1 id  2 channel of the waiting process, "" to ask only  3 the parts after this one, "" for all  4 how many at most
--       5 "1" for a spawned job, which may not have arrived yet
-- returns {"more" | "open" | "ended" | "gone", entries (id, {field, part})…}   more: read on at once · open: the job lives
--         gone: not known, or no longer
local id, channel, limit = ARGV[1], ARGV[2], tonumber(ARGV[4])
local parts = redis.call('XRANGE', KEYS[6], ARGV[3] == '' and '-' or '(' .. ARGV[3], '+', 'COUNT', limit)
if #parts == limit then return {'more', parts} end
local envelope = redis.call('HGET', KEYS[1], id)
local is_dead = redis.call('ZSCORE', KEYS[2], id)
if not envelope then
  local mark, known = ended_mark(string.sub(KEYS[1], 1, -5), id)
  local ended = mark or known or #parts > 0 or redis.call('EXISTS', KEYS[6]) == 1 or kept_result(KEYS[4], KEYS[5], id)
  if ended then return {'ended', parts} end
  if ARGV[5] ~= '1' then return {'gone', parts} end
elseif is_dead or string.byte(envelope) == 120 then
  return {'ended', parts}
end
if channel ~= '' then add_waiter(KEYS[3], id, channel) end
return {'open', parts}
