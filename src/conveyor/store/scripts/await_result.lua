-- Read how a job ended, or register a process that waits for it.
-- needs: numbers listed waiters kept_result ended_mark
--
-- KEYS  1 jobs  2 state  3 dead  4 waiters  5 result:<id>  6 results:<window>
-- ARGV  1 id  2 channel of the waiting process, "" to ask only  3 "1" for a spawned job, which may not have arrived yet
-- returns {"result", record} · {"dead", state} · {"waiting"} not finished
--         {"ended", mark} ended well, and no record is kept (lib/ended.lua) · {"gone"} not known, or no longer
local record = kept_result(KEYS[5], KEYS[6], ARGV[1])
if record then return {'result', record} end
local envelope = redis.call('HGET', KEYS[1], ARGV[1])
if not envelope then
  local mark, known = ended_mark(string.sub(KEYS[1], 1, -5), ARGV[1])
  if mark then return {'ended', mark} end
  if known or ARGV[3] ~= '1' then return {'gone'} end
elseif string.byte(envelope) == 120 then
  return {'gone'}
end
if redis.call('ZSCORE', KEYS[3], ARGV[1]) then return {'dead', redis.call('HGET', KEYS[2], ARGV[1]) or ''} end
if ARGV[2] == '' then return {'waiting'} end
add_waiter(KEYS[4], ARGV[1], ARGV[2])
return {'waiting'}
