-- Pushes whose unique key another job has, and what becomes of them.

-- Pick the attributes that say where a job waits: its group and its limits.
-- text     attributes as they stand in an envelope
-- returns  those, as they stand there
local function load_of(text)
  local found = {}
  for one in string.gmatch(text, '\t[gl][^\t]*') do found[#found + 1] = one end
  return table.concat(found)
end

-- Note the attributes that a push gives a job, and tell whether its group or its limits are others by them.
-- queue    as for meet
-- id       of the job
-- text     attributes of the push
-- envelope of the job; nil: it is read where it is stored
-- returns  true or false
local function changes_load(queue, id, text, envelope)
  local before = queue.texts[id] or string.match(envelope or redis.call('HGET', queue.jobs, id) or '', '^[^\n]*')
  queue.texts[id] = text
  return load_of(before) ~= load_of(text)
end

-- Tell how a job stands to a push.
-- queue    fields prefix, jobs, due, dead and rests are used
-- id       of the job
-- envelope of the job, false when there is none
-- returns  "waits", "runs" or "ended", and its envelope behind the first line
local function standing(queue, id, envelope)
  if queue.rests[id] then return 'waits', queue.rests[id] end
  if not envelope or string.byte(envelope) == 120 or redis.call('ZSCORE', queue.dead, id) then return 'ended' end
  local rest = string.match(envelope, '\n.*$')
  if redis.call('ZSCORE', queue.due, id) then return 'waits', rest end
  return is_leased(queue.prefix, id) and 'runs' or 'waits', rest
end

-- Decide what becomes of a job whose keys may be held. Nothing is written here.
-- queue    fields as for standing, and keys (text → the job of this push that has it), rests (of jobs that wait: what this push
--          leaves them with), texts (likewise: their attributes), successors (id of a job that runs → the one that this push puts behind it)
-- id       of the job
-- keys     its keys, in the order of their comparison
-- rest     its envelope behind the first line
-- text     its attributes
-- returns  nil when all keys are free, and now claimed; else {what, the id that answers it, key =, behind =, moves =}. What: kept, nothing
--          is stored; raise, the push is refused; replaced, the job of that id gets the new envelope; rerun, likewise, or,
--          with behind, this job is stored to run after that one. moves: the job that gets the envelope may belong in another place by it
local function meet(queue, id, keys, rest, text)
  for _, key in ipairs(keys) do
    local holder, envelope = queue.keys[key.text], false
    if not holder then holder, envelope = holder_of(queue.prefix, key) end
    if holder and key.conflict == 'x' then return {'raise', holder, key = key} end
    if holder and key.conflict == 'k' then return {'kept', holder} end
    if holder then
      local place, there = standing(queue, holder, envelope)
      local successor = queue.successors[holder] or redis.call('HGET', queue.prefix .. 'reruns', holder)
      if place == 'ended' then return {'kept', holder} end
      if successor then return {'rerun', successor, moves = changes_load(queue, successor, text)} end
      if there == rest and key.conflict == 'r' or there == rest and place == 'waits' and key.conflict ~= 'b' then
        return {'kept', holder}
      end
      if place == 'waits' then
        queue.rests[holder] = rest
        return {'replaced', holder, key = key, moves = changes_load(queue, holder, text, envelope or nil)}
      end
      queue.successors[holder], queue.texts[id] = id, text
      return {'rerun', id, behind = holder}
    end
  end
  for _, key in ipairs(keys) do queue.keys[key.text] = id end
  queue.rests[id], queue.texts[id] = rest, text
  return nil
end

-- Give a job that waits another envelope, in its place. Its first line stays, but for the times, and the group and the limits of the push:
-- where those are others, the job moves to where they have it wait.
-- queue    fields prefix, jobs and due are used
-- groups   as begin_groups makes it, with the rights proven; nil: it does not move
-- id       of the job
-- rest     the envelope behind the first line
-- given    attributes of the push
-- wait     ms that a debounced job waits anew
-- expires  ms; "" never
-- key      the key for which they met; nil for a successor
-- now      ms
-- returns  true when a worker may have to be woken
local function rewrite(queue, groups, id, rest, given, wait, expires, key, now)
  local envelope = redis.call('HGET', queue.jobs, id)
  local head, text = string.match(envelope, '^([^\t\n]*)([^\n]*)')
  local takeable = false
  if not string.find(head, 'u', 1, true) then -- a unique key in an older layout
    head = string.gsub(head, ' e%d+', '')
    if expires ~= '' then head = head .. ' e' .. int(now + expires) end
    local scheduled = key and key.conflict == 'b' and redis.call('ZSCORE', queue.due, id)
    if scheduled or (key and key.conflict == 'b' and follows(queue.prefix, id, string.match(text, '\ta([^\t]*)'))) then
      local latest = tonumber(string.match(text, '\tm(%d+)'))
      local instant = math.min(now + tonumber(wait), latest or math.huge)
      head = string.gsub(head, ' d%d+', '') .. ' d' .. int(instant)
      if scheduled then
        redis.call('ZADD', queue.due, int(instant), id)
        takeable = redis.call('ZRANGE', queue.due, 0, 0)[1] == id
      end
    end
  end
  if groups then text = string.gsub(text, '\t[gl][^\t]*', '') .. load_of(given) end
  redis.call('HSET', queue.jobs, id, head .. text .. rest)
  if not groups then return takeable end
  local priority = tonumber(string.match(head, 'p(%d)')) or 0
  return change_place(groups, id, envelope, priority, group_of(attributes(text, {})), nil, now) or takeable
end
