-- Count what several queues of one server hold, and what ended there in the last whole minutes.
-- needs: numbers leased counts worker_rows
--
-- KEYS  1… jobs of each queue, about a hundred at most
-- ARGV  1 number of minutes, the one that goes on now left out  2 "1" when the workers are listed, else ""
-- returns {now_ms, counts, oldest, ended, workers, left}, of as many queues, from the first on, as have a thousand workers and counters together
--         counts: fourteen numbers of each queue, as counts.lua returns them, of 8 bytes each: a text costs a third of an array of
--         arrays here, and less still to read. The entries of a plain list are left out.
--         oldest: (number of a queue, its oldest ready id, the marks of its envelope)… of the queues that have one
--         ended: of each queue and minute, the oldest first, the attempts that were done, failed and tried again, in the same
--         form; -1 -1 -1 where a minute has too many counters to read
--         workers: as worker_rows returns them
--         left: of each queue, when minutes are asked for, the jobs that workers ended in the last whole minute and in the one that
--         goes on, in the same form; -1 where there are too many counters
local now, minutes = clock(), number_in(ARGV[1])
local minute = math.floor(now / 60000)
local counts, oldest_of, ended, left, none, work = {}, {}, {}, {}, {}, 0
local names, nothing = {}, struct.pack('<i8i8i8', 0, 0, 0)
for one = minute - minutes, minute do names[#names + 1] = 'stats:' .. int(one) end

local function add_counts(number, ready, scheduled, leased, dead, workers, paused, max_length, foreign, outbox, unplaced, waiting,
  blocked, dropped, silent, oldest, marks)
  counts[number] = struct.pack('<i8i8i8i8i8i8i8i8i8i8i8i8i8i8', ready, scheduled, leased, dead, workers, paused, max_length, foreign, outbox,
    unplaced, waiting, blocked, dropped, silent)
  if oldest ~= '' then
    local at = #oldest_of
    oldest_of[at + 1], oldest_of[at + 2], oldest_of[at + 3] = number, oldest, marks
  end
  work = work + workers + silent
end

local function add_ended(prefix)
  for number, name in ipairs(names) do
    local stats, packed, gone = prefix .. name, nothing, 0
    local fields = redis.call('HLEN', stats)
    if fields > 1000 then packed, gone = struct.pack('<i8i8i8', -1, -1, -1), -1
    elseif fields > 0 then
      local counters, sums = redis.call('HGETALL', stats), {done = 0, failed = 0, retried = 0, cancelled = 0, expired = 0}
      for at = 1, #counters, 2 do
        local kind = string.match(counters[at], '^(%a+):')
        if sums[kind] then sums[kind] = sums[kind] + tonumber(counters[at + 1]) end
      end
      work, packed = work + fields, struct.pack('<i8i8i8', sums.done, sums.failed, sums.retried)
      gone = sums.done + sums.failed - sums.retried + sums.cancelled + sums.expired
    end
    if number <= minutes then ended[#ended + 1] = packed end
    if number >= minutes then left[#left + 1] = struct.pack('<i8', gone) end
  end
end

local current
local function note(...) add_worker(current, ...) end
if ARGV[2] ~= '1' then note = nil end

for number, key in ipairs(KEYS) do
  if work >= 1000 then break end
  local prefix = string.sub(key, 1, -5)
  current = number
  add_counts(number, count_queue(prefix, key, none, now, note))
  if minutes > 0 then add_ended(prefix) end
end
return {now, table.concat(counts), oldest_of, table.concat(ended), worker_rows(), table.concat(left)}
