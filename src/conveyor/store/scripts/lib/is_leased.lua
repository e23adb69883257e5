-- Whether a job is leased. Apart from lib/leased.lua, since a push would make the functions of that one for nothing.

-- Tell whether a worker holds a job.
-- prefix   of the queue's keys
-- id       of the job
-- workers  the identities of all workers of the queue; nil: they are read here
-- returns  true or false
local function is_leased(prefix, id, workers)
  for _, worker in ipairs(workers or redis.call('ZRANGE', prefix .. 'workers', 0, -1)) do
    if redis.call('HEXISTS', prefix .. 'leased:' .. worker, id) == 1 then return true end
  end
  return false
end
