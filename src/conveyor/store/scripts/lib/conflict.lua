-- Pushes whose unique key another job has, and what becomes of them.

-- Tell how a job stands to a push.
-- queue    fields prefix, jobs, due, dead and rests are used
-- id       of the job
-- returns  "waits", "runs" or "ended", and its envelope behind the first line
local function standing(queue, id)
  if queue.rests[id] then return 'waits', queue.rests[id] end
  local envelope = redis.call('HGET', queue.jobs, id)
  if not envelope or string.byte(envelope) == 120 or redis.call('ZSCORE', queue.dead, id) then return 'ended' end
  local rest = string.match(envelope, '\n.*$')
  if redis.call('ZSCORE', queue.due, id) then return 'waits', rest end
  for _, worker in ipairs(redis.call('ZRANGE', queue.prefix .. 'workers', 0, -1)) do
    if redis.call('HEXISTS', queue.prefix .. 'leased:' .. worker, id) == 1 then return 'runs', rest end
  end
  return 'waits', rest
end

-- Decide what becomes of a job whose keys may be held. Nothing is written here.
-- queue    fields as for standing, and keys (text → the job of this push that has it), rests (of jobs that wait: what this push
--          leaves them with), successors (id of a job that runs → the one that this push puts behind it)
-- id       of the job
-- keys     its keys, in the order of their comparison
-- rest     its envelope behind the first line
-- returns  nil when all keys are free, and now claimed; else {what, the id that answers it, key =, behind =}. What: kept, nothing is
--          stored; raise, the push is refused; replaced, the job of that id gets the new envelope; rerun, likewise, or,
--          with behind, this job is stored to run after that one
local function meet(queue, id, keys, rest)
  for _, key in ipairs(keys) do
    local holder = queue.keys[key.text] or holder_of(queue.prefix, key)
    if holder and key.conflict == 'x' then return {'raise', holder, key = key} end
    if holder and key.conflict == 'k' then return {'kept', holder} end
    if holder then
      local place, there = standing(queue, holder)
      local successor = queue.successors[holder] or redis.call('HGET', queue.prefix .. 'reruns', holder)
      if place == 'ended' then return {'kept', holder} end
      if successor then return {'rerun', successor} end
      if there == rest and key.conflict == 'r' or there == rest and place == 'waits' and key.conflict ~= 'b' then
        return {'kept', holder}
      end
      if place == 'waits' then
        queue.rests[holder] = rest
        return {'replaced', holder, key = key}
      end
      queue.successors[holder] = id
      return {'rerun', id, behind = holder}
    end
  end
  for _, key in ipairs(keys) do queue.keys[key.text] = id end
  queue.rests[id] = rest
  return nil
end

-- Give a job that waits another envelope, in its place. Its first line stays, but for the times.
-- queue    fields prefix, jobs and due are used
-- id       of the job
-- rest     the envelope behind the first line
-- wait     ms that a debounced job waits anew
-- expires  ms; "" never
-- key      the key for which they met; nil for a successor
-- now      ms
-- returns  true when the job is the first that is due
local function rewrite(queue, id, rest, wait, expires, key, now)
  local head, text = string.match(redis.call('HGET', queue.jobs, id), '^([^\t\n]*)([^\n]*)')
  local first = false
  if not string.find(head, 'u', 1, true) then -- a unique key in an older layout
    head = string.gsub(head, ' e%d+', '')
    if expires ~= '' then head = head .. ' e' .. int(now + expires) end
    if key and key.conflict == 'b' and redis.call('ZSCORE', queue.due, id) then
      local latest = tonumber(string.match(text, '\tm(%d+)'))
      local instant = math.min(now + tonumber(wait), latest or math.huge)
      head = string.gsub(head, ' d%d+', '') .. ' d' .. int(instant)
      redis.call('ZADD', queue.due, int(instant), id)
      first = redis.call('ZRANGE', queue.due, 0, 0)[1] == id
    end
  end
  redis.call('HSET', queue.jobs, id, head .. text .. rest)
  return first
end
