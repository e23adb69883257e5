-- Changes of what limits allow.

-- Move on what waits at limits whose definition has changed, at most 10,000 groups: those behind them go on when their limit is
-- touched next, as ever.
-- queue    as begin_groups makes it
-- changed  function(limit) returns true when that limit may have changed
-- now      ms
-- returns  nothing
local function touch_changed(queue, changed, now)
  local cursor, seen = '0', 0
  repeat
    local page = redis.call('HSCAN', queue.prefix .. 'waits', cursor, 'COUNT', 1000)
    cursor = page[1]
    for i = 2, #page[2], 2 do
      seen = seen + 1
      if changed(page[2][i]) then touch(queue, {page[2][i]}) end
    end
  until cursor == '0' or seen >= 10000
  pass_on(queue, now, 1)
  write_counters(queue)
end
