-- Promoting: jobs that are due join the ready lists.

-- Move due jobs to the tail of their priority, at most 200 a turn. No step leaves an entry without an envelope, so a job that
-- has none was lost by the server (evicted, or deleted by hand). It is reported once, when its entry is removed.
-- Jobs that wait for a retry and keep their group's slot come back to the front of their group; alarms of limits are rung.
-- queue    fields jobs, due and ready are used, and what begin_groups makes; to schedules the names of schedules are added that have come
-- now      ms
-- missing  ids without an envelope are added to this list
-- returns  when the next job is due (ms; nil: none is scheduled), true when a promoted job has a priority above 0
local function promote_due(queue, now, missing)
  local urgent = false
  local first = redis.call('ZRANGE', queue.due, 0, 0, 'WITHSCORES')
  if first[2] and tonumber(first[2]) <= now then
    local ids = redis.call('ZRANGE', queue.due, '-inf', now, 'BYSCORE', 'LIMIT', 0, 200)
    local envelopes = redis.call('HMGET', queue.jobs, unpack(ids))
    redis.call('ZREM', queue.due, unpack(ids))
    local grouped, alarms = {}, {}
    for i, id in ipairs(ids) do
      local envelope = envelopes[i]
      local found = envelope and string.byte(envelope) ~= 10 and marks(envelope)
      local group = found and group_of(found)
      if group then
        grouped[#grouped + 1] = {id, found.priority, group}
        if queue.changed then queue.changed[#queue.changed + 1] = id end
      elseif envelope then
        local priority = found and found.priority or 0
        if priority > 0 then urgent = true end
        redis.call('RPUSH', KEYS[queue.ready + priority], id)
        if queue.changed then queue.changed[#queue.changed + 1] = id end
      elseif string.byte(id, 2) == 9 then
        -- The alarm of a schedule: this worker carries it out, and another one is asked when it does not.
        queue.schedules[#queue.schedules + 1] = string.sub(id, 3)
        redis.call('ZADD', queue.due, now + 2000, id)
      elseif string.byte(id) == 9 then
        alarms[#alarms + 1] = string.sub(id, 2)
      else
        missing[#missing + 1] = id
      end
    end
    if #alarms > 0 then ring(queue, alarms, now) end
    if #grouped > 0 and rejoin(queue, grouped, now) then urgent = true end
    first = redis.call('ZRANGE', queue.due, 0, 0, 'WITHSCORES')
  end
  return tonumber(first[2]), urgent
end
