-- Walking through the jobs of a queue in bounded steps, and choosing among them. Each way has a cursor that neither new entries
-- nor removed ones disturb: a job that is there from the first step to the last, and may be found, is found.
--
-- ARGV from `at`, the same for each script that walks:
--   0 way     tag: in the order of the ids      cursor: the last id there was at the first step, a tab, the last one seen
--             dead, scheduled: earliest first   cursor: score and id of the last one seen that stays
--             leased: worker by worker          cursor: place and worker of the last one seen
--             all: in no order                  cursor: that of HSCAN
--             ids: those from 10 on, whatever the filter
--   1 cursor, "" at the first step   2 how many jobs at most
--   3 tag  4 task  5 text of the last error, case-folded  6 since  7 older (ms)  8 states, a space between them   "" any

-- Read a filter.
-- at       where in ARGV its tag stands
-- returns  {tag, task, error, since, older, states}    since, older, states: nil for any
local function read_filter(at)
  return {
    tag = ARGV[at], task = ARGV[at + 1], error = ARGV[at + 2],
    since = ARGV[at + 3] ~= '' and number_in(ARGV[at + 3]) or nil,
    older = ARGV[at + 4] ~= '' and number_in(ARGV[at + 4]) or nil,
    states = ARGV[at + 5] ~= '' and ' ' .. ARGV[at + 5] .. ' ' or nil,
  }
end

-- Tell whether a job is of a task: its name stands behind the first line, before a line break or a tab.
-- envelope  as it is stored in jobs
-- task      its name
-- returns   true or false
local function is_of_task(envelope, task)
  local first = string.find(envelope, '\n', 1, true) or 0
  if string.sub(envelope, first + 1, first + #task) ~= task then return false end
  local after = string.byte(envelope, first + #task + 1)
  return after == 10 or after == 9
end

-- Tell whether the last error of a job, as "class: message", holds a text.
-- state    as it is stored
-- text     case-folded
-- returns  true or false; nil where it may, since the error has letters that are folded otherwise than those of ASCII
local function has_error(state, text)
  local line = string.match(with_last_error(state), '\n(.*)$')
  local read, failure = pcall(cjson.decode, line or '')
  if not read or type(failure) ~= 'table' then return false end
  local error = string.lower(tostring(failure.type) .. ': ' .. tostring(failure.message))
  if string.find(error, text, 1, true) then return true end
  if string.find(error, '[\128-\255]') then return nil end
  return false
end

-- Find what the workers hold: all at once where that is little, since each of them is asked about each job otherwise.
-- prefix   of the queue's keys
-- returns  {workers; held: id → {worker, place}, nil where there is too much; tasks: those that are paused, as read_paused returns them}
local function find_holders(prefix)
  local holders, total = {workers = redis.call('ZRANGE', prefix .. 'workers', 0, -1)}, 0
  holders.tasks = read_paused(redis.call('HGET', prefix .. 'conf', 'paused_tasks'))
  for _, worker in ipairs(holders.workers) do total = total + redis.call('HLEN', prefix .. 'leased:' .. worker) end
  if total > 2000 then return holders end
  holders.held = {}
  for _, worker in ipairs(holders.workers) do
    local fields = redis.call('HGETALL', prefix .. 'leased:' .. worker)
    for i = 1, #fields, 2 do holders.held[fields[i]] = {worker, fields[i + 1]} end
  end
  return holders
end

-- Find where a job is, as lib/job_place.lua does. What stands in no other place is ready.
-- prefix   of the queue's keys
-- job      its field id is used; place, at (due, death or lease in ms) and worker are filled
-- holders  as find_holders returns them
-- returns  nothing
local function find_place(prefix, job, holders)
  local score = redis.call('ZSCORE', prefix .. 'due', job.id)
  if score then
    job.place, job.at = 'scheduled', tonumber(score)
    return
  end
  score = redis.call('ZSCORE', prefix .. 'dead', job.id)
  if score then
    job.place, job.at = 'dead', tonumber(score)
    return
  end
  local found = job.envelope and string.byte(job.envelope) ~= 10 and marks(job.envelope)
  local behind = found and found.after and redis.call('HGET', prefix .. 'reruns', found.after) == job.id
  local task = holders.tasks and job.envelope and task_of(job.envelope)
  job.place = (behind or found and group_of(found) or task and is_shut(prefix, holders.tasks, task)) and 'waiting' or 'ready'
  local held = holders.held and holders.held[job.id]
  for _, worker in ipairs(holders.held and {} or holders.workers) do
    local place = redis.call('HGET', prefix .. 'leased:' .. worker, job.id)
    held = held or place and {worker, place}
  end
  if held then job.place, job.worker, job.at = 'leased', held[1], tonumber(leased_at(held[2])) end
end

-- Tell whether a job is chosen.
-- prefix   of the queue's keys
-- filter   as read_filter returns it, and: placed, true when the place must be known
-- job      fields id and envelope are used, place, at and worker where they are known; state is filled when it is read
-- holders  as for find_place; nil where the place is known
-- returns  true or false; nil where has_error does
local function is_chosen(prefix, filter, job, holders)
  if not job.envelope or string.byte(job.envelope) == 120 then return false end
  if filter.task ~= '' and not is_of_task(job.envelope, filter.task) then return false end
  if not job.place and (filter.states or filter.since or filter.older or filter.placed) then find_place(prefix, job, holders) end
  if filter.states and not string.find(filter.states, ' ' .. job.place .. ' ', 1, true) then return false end
  if filter.since or filter.older then
    local began = job.place ~= 'scheduled' and job.at or made_at(job.id)
    if not began or began < (filter.since or began) or began > (filter.older or began) then return false end
  end
  if filter.error == '' then return true end
  job.state = redis.call('HGET', prefix .. 'state', job.id) or ''
  return has_error(job.state, filter.error)
end

-- Make one step of a walk: look at about 500 jobs and 512 KiB of them, fewer where acting on them costs more.
-- prefix   of the queue's keys
-- at       where in ARGV its way stands
-- placed   true when the place of each job must be known
-- cost     of what is done with a chosen job, where a look costs 1
-- returns  {found: the jobs, as for is_chosen; looked: how many were looked at; ended; lost: ids that have no envelope;
--          unsure: ids of which is_chosen returns nil; holders: as find_holders returns them, perhaps nil; now (ms);
--          and what reply_of uses}
local function walk_jobs(prefix, at, placed, cost)
  local way, cursor, most, filter = ARGV[at], ARGV[at + 1], number_in(ARGV[at + 2]), read_filter(at + 3)
  local walk = {found = {}, looked = 0, ended = true, lost = {}, unsure = {}, now = clock(), cursor = cursor, seen = {}, scores = {}}
  local left, size, holders = 500, 0, nil
  filter.placed = placed
  if way == 'tag' or way == 'all' or (way == 'ids' and placed) then holders = find_holders(prefix) end
  -- Each worker is asked about a job, here or by what acts on it.
  local asked = holders and not holders.held and #holders.workers / 2 or 0
  walk.holders = holders

  local function look(id, envelope, place, moment, worker)
    local job = {id = id, envelope = envelope or redis.call('HGET', prefix .. 'jobs', id), place = place, at = moment, worker = worker}
    local chosen = is_chosen(prefix, filter, job, holders)
    walk.looked = walk.looked + 1
    if not job.envelope then walk.lost[#walk.lost + 1] = id end
    if chosen then walk.found[#walk.found + 1] = job
    elseif chosen == nil then walk.unsure[#walk.unsure + 1] = id end
    size = size + #(job.envelope or '') + #(job.state or '')
    local searched = job.place and not place
    left = left - 1 - (searched and 1 or 0) - (job.state and 4 or 0) - (chosen and cost or 0) - ((chosen or searched) and asked or 0)
  end
  local function has_room() return left > 0 and size < 524288 and #walk.found < most end

  if way == 'ids' then
    local named = {}
    for i = at + 9, #ARGV do
      local id = ARGV[i]
      if not named[id] and placed then look(id)
      elseif not named[id] then walk.found[#walk.found + 1] = {id = id} end
      named[id] = true
    end
  elseif way == 'tag' then
    local key = prefix .. 'tag:' .. filter.tag
    local last, behind = string.match(cursor, '^([^\t]*)\t(.*)$')
    last = last or redis.call('ZRANGE', key, -1, -1)[1]
    local page = last and {last} or {}
    while #page > 0 and has_room() do
      page = redis.call('ZRANGE', key, behind and '(' .. behind or '-', '[' .. last, 'BYLEX', 'LIMIT', 0, 100)
      for _, id in ipairs(page) do
        if not has_room() then break end
        look(id)
        behind = id
      end
    end
    walk.ended = #page == 0
    if behind then walk.cursor = last .. '\t' .. behind end
  elseif way == 'dead' or way == 'scheduled' then
    local key, rank = prefix .. (way == 'dead' and 'dead' or 'due'), nil
    local score, id = string.match(cursor, '^(%S+) (.*)$')
    if score then
      rank = redis.call('ZSCORE', key, id) == score and redis.call('ZRANK', key, id) + 1
      -- It is gone: those of the same instant are looked at again.
      rank = rank or redis.call('ZCOUNT', key, '-inf', '(' .. score)
    else
      rank = way == 'dead' and filter.since and redis.call('ZCOUNT', key, '-inf', '(' .. int(filter.since)) or 0
    end
    local page, over = {''}, false
    while #page > 0 and not over and has_room() do
      page = redis.call('ZRANGE', key, rank, rank + 99, 'WITHSCORES')
      for i = 1, #page, 2 do
        over = way == 'dead' and filter.older and tonumber(page[i + 1]) > filter.older
        if over or not has_room() then break end
        look(page[i], nil, way, tonumber(page[i + 1]))
        walk.seen[walk.looked], walk.scores[walk.looked] = page[i], page[i + 1]
        rank = rank + 1
      end
    end
    walk.ended = over or #page == 0
  elseif way == 'leased' then
    local workers = redis.call('ZRANGE', prefix .. 'workers', 0, -1)
    table.sort(workers)
    local place, name = string.match(cursor, '^(-?%d+) (.*)$')
    walk.ended = false
    for _, worker in ipairs(workers) do
      if not name or worker >= name then
        local ids, places = ids_in_order(prefix .. 'leased:' .. worker)
        for i, id in ipairs(ids) do
          local number = math.floor(tonumber(places[i]))
          if worker ~= name or number > tonumber(place) then
            if not has_room() then return walk end
            look(id, nil, 'leased', tonumber(leased_at(places[i])), worker)
            walk.cursor = int(number) .. ' ' .. worker
          end
        end
      end
    end
    walk.ended = true
  else
    cursor = cursor == '' and '0' or cursor
    repeat
      -- As many as fit beside those there were; a page is looked at whole.
      local room = math.min(left / (1 + cost + asked), (524288 - size) * (walk.looked + 20) / (size + 65536))
      local count = int(math.max(5, math.min(walk.looked > 0 and 200 or 20, math.floor(room))))
      local page = redis.call('HSCAN', prefix .. 'jobs', cursor, 'COUNT', count)
      cursor = page[1]
      for i = 1, #page[2], 2 do look(page[2][i], page[2][i + 1]) end
    until cursor == '0' or not has_room()
    walk.cursor, walk.ended = cursor, cursor == '0'
  end
  return walk
end

-- Write the head of the reply to a step. The next step begins behind what stays.
-- walk     as walk_jobs returns it
-- gone     set of the ids that have left the way meanwhile; nil: none
-- returns  {now_ms, 1 at the end of the walk, cursor of the next step, how many were looked at, ids that may be chosen}
local function reply_of(walk, gone)
  for i = #walk.seen, 1, -1 do
    if not (gone and gone[walk.seen[i]]) then
      walk.cursor = walk.scores[i] .. ' ' .. walk.seen[i]
      break
    end
  end
  return {walk.now, walk.ended and 1 or 0, walk.cursor, walk.looked, walk.unsure}
end
