-- Requirements: jobs that only some workers may run. A worker that may not puts such a job off, and says what it needs: lines, each a
-- label behind an "l", or a build behind a "b". Until it is due, the job stands in a sorted set needs:<digest> too, with those that
-- need the same, and the next turn with room of a worker that may run it takes it from there. The hash `needs` has the texts by
-- their digests, and conf the field `needs` while there are some. An entry whose job is not scheduled any more is removed when it is met.

-- Tell whether a worker may run jobs.
-- about    what it said of itself
-- need     what they need; "": whether it has a label or a build at all
-- returns  true or false
local function is_able(about, need)
  local labels, build = string.match(about, '"labels":(%[.-%])') or '[]', string.match(about, '"build":"([^"]*)"') or ''
  if need == '' then return labels ~= '[]' or build ~= '' end
  for line in string.gmatch(need, '[^\n]+') do
    local name = string.sub(line, 2)
    if string.byte(line) == 98 and name ~= build then return false end
    if string.byte(line) == 108 and not string.find(labels, '"' .. name .. '"', 1, true) then return false end
  end
  return true
end

-- Note that a job was put off for a worker that may run it.
-- queue    field prefix is used; needed gets what is needed, by its digest
-- id       of the job
-- need     what it needs
-- now      ms
-- returns  nothing
local function note_need(queue, id, need, now)
  local digest = redis.sha1hex(need)
  queue.needed = queue.needed or {}
  queue.needed[digest] = need
  redis.call('ZADD', queue.prefix .. 'needs:' .. digest, 'NX', int(now), id)
end

-- Wake the workers that may run what this step has put off.
-- queue    fields prefix, conf and needed are used
-- workers  key workers
-- own      the worker of this step
-- returns  nothing
local function call_able(queue, workers, own)
  for digest, need in pairs(queue.needed) do
    redis.call('HSET', queue.prefix .. 'needs', digest, need)
    redis.call('PEXPIRE', queue.prefix .. 'needs:' .. digest, 3600000)
  end
  redis.call('PEXPIRE', queue.prefix .. 'needs', 3600000)
  redis.call('HSET', queue.conf, 'needs', '1')
  for _, worker in ipairs(redis.call('ZRANGE', workers, 0, 999)) do
    local about = worker ~= own and redis.pcall('HGET', queue.prefix .. 'leased:' .. worker, '\tabout') or ''
    for _, need in pairs(queue.needed) do
      if type(about) == 'string' and is_able(about, need) then
        wake(queue.prefix .. 'wake:' .. worker)
        break
      end
    end
  end
end

-- Make ready, in front of the others, what a worker may run and other workers have put off.
-- queue    fields prefix, jobs, due, conf and ready are used
-- about    what the worker said of itself
-- most     how many at most
-- returns  true when one has a priority above 0
local function admit_needed(queue, about, most)
  local urgent, left, needs = false, most, redis.call('HGETALL', queue.prefix .. 'needs')
  for i = 1, #needs, 2 do
    local key = queue.prefix .. 'needs:' .. needs[i]
    local ids = left > 0 and is_able(about, needs[i + 1]) and redis.call('ZRANGE', key, 0, left - 1) or {}
    for at = #ids, 1, -1 do
      local id = ids[at]
      local envelope = redis.call('HGET', queue.jobs, id)
      redis.call('ZREM', key, id)
      if envelope and redis.call('ZREM', queue.due, id) == 1 then
        local found = marks(envelope)
        local priority, group = found and found.priority or 0, found and group_of(found)
        if group then
          if rejoin(queue, {{id, priority, group}}) then urgent = true end
        else
          redis.call('LPUSH', KEYS[queue.ready + priority], id)
          if priority > 0 then urgent = true end
        end
        if queue.changed then queue.changed[#queue.changed + 1] = id end
        left = left - 1
      end
    end
    if redis.call('EXISTS', key) == 0 then redis.call('HDEL', queue.prefix .. 'needs', needs[i]) end
  end
  if redis.call('EXISTS', queue.prefix .. 'needs') == 0 then redis.call('HDEL', queue.conf, 'needs') end
  return urgent
end
