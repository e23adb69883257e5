-- Promoting: jobs that are due join the ready lists.

-- Move due jobs to the tail of their priority, at most 200 a turn. No step leaves an entry without an envelope, so a job that
-- has none was lost by the server (evicted, or deleted by hand). It is reported once, when its entry is removed.
-- queue    fields jobs, due and ready are used
-- first    the first entry of due and its score; nil when it may have changed
-- now      ms
-- missing  ids without an envelope are added to this list
-- returns  when the next job is due (ms; nil: none is scheduled), true when a promoted job has a priority above 0
local function promote_due(queue, first, now, missing)
  local urgent = false
  first = first or redis.call('ZRANGE', queue.due, 0, 0, 'WITHSCORES')
  if first[2] and tonumber(first[2]) <= now then
    local ids = redis.call('ZRANGE', queue.due, '-inf', now, 'BYSCORE', 'LIMIT', 0, 200)
    local envelopes = redis.call('HMGET', queue.jobs, unpack(ids))
    redis.call('ZREM', queue.due, unpack(ids))
    for i, id in ipairs(ids) do
      if envelopes[i] then
        local priority = priority_of(envelopes[i])
        if priority > 0 then urgent = true end
        redis.call('RPUSH', KEYS[queue.ready + priority], id)
      else
        missing[#missing + 1] = id
      end
    end
    first = redis.call('ZRANGE', queue.due, 0, 0, 'WITHSCORES')
  end
  return tonumber(first[2]), urgent
end
