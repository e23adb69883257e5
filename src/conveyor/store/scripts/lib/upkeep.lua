-- Upkeep: what a worker does for the whole queue, a few times a lease. The turn is done by then, and does not fail for it.

-- Find the workers that seem to be dead: those whose lease ends within half a lease, and those whose end lies further ahead
-- than their own lease allows, because the clock was set back.
-- queue     field prefix is used
-- workers   key workers
-- now       ms
-- lease_ms  lease of the worker that asks
-- returns   (worker, end)…
local function find_overdue(queue, workers, now, lease_ms)
  local overdue = redis.call('ZRANGE', workers, '-inf', now + lease_ms / 2, 'BYSCORE', 'LIMIT', 0, 100, 'WITHSCORES')
  local ahead = redis.call('ZRANGE', workers, now + 1.5 * lease_ms, '+inf', 'BYSCORE', 'LIMIT', 0, 100, 'WITHSCORES')
  for i = 1, #ahead, 2 do
    local own = tonumber(redis.call('HGET', queue.prefix .. 'leased:' .. ahead[i], '\tlease') or 0)
    if tonumber(ahead[i + 1]) > now + 1.5 * own then
      overdue[#overdue + 1], overdue[#overdue + 2] = ahead[i], ahead[i + 1]
    end
  end
  return overdue
end

-- Remove dead letters that are older than 90 days, or the oldest of more than 100,000; at most 100 a turn.
-- queue    fields jobs, state, dead and untagged are used
-- now      ms
-- returns  nothing
local function trim_dead(queue, now)
  local old = redis.call('ZRANGE', queue.dead, '-inf', now - 7776000000, 'BYSCORE', 'LIMIT', 0, 100)
  if #old == 0 and redis.call('ZCARD', queue.dead) > 100000 then old = redis.call('ZRANGE', queue.dead, 0, 99) end
  if #old > 0 and type(redis.pcall('ZREM', queue.dead, unpack(old))) == 'number' then
    for i, envelope in ipairs(redis.call('HMGET', queue.jobs, unpack(old))) do
      local found = envelope and marks(envelope)
      if found then list_tags(queue.untagged, found.tags, old[i]) end
    end
    redis.call('HDEL', queue.jobs, unpack(old))
    redis.call('HDEL', queue.state, unpack(old))
  end
end
