-- Serving: the workers and consumers of a queue, and the tasks that they know.
-- A worker registers with a digest of the names of its tasks. Field `task_sets` of conf lists the last 20 digests, the newest
-- last; `tasks:<digest>` the names, one a line; `seen:<digest>` when a worker that knows them last registered or left (ms), and its name.

-- Read who serves a queue now.
-- queue    fields prefix, conf and workers are used
-- now      ms
-- returns  number of workers, number of consumers of messages, digests that the workers named as keys (true for one that named none),
--          list of the different builds and labels of the workers: build, a tab and the labels as JSON
local function serving(queue, now)
  local workers, consumers, sets, skills, known = 0, 0, {}, {}, {}
  local found = redis.call('ZRANGE', queue.workers, 0, 999, 'WITHSCORES')
  for i = 1, #found, 2 do
    if tonumber(found[i + 1]) > now then
      local about = redis.call('HGET', queue.prefix .. 'leased:' .. found[i], '\tabout') or ''
      local kind = string.match(about, '"kind":"(%a+)"')
      if kind ~= 'consumer' and kind ~= 'pull' then
        workers = workers + 1
        sets[string.match(about, '"task_set":"(%x+)"') or true] = true
        local skill = (string.match(about, '"build":"([^"]*)"') or '') .. '\t' .. (string.match(about, '"labels":(%[.-%])') or '[]')
        if not known[skill] then
          known[skill] = true
          skills[#skills + 1] = skill
        end
      end
      if kind ~= 'worker' then consumers = consumers + 1 end
    end
  end
  return workers, consumers, sets, skills
end

-- Read the sets of tasks that workers of a queue have named.
-- queue    field conf is used
-- returns  list of {digest, names (one a line), when a worker with it was last seen (ms) and its name}
local function task_sets(queue)
  local known = {}
  for digest in string.gmatch(redis.call('HGET', queue.conf, 'task_sets') or '', '%x+') do
    local fields = redis.call('HMGET', queue.conf, 'tasks:' .. digest, 'seen:' .. digest)
    known[#known + 1] = {digest, fields[1] or '', fields[2] or ''}
  end
  return known
end

-- Tell whether a worker that serves the queue now knows a task.
-- task     the name
-- sets     as serving returns them
-- known    as task_sets returns them
-- returns  1 one does, or one has not said what it knows · 0 none; and then when one was last seen that did, and its name ("": never)
local function knows_task(task, sets, known)
  local told, seen = 0, ''
  for _, one in ipairs(known) do
    local has = listed(one[2], '\n', task)
    if sets[one[1]] then
      if has then return 1, '' end
      told = told + 1
    end
    if has and (seen == '' or tonumber(string.match(one[3], '^%d+') or 0) > tonumber(string.match(seen, '^%d+') or 0)) then seen = one[3] end
  end
  for digest in pairs(sets) do told = told - 1 end
  if told < 0 then return 1, '' end
  return 0, seen
end

-- Note that a worker which knows a set of tasks was seen, unless the set is forgotten. Nothing fails for it.
-- conf     key conf
-- about    what the worker said of itself
-- now      ms
-- returns  nothing
local function note_seen(conf, about, now)
  local digest = string.match(about, '"task_set":"(%x+)"')
  if digest and redis.pcall('HEXISTS', conf, 'tasks:' .. digest) == 1 then
    redis.pcall('HSET', conf, 'seen:' .. digest, int(now) .. ' ' .. (name_of(about) or ''))
  end
end

-- Remember a set of tasks among the last 20, and forget the oldest.
-- conf     key conf
-- digest, names  the set; the names one a line
-- returns  nothing
local function note_tasks(conf, digest, names)
  local digests = {}
  for one in string.gmatch(redis.call('HGET', conf, 'task_sets') or '', '%x+') do
    if one ~= digest then digests[#digests + 1] = one end
  end
  if #digests > 19 then
    local oldest = table.remove(digests, 1)
    redis.call('HDEL', conf, 'tasks:' .. oldest, 'seen:' .. oldest)
  end
  digests[#digests + 1] = digest
  redis.call('HSET', conf, 'task_sets', table.concat(digests, ' '), 'tasks:' .. digest, names)
end
