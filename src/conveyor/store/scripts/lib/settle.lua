-- Settling: what becomes of the jobs that ended otherwise than simply done. The letters stand in the header of turn.lua.

-- Read the jobs that go back to the front of their queue, and check the lists of their groups. Nothing is written here.
-- queue    fields prefix and jobs are used; returned: id of such a job → its envelope, is made
-- ids      theirs
-- returns  nothing
local function read_returned(queue, ids)
  local lists = {}
  queue.returned = {}
  for at, envelope in ipairs(read_fields(queue.jobs, ids)) do
    local found = envelope and marks(envelope)
    local group = found and group_of(found)
    if group then lists[queue.prefix .. 'group:' .. found.priority .. ':' .. group] = true end
    queue.returned[ids[at]] = envelope or '\n'
  end
  for list in pairs(lists) do redis.call('LLEN', list) end
end

-- Tell who asked for the cancellation of a job that is held.
-- asked    the field \tcancel of its worker, false when there is none: ids and, behind a tab, an id, a tab and a name, one a line
-- id       of the job
-- returns  the name; "" when it is not said
local function asker_of(asked, id)
  local _, last = string.find(asked or '', '\t' .. id .. '\t', 1, true)
  return last and string.match(asked, '^[^\n]*', last + 1) or ''
end

-- Add the events of jobs that are simply done.
-- queue    fields jobs and state are used
-- leased   key leased:<worker>
-- done     the ids
-- now      ms
-- worker   its name
-- returns  nothing
local function note_done(queue, leased, done, now, worker)
  for _, id in ipairs(done) do
    local since = leased_at(redis.call('HGET', leased, id))
    note_event('done', id, redis.call('HGET', queue.jobs, id), attempt_in(redis.call('HGET', queue.state, id)),
      'w', worker, 'ms', since and int(math.max(0, now - since)) or '')
  end
end

-- Add the event of another settlement, if it is one, before it is carried out.
-- queue, i, now  as for settle_other
-- leased   key leased:<worker>
-- asked    true when the cancellation of the job was asked, and it does not come back
-- returns  nothing
local function note_settlement(queue, leased, i, now, asked)
  local kind, id, record, state = ARGV[i], ARGV[i + 1], ARGV[i + 3], ARGV[i + 4]
  local before = redis.call('HGET', queue.state, id)
  local envelope, attempt, worker = redis.call('HGET', queue.jobs, id), attempt_in(before), queue.worker
  if kind == 'D' then note_done(queue, leased, {id}, now, worker)
  elseif kind == 'C' or asked then
    note_event('cancelled', id, envelope, attempt, 'w', worker, 'why', string.match(record, '"reason":"([^"\\]*)"') or '',
      'by', asker_of(queue.asked, id))
  elseif kind == 'X' then
    local read, ended = pcall(cjson.decode, record)
    if not read or type(ended) ~= 'table' then ended = {} end
    local failure = type(ended.failure) == 'table' and ended.failure or {}
    note_event('dead', id, envelope, attempt, 'w', worker, 'why', tostring(ended.reason or ''),
      'type', tostring(failure.type or ''), 'text', string.sub(tostring(failure.message or ''), 1, 500))
  elseif kind == 'R' then
    local failed = tonumber(string.match(before or '', '^%d+ (%d+)')) or 0
    if (tonumber(string.match(state, '^%d+ (%d+)')) or 0) <= failed then
      note_event('returned', id, envelope, attempt, 'w', worker, 'why', 'put off', 'ms', ARGV[i + 2])
      return
    end
    local read, failure = pcall(cjson.decode, string.match(state, '\n([^\n]*)$') or '')
    if not read or type(failure) ~= 'table' then failure = {} end
    note_event('retried', id, envelope, attempt, 'w', worker, 'ms', ARGV[i + 2],
      'type', tostring(failure.type or ''), 'text', string.sub(tostring(failure.message or ''), 1, 500))
  else
    note_event('returned', id, envelope, attempt, 'w', worker, 'why', kind == 'L' and 'limit' or 'handed back',
      'ms', kind == 'L' and ARGV[i + 2] or '')
  end
end

-- Carry out one other settlement.
-- queue    all fields but conf are used
-- leased   key leased:<worker>
-- i        where in ARGV its seven arguments stand
-- now      ms
-- asked    its field \tcancel, false when there is none
-- ended    windows of jobs that are to be remembered (lib/ended.lua)
-- returns  true when a job went back to a ready list of a priority above 0
local function settle_other(queue, leased, i, now, asked, ended)
  local kind, id, ms, record, attempts = ARGV[i], ARGV[i + 1], tonumber(ARGV[i + 2]), ARGV[i + 3], ARGV[i + 4]
  local found = attributes(ARGV[i + 5], {own = ARGV[i + 6] == '1'})
  -- Of two settlements of one job in a report the first counts.
  local keeps = kind == 'M' or kind == 'S' or kind == 'K' or kind == 'G' or kind == 'E' or kind == 'T'
  if events and not keeps and redis.call('HEXISTS', leased, id) == 1 then
    pcall(note_settlement, queue, leased, i, now, asked and kind ~= 'D' and kind ~= 'X' and listed(asked, '\n', id))
  end
  if redis.call(keeps and 'HEXISTS' or 'HDEL', leased, id) == 0 then return false end
  if queue.grouped and not keeps then
    local ids = kind == 'R' and queue.retried or queue.freed
    ids[#ids + 1] = id
  end
  if queue.changed and kind ~= 'S' and kind ~= 'G' and kind ~= 'E' then queue.changed[#queue.changed + 1] = id end
  if kind == 'S' then
    redis.call('RPUSH', queue.prefix .. 'outbox', record)
  elseif kind == 'T' then
    local key = queue.prefix .. 'logs:' .. id
    redis.call('RPUSH', key, record)
    redis.call('LTRIM', key, -2000, -1)
    redis.call('PEXPIRE', key, int(ms))
  elseif kind == 'E' then
    add_parts(queue.prefix .. 'stream:' .. id, record, ms)
  elseif kind == 'G' then
    queue.charges[#queue.charges + 1] = {record, ms, leased_at(redis.call('HGET', leased, id)), tonumber(attempts)}
  elseif kind == 'D' or kind == 'C' then
    local mark = kind == 'D' and (attempts ~= '' and attempts or ms > 0 and '+' or '-') or nil
    redis.call('HDEL', queue.jobs, id)
    list_tags(queue.untagged, found.tags, id)
    local by = kind == 'C' and asker_of(asked, id) or ''
    if by ~= '' then record = string.sub(record, 1, -2) .. ',"by":' .. cjson.encode(by) .. '}' end
    finish(queue, id, ms, ms == 0 and mark == '+' and '+' or record, found, mark, kind == 'D')
    if mark and not found.own and ms < 600000 then note_ended(ended, id, mark) end
  elseif kind == 'X' then
    redis.call('ZADD', queue.dead, int(math.max(now, ms)), id)
    redis.call('HSET', queue.state, id, attempts)
    release(queue.prefix, id, found, nil, true)
    announce(queue.waiters, id, record)
  elseif kind == 'K' then
    if asked and listed(asked, '\n', id) then
      redis.call('HSET', leased, '\tcancel', redis.call('HGET', leased, '\tcancel') .. '\n' .. id)
    end
  elseif asked and not keeps and listed(asked, '\n', id) then
    -- Its cancellation was asked, and the worker did not know: it does not come back.
    local envelope = redis.call('HGET', queue.jobs, id)
    found = marks(envelope or '\n') or {}
    redis.call('HDEL', queue.jobs, id)
    list_tags(queue.untagged, found.tags, id)
    local record = cancelled_record(now, kind == 'F' and attempts == '' and 'not started' or nil, asker_of(asked, id))
    finish(queue, id, 600000, record, found)
    count_end(queue.prefix, 'cancelled', envelope)
    if queue.grouped then queue.freed[#queue.freed + 1] = id end
  else
    if attempts ~= '' then redis.call('HSET', queue.state, id, attempts) end
    if kind == 'R' then redis.call('ZADD', queue.due, now + ms, id) end
    if kind == 'R' and record ~= '' then note_need(queue, id, record, now) end
    if kind == 'L' and string.byte(record) == 59 and queue.tasks[string.sub(record, 2)] == nil then
      queue.tasks[string.sub(record, 2)] = false
      write_paused(queue)
    end
    if kind == 'L' and record ~= '' then hold_limit(queue, record, now + ms, now) end
    if kind == 'F' or kind == 'L' then
      local envelope = queue.returned[id]
      local found = marks(envelope)
      local priority = found and found.priority or 0
      local group = found and group_of(found) or paused_group(queue, priority, envelope)
      if group then join_group(queue, priority, group, id, true)
      else redis.call('LPUSH', KEYS[queue.ready + priority], id) end
      return priority > 0
    end
  end
  return false
end

-- Give back the slots of what was settled, and charge rates with what jobs have cost beside what they paid.
-- queue    fields freed and retried (ids), charges and what begin_groups makes are used
-- done     ids that are simply done
-- now      ms
-- returns  nothing
local function settle_groups(queue, done, now)
  give_back(queue, done)
  give_back(queue, queue.freed)
  give_back(queue, queue.retried, true)
  for _, charge in ipairs(queue.charges) do
    load_limits(queue, {charge[1]})
    local s = queue.limits[charge[1]]
    -- A cost above what the limit lets pass has paid that.
    charge_rate(queue, s, charge[2] + math.max(0, (charge[4] or 0) - (s.n or 0)), now, charge[3])
    touch(queue, {charge[1]})
  end
end

-- Find which of the cancellations that were asked of a worker are still to be carried out, and forget them when none is.
-- leased   key leased:<worker>
-- asked    its field \tcancel: ids, one a line; twice when the worker has answered that the job runs
-- returns  those of the ids that the worker holds
local function held_cancellations(leased, asked)
  local ids, seen = {}, {}
  for id in string.gmatch(asked, '[^\n]+') do
    if not seen[id] and redis.call('HGET', leased, id) then ids[#ids + 1] = id end
    seen[id] = true
  end
  if #ids == 0 then redis.call('HDEL', leased, '\tcancel') end
  return ids
end
