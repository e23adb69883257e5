-- The use of a limit, as people are told it.

-- Count what a limit has let pass: jobs that run under a concurrency, or what a rate has spent in its window.
-- queue    as for load_limits
-- s        its state
-- now      ms
-- returns  a number
local function used_of(queue, s, now)
  if s.kind ~= 'r' then return s.count end
  if not s.free then read_rate(queue, s, now) end
  if s.smooth then return 1 - s.free end
  if s.kept == 'string' then return s.most - s.free end
  if not s.starts or s.free < s.most then return math.max(0, s.n - s.free) end
  -- Of a list only the oldest starts were read, and none of them counts: the first that does not is looked for, as they fall.
  local key, low, high = queue.prefix .. 'rate:' .. s.name, 0, s.n - s.most
  while low < high do
    local middle = math.floor((low + high) / 2)
    local start = tonumber(redis.call('LINDEX', key, int(middle)) or nil)
    if start and start > now - s.per then low = middle + 1 else high = middle end
  end
  return low
end
