-- Expiry of a queue that nobody uses: the field `expires` of conf, in ms. As long as such a queue holds nothing, all of its keys have
-- the same time to live, and every use sets it anew; as long as it holds something, none has one.

-- Set the keys of a queue that expires to the time to live that they must have now. Nothing happens to another queue.
-- prefix   of the queue
-- now      ms
-- fills    true before this step adds a job
-- returns  nothing
local function renew_expiry(prefix, now, fills)
  local conf = redis.call('HMGET', prefix .. 'conf', 'expires', 'stubs', 'waiting')
  if not conf[1] then return end
  local expires = tonumber(conf[1])
  local holds = fills or redis.call('HLEN', prefix .. 'jobs') > tonumber(conf[2] or 0) or tonumber(conf[3] or 0) > 0
    or redis.call('EXISTS', prefix .. 'outbox', prefix .. 'schedules') > 0
  -- An end that was set within the last seconds is late enough: an idle worker need not set it at each of its turns.
  local left = redis.call('PTTL', prefix .. 'conf')
  if holds and left == -1 or not holds and left > expires then return end
  local names = {
    'conf', 'jobs', 'state', 'due', 'dead', 'recent', 'workers', 'waiters', 'reruns', 'room', 'tickets', 'waits', 'limits', 'slots', 'credits',
  }
  for priority = 0, 9 do names[#names + 1] = 'ready:' .. priority end
  for _, worker in ipairs(redis.call('ZRANGE', prefix .. 'workers', 0, -1)) do names[#names + 1] = 'leased:' .. worker end
  for _, name in ipairs(names) do
    if holds then redis.call('PERSIST', prefix .. name)
    else redis.call('PEXPIREAT', prefix .. name, string.format('%.0f', now + expires + 5000)) end
  end
end
