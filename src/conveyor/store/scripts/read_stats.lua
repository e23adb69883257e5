-- Read what ended in a queue, minute by minute or hour by hour, and task by task; about 1,000 counters a call.
-- needs: numbers
--
-- KEYS  1 jobs  2 none
-- ARGV  1 "minutes" or "hours"  2 the first  3 the last, since the epoch  4 the task that is wanted, "" for all
-- returns {the first that was not read (the last + 1: all were), {number, {kind, sum, …}}…, {task, {kind, sum, …}}…}    those without counters are left out
--         kind: done, failed (a retry counts too), retried, ms, or le<bucket of duration>; an hour is read with its last minute,
--         which is added to it as soon as the next one begins
local prefix, hours, last = string.sub(KEYS[1], 1, -5), ARGV[1] == 'hours', number_in(ARGV[3])
local reply, tasks, room, one = {0}, {}, 1000, number_in(ARGV[2])
local open = hours and tonumber(redis.call('GET', prefix .. 'stats:last') or '')
local wanted = {done = true, failed = true, retried = true, ms = true}

-- Add sums as a list to the reply, under a name.
local function add(name, sums)
  local list = {}
  for kind, sum in pairs(sums) do list[#list + 1], list[#list + 2] = kind, int(sum) end
  if #list > 0 then reply[#reply + 1] = {name, list} end
end

while one <= last and room > 0 do
  local counters, sums = redis.call('HGETALL', prefix .. (hours and 'stats:h' or 'stats:') .. int(one)), {}
  if open and math.floor(open / 60) == one then
    for _, part in ipairs(redis.call('HGETALL', prefix .. 'stats:' .. int(open))) do counters[#counters + 1] = part end
  end
  for i = 1, #counters, 2 do
    local colon = string.find(counters[i], ':', 1, true) or 0
    local kind, task = string.sub(counters[i], 1, colon - 1), string.sub(counters[i], colon + 1)
    if wanted[kind] == nil then wanted[kind] = string.find(kind, '^le%d+$') ~= nil end
    if wanted[kind] and (ARGV[4] == '' or task == ARGV[4]) then
      local number, of = tonumber(counters[i + 1]), tasks[task]
      if not of then
        of = {}
        tasks[task] = of
      end
      sums[kind], of[kind] = (sums[kind] or 0) + number, (of[kind] or 0) + number
    end
  end
  add(one, sums)
  room, one = room - 4 - #counters / 2, one + 1
end
reply[1] = one
for task, sums in pairs(tasks) do add(task, sums) end
return reply
