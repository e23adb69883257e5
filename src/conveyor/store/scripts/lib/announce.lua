-- The news that a job has ended, for the processes that wait for it (key waiters).

-- Tell processes how a job ended, and forget that they wait.
-- waiters  key waiters
-- id       of the job
-- channels those of the processes, as waiters holds them
-- record   JSON; of a success that keeps no record "" without a value and "+" with one
-- returns  nothing
local function announce_to(waiters, id, channels, record)
  if redis.call('HDEL', waiters, id) == 0 then return end
  -- A user may not publish, perhaps. The job has ended all the same, and callers look again after seconds.
  for channel in string.gmatch(channels, '%*?(%S+)') do -- a star: it watches (lib/changes.lua)
    redis.pcall('PUBLISH', channel, id .. '\n' .. record)
  end
end
