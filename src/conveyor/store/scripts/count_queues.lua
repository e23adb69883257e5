-- Count what several queues of one server hold, and what ended there in the last whole minutes.
-- needs: numbers leased counts
--
-- KEYS  1… jobs of each queue, about a hundred at most
-- ARGV  1 number of minutes, the one that goes on now left out
-- returns for each queue {counts, ended}    counts: as counts.lua returns them, without the entries of a plain list
--         ended: of each minute, the oldest first, the attempts that were done, failed and tried again; -1 -1 -1 where a minute
--         has too many counters to read
local now, reply = clock(), {}
local minute = math.floor(now / 60000)
for i, key in ipairs(KEYS) do
  local prefix, ended = string.sub(key, 1, -5), {}
  for one = minute - tonumber(ARGV[1]), minute - 1 do
    local stats, sums = prefix .. 'stats:' .. int(one), {done = 0, failed = 0, retried = 0}
    local fields = redis.call('HLEN', stats)
    if fields > 1000 then sums = {done = -1, failed = -1, retried = -1}
    elseif fields > 0 then
      local counters = redis.call('HGETALL', stats)
      for at = 1, #counters, 2 do
        local kind = string.match(counters[at], '^(%a+):')
        if sums[kind] then sums[kind] = sums[kind] + tonumber(counters[at + 1]) end
      end
    end
    ended[#ended + 1], ended[#ended + 2], ended[#ended + 3] = sums.done, sums.failed, sums.retried
  end
  reply[i] = {count_queue(prefix, {}, now), ended}
end
return reply
