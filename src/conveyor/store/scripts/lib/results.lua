-- Kept results. Those of jobs whose ids were made within the same 64 ms share a hash, their window: a turn writes many
-- results with one command, and they expire together. A field holds the instant (ms) until which its result can be read,
-- perhaps spaces, a line break and the record, because the hash lives up to an eighth longer. A result is kept under its own key instead when
-- it is long, when its window is full, and when its window would end too early or much later than it: so nothing is held
-- much longer than was asked. Jobs that have more to release than their place have a key of their own, too.

-- Find the window of an id, and how long it lives and what it takes. Nothing is written here.
-- key      results:<window>
-- keep     ms that a new window serves
-- returns  {key, left (ms), room (results), entries, fresh (it does not exist yet)}
local function find_window(key, keep)
  local left = redis.call('PTTL', key)
  if left == -2 then return {key = key, left = math.floor(keep * 1.125), room = 8192, entries = {}, fresh = true} end
  return {key = key, left = left, room = 8192 - redis.call('HLEN', key), entries = {}}
end

-- Decide where one result is kept.
-- queue    field prefix is used
-- plan     its fields windows and own are filled
-- by_name  the windows by their names
-- id, record, keep  the job, what is kept of it, and for how many ms
-- head     what stands before the record in a window
-- longest  ms that its window may live
-- returns  nothing
local function plan_result(queue, plan, by_name, id, record, keep, head, longest)
  local name = string.sub(id, 1, 7)
  local window = by_name[name]
  if not window then
    window = find_window(queue.prefix .. 'results:' .. name, keep)
    by_name[name], plan.windows[#plan.windows + 1] = window, window
  end
  local entries = window.entries
  local size = #entries
  if #record <= 4096 and size < 2 * window.room and keep <= window.left and window.left <= longest then
    entries[size + 1], entries[size + 2] = id, head .. record
  else
    plan.own[#plan.own + 1] = {queue.prefix .. 'result:' .. id, record, int(keep)}
  end
end

-- Decide where the results of a report are kept, and check the keys. Nothing is written here.
-- queue    field prefix is used
-- done     ids that the worker holds and that are done
-- first    where in ARGV the ids with a result begin
-- at       where in ARGV the groups stand: ms, count, records
-- groups   their number
-- now      ms
-- ended    windows of jobs that are to be remembered (lib/ended.lua): the end is known for longer than a short-lived result
-- returns  {windows, own (key, record, ms), records (id → record)}
local function plan_results(queue, done, first, at, groups, now, ended)
  local plan, by_name, held = {windows = {}, own = {}, records = {}}, {}, {}
  for _, id in ipairs(done) do held[id] = true end
  for _ = 1, groups do
    local keep, count = number_in(ARGV[at]), tonumber(ARGV[at + 1])
    local head, longest = int(now + keep) .. '\n', keep * 1.125
    for i = 1, count do
      local id, record = ARGV[first], ARGV[at + 1 + i]
      first = first + 1
      if held[id] then
        held[id] = nil -- of two results of one job in a report the first counts
        plan.records[id] = keep > 0 and record or '+'
        if keep < 600000 then note_ended(ended, id, '+') end
        if keep > 0 then plan_result(queue, plan, by_name, id, record, keep, head, longest) end
      end
    end
    at = at + 2 + count
  end
  return plan
end

-- Keep results as they were planned.
-- plan     what plan_results has returned
-- returns  nothing
local function keep_results(plan)
  for _, window in ipairs(plan.windows) do
    local entries = window.entries
    if #entries > 0 then
      -- A hash of short values is a list that each write searches. One value above 64 bytes makes it a table, if it is not small.
      if 8192 - window.room + #entries / 2 > 32 then
        entries[2] = string.gsub(entries[2], '\n', string.rep(' ', 64) .. '\n', 1)
      end
      in_chunks('HSET', window.key, entries, 1, #entries)
      if window.fresh then redis.call('PEXPIRE', window.key, int(window.left)) end
    end
  end
  for _, one in ipairs(plan.own) do redis.call('SET', one[1], one[2], 'PX', one[3]) end
end
