-- Add parts to the streams of jobs that run.
-- needs: numbers keys rights changes parts
--
-- KEYS  1 leased:<worker>  2 waiters  3 none
-- ARGV  1 ms that a stream is kept  then for each job: id, parts as lib/parts.lua reads them
-- returns for each job 1, or 0 when the worker does not hold it any more: then nothing was added
local leased, waiters, prefix = KEYS[1], KEYS[2], string.sub(KEYS[2], 1, -8)
local held, changed = {}, {}
for i = 2, #ARGV, 2 do
  held[#held + 1] = redis.call('HEXISTS', leased, ARGV[i])
  new_parts(prefix .. 'stream:' .. ARGV[i], ARGV[i + 1])
end
check('HLEN', waiters)
prove(KEYS[3], 'XADD', 'PEXPIRE', 'HMGET')
for i, is_held in ipairs(held) do
  if is_held == 1 then
    add_parts(prefix .. 'stream:' .. ARGV[2 * i], ARGV[2 * i + 1], ARGV[1])
    changed[#changed + 1] = ARGV[2 * i]
  end
end
if #changed > 0 then announce_changes(waiters, changed, 'p') end
return held
