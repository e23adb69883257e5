-- The processes that wait for a job (key waiters): of each id their channels, with a space between them.

-- Add a process to those that wait for a job.
-- waiters  key waiters
-- id       of the job
-- channel  of the process
-- returns  nothing
local function add_waiter(waiters, id, channel)
  local waiting = redis.call('HGET', waiters, id)
  redis.call('HDEL', waiters, '\t') -- a removal first, so that a full Redis takes the rest
  if not waiting then
    redis.call('HSET', waiters, id, channel)
  elseif not listed(waiting, ' ', channel) then
    redis.call('HSET', waiters, id, waiting .. ' ' .. channel)
  end
end
