-- Changes of jobs that live, for those that watch them. An entry of `waiters` that begins with a star wants them all.

-- Tell the processes that watch jobs that these have changed. Nobody loses a job if it is not told, so nothing fails for it.
-- waiters  key waiters
-- ids      of the jobs
-- what     "s" the state, "p" new parts of its stream
-- returns  nothing
local function announce_changes(waiters, ids, what)
  for first = 1, #ids, 7000 do
    local channels = redis.call('HMGET', waiters, unpack(ids, first, math.min(first + 6999, #ids)))
    for i = 1, #channels do
      for channel in string.gmatch(channels[i] or '', '%*(%S+)') do
        redis.pcall('PUBLISH', channel, '\t' .. ids[first + i - 1] .. '\n' .. what)
      end
    end
  end
end
