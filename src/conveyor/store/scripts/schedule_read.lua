-- Read schedules of a queue.
-- needs: numbers
--
-- KEYS  1 schedules  2 none
-- ARGV  names; none: all that the queue has
-- returns now_ms, then for each: {name, digest, spec, entry, origin, next, paused, last, fired, skipped, runs, declared,
--         skipped as missed, for overlap, while paused, as superseded}, false where not set
local prefix, names = string.sub(KEYS[1], 1, -10), ARGV
if #names == 0 then names = redis.call('SMEMBERS', KEYS[1]) end
local rows = {clock()}
for _, name in ipairs(names) do
  local row = redis.call('HMGET', prefix .. 'schedule:' .. name, 'digest', 'spec', 'entry', 'origin', 'next', 'paused', 'last', 'fired',
    'skipped', 'runs', 'declared', 'skipped:missed', 'skipped:overlap', 'skipped:paused', 'skipped:superseded')
  table.insert(row, 1, name)
  if row[2] then rows[#rows + 1] = row end
end
return rows
