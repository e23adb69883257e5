-- Release jobs that are pinned to a build: any worker may run them. One page of the queue's jobs.
-- needs: numbers keys rights tokens
--
-- KEYS  1 jobs  2 due  3 wake  4 none
-- ARGV  1 cursor  2 the build  3 how many jobs are looked at, about
-- returns {next cursor, jobs that were released}
local now = clock()
local page = redis.call('HSCAN', KEYS[1], ARGV[1], 'COUNT', ARGV[3])
local pin, released = '\t{"pin":"' .. ARGV[2] .. '"', 0
check('ZCARD', KEYS[2])
redis.call('HDEL', KEYS[1], '\t') -- a removal first, so that a full Redis takes what follows
prove(KEYS[4], 'HSET', 'ZSCORE', 'ZADD')
for i = 1, #page[2], 2 do
  local id, envelope = page[2][i], page[2][i + 1]
  local head = string.find(envelope, '\n', 1, true)
  local tab = head and string.find(envelope, '\t', head + 1, true)
  local line = head and string.find(envelope, '\n', head + 1, true)
  -- The pin is the first member of the options behind the task, in the second line.
  if tab and line and tab < line and string.sub(envelope, tab, tab + #pin - 1) == pin then
    redis.call('HSET', KEYS[1], id, string.sub(envelope, 1, tab) .. '{"pin":""' .. string.sub(envelope, tab + #pin))
    if redis.call('ZSCORE', KEYS[2], id) then redis.call('ZADD', KEYS[2], 'XX', now, id) end
    released = released + 1
  end
end
if released > 0 then wake(KEYS[3]) end
return {page[1], released}
