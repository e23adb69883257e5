-- The report of a turn: which of its settlements count, and the removal of the jobs that are simply done. Most turns need no more.
-- The letters stand in the header of turn.lua.

-- Read which settlements count, and check the keys they write to. Nothing is written here.
-- queue        fields prefix, jobs and dead are used; returned: id of a job that goes back to the front → its envelope, is made
-- leased       key leased:<worker>
-- done_at, done_count    where in ARGV the ids stand that are simply done, and their number
-- other_at, other_count  where the other settlements stand, seven arguments each, and their number
-- returns      done: ids that the worker holds; others: where in ARGV those stand that it holds; lost: ids it holds no more;
--              kinds: the letters of others as keys, and "keep", "unique", "own" where one keeps a record, or releases that
local function read_settlements(queue, leased, done_at, done_count, other_at, other_count)
  local done, others, lost, kinds, back = {}, {}, {}, {}, {}
  local last = done_at + done_count - 1
  for first = done_at, last, 7000 do
    local held = redis.call('HMGET', leased, unpack(ARGV, first, math.min(first + 6999, last)))
    for i = 1, #held do
      if held[i] then done[#done + 1] = ARGV[first + i - 1] else lost[#lost + 1] = ARGV[first + i - 1] end
    end
  end
  for i = other_at, other_at + 7 * (other_count - 1), 7 do
    number_in(ARGV[i + 2])
    if ARGV[i] == 'X' then redis.call('ZCARD', queue.dead) end
    if ARGV[i] == 'S' then redis.call('LLEN', queue.prefix .. 'outbox') end
    if ARGV[i] == 'T' then redis.call('LLEN', queue.prefix .. 'logs:' .. ARGV[i + 1]) end
    if ARGV[i] == 'E' then lazy().new_parts(queue.prefix .. 'stream:' .. ARGV[i + 1], ARGV[i + 3]) end
    if redis.call('HEXISTS', leased, ARGV[i + 1]) == 1 then
      others[#others + 1] = i
      kinds[ARGV[i]] = true
      if (ARGV[i] == 'D' or ARGV[i] == 'C') and ARGV[i + 2] ~= '0' then kinds.keep = true end
      if ARGV[i + 5] ~= '' and lazy().attributes(ARGV[i + 5], {}).keys then kinds.unique = true end
      if ARGV[i + 6] == '1' then kinds.own = true end
      if ARGV[i] == 'F' or ARGV[i] == 'L' then back[#back + 1] = ARGV[i + 1] end
      if ARGV[i] == 'R' and ARGV[i + 3] ~= '' then
        kinds.needs = true
        redis.call('HLEN', queue.prefix .. 'needs')
        redis.call('ZCARD', queue.prefix .. 'needs:' .. redis.sha1hex(ARGV[i + 3]))
      end
    elseif ARGV[i] ~= 'S' and ARGV[i] ~= 'G' and ARGV[i] ~= 'E' and ARGV[i] ~= 'T' then
      lost[#lost + 1] = ARGV[i + 1]
    end
  end
  if #back > 0 then lazy().read_returned(queue, back) end
  return done, others, lost, kinds
end

-- Prove that this user may settle, beside the HDEL, HSET, ZADD, HMGET and HEXISTS that every turn proves.
-- none     the key that never exists
-- kinds    as read_settlements returns them
-- results  as plan_results returns them; false when there are none
-- asked    as for settle_other
-- returns  nothing
local function prove_settlements(none, kinds, results, asked)
  if asked and (kinds.R or kinds.F or kinds.L) then prove(none, 'SET', 'GET', 'DEL', 'PEXPIRE', 'RPUSH') end
  if results and #results.windows > 0 or kinds.own then prove(none, 'PEXPIRE') end
  if results and #results.own > 0 or kinds.keep or kinds.own then prove(none, 'SET') end
  if kinds.unique then prove(none, 'GET', 'DEL', 'SET', 'RPUSH') end
  if kinds.S then prove(none, 'RPUSH') end
  if kinds.T then prove(none, 'RPUSH', 'LTRIM', 'PEXPIRE') end
  if kinds.E then prove(none, 'XADD', 'PEXPIRE') end
  if next(kinds) then prove(none, 'HGET') end
  if kinds.F or kinds.L then prove(none, 'LPUSH') end
end

-- Remove the jobs that are simply done.
-- queue     fields jobs, state and waiters are used
-- leased    key leased:<worker>
-- done      the ids
-- results   where their results are kept; false when none is
-- stateful  true when some job of the queue has a state
-- awaited   true when some process waits for a result
-- returns   nothing
local function settle_done(queue, leased, done, results, stateful, awaited)
  in_chunks('HDEL', leased, done, 1, #done)
  in_chunks('HDEL', queue.jobs, done, 1, #done)
  if stateful then in_chunks('HDEL', queue.state, done, 1, #done) end
  if results then keep_results(results) end
  for first = 1, awaited and #done or 0, 7000 do
    local channels = redis.call('HMGET', queue.waiters, unpack(done, first, math.min(first + 6999, #done)))
    for i = 1, #channels do
      local id = done[first + i - 1]
      if channels[i] then announce_to(queue.waiters, id, channels[i], results and results.records[id] or '') end
    end
  end
end
