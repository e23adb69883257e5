-- Accepting messages in one queue, all of them or none: the whole of push.lua but its sequence.

-- Check a push and find out what it would do. Nothing is written but proofs: a step may check several queues and then store in all.
-- KEYS, ARGV  as in push.lua; the first key is not used
-- returns     the reply of a push that is refused; or nil, and the function that stores everything and returns the reply
local function prepare_push(KEYS, ARGV)
  local jobs, due, conf, dead = KEYS[2], KEYS[3], KEYS[5], KEYS[6]
  local conf_now = redis.call('HMGET', conf, 'max_length', 'schema', 'stubs', 'partitions', 'line', 'bound', 'expires', 'events')
  if (conf_now[2] or '1') ~= '1' and conf_now[2] ~= '2' then return ARGV[1] .. '\nschema\n' .. conf_now[2] end
  if (conf_now[4] or '1') ~= ARGV[3] then return ARGV[1] .. '\npartitions\n' .. (conf_now[4] or '') end
  -- "?" leaves the maximum to what producers have declared, "!" to nobody.
  local prefix, bound = string.sub(jobs, 1, -5), string.match(ARGV[2], '^%d+ ?%S*') or (ARGV[2] == '?' and conf_now[6]) or '0'
  local maximum, leaves, excess, drops = ARGV[2] ~= '!' and tonumber(conf_now[1] or string.match(bound, '^%d+')) or 0, nil, 0, nil
  if maximum > 0 then
    local length = redis.call('HLEN', jobs) - redis.call('ZCARD', dead) - tonumber(conf_now[3] or 0)
    excess = length + tonumber(ARGV[4]) - maximum
    drops = excess > 0 and tonumber(ARGV[4]) <= maximum and string.find(bound, 'drop', 1, true)
    if drops then check('HLEN', prefix .. 'state', prefix .. 'waiters') end
  end

  -- Read everything first: which special jobs exist already, here or earlier in this very push.
  check('HLEN', jobs)
  check('LLEN', KEYS[7])
  local ids, answers, claimed, tagged, known = {}, {}, {}, {}, 0
  local parsed = {} -- attributes by their text: many jobs of a push have the same
  local now, appends, prepends, schedules, owns, fronts, moves
  local queue, checked = nil, {} -- where a job has a group or a limit
  local function begin()
    if queue then return end
    queue = {prefix = prefix, jobs = jobs, conf = conf, due = due}
    begin_groups(queue)
  end
  local push = {prefix = prefix, jobs = jobs, due = due, dead = dead, keys = {}, rests = {}, texts = {}, successors = {}}
  local at, runs = 5, #ARGV
  while at <= runs do
    local count = tonumber(ARGV[at + 1])
    if ARGV[at] == 'p' then
      at = at + 2 + 2 * count
      appends = true
    else
      now = now or clock()
      for i = at + 2, at + 2 + 10 * (count - 1), 10 do
        local id, holder = ARGV[i], nil
        if not string.find(ARGV[i + 6], '^%d$') then error('not a priority: ' .. ARGV[i + 6]) end
        if ARGV[i + 6] ~= '0' then check('LLEN', KEYS[7 + tonumber(ARGV[i + 6])]) end
        for field = i + 3, i + 5 do
          if ARGV[field] ~= '' then number_in(ARGV[field]) end
        end
        if ARGV[i + 3] ~= '' or ARGV[i + 4] ~= '' then
          redis.call('ZRANGE', due, 0, 0)
          schedules = true
        end
        if ARGV[i + 9] == '1' then prepends = true else appends = true end
        if ARGV[i + 8] == '1' then
          owns = true
          holder = claimed['i' .. id] or redis.call('GET', prefix .. 'unique:i:' .. id) and id
          -- A dead letter or a stub may be older than the day its id is kept for: two entries of one id must never be.
          if not holder and redis.call('HEXISTS', jobs, id) == 1 then holder = id end
        end
        local found = parsed[ARGV[i + 7]]
        if not found then
          found = attributes(ARGV[i + 7], {})
          parsed[ARGV[i + 7]] = found
        end
        local group = group_of(found)
        if group then
          begin()
          local list = list_of(queue, ARGV[i + 6], group)
          if not checked[list] then redis.call('LLEN', list) end
          checked[list] = true
          if ARGV[i + 9] == '1' then fronts = true end
        end
        local answer = holder and {'kept', holder}
        if not answer and found.keys then
          answer = meet(push, id, found.keys, ARGV[i + 2], ARGV[i + 7])
          if answer and answer[1] == 'raise' then return ARGV[1] .. '\nduplicate\n' .. answer[2] .. '\n' .. answer.key.text end
          if answer and answer.moves then
            begin()
            moves = true
          end
          if answer and answer.key and answer.key.conflict == 'b' then
            redis.call('ZRANGE', due, 0, 0)
            schedules = true
          end
        end
        -- Only a job that will be stored takes its id: one that is refused for its key must not block the next of that id.
        if not answer or answer.behind then claimed['i' .. id] = id end
        if (not answer or answer.behind) and ARGV[i + 7] ~= '' then list_tags(tagged, found.tags, id) end
        ids[#ids + 1] = answer and '\t' .. answer[2] .. (answer[1] == 'kept' and '' or '\t' .. answer[1]) or id
        answers[i] = answer
        if answer and not answer.behind then known = known + 1 end
      end
      at = at + 2 + 10 * count
    end
  end

  for tag in pairs(tagged) do check('ZCARD', prefix .. 'tag:' .. tag) end

  -- A job that exists already needs no place.
  local places = tonumber(ARGV[4]) - known
  excess = excess - known
  if drops then
    -- A maximum that was lowered far is reached step by step.
    local most = math.min(excess, tonumber(ARGV[4]) + 1000)
    drops = most > 0 and find_oldest(KEYS, most)
    if drops and drops.count < most then
      return ARGV[1] .. '\nfull\n' .. int(maximum + excess - places) .. '\n' .. int(maximum)
    end
  elseif maximum > 0 and places == 0 then
    leaves = member_of(ARGV[2], ARGV[4])
  elseif maximum > 0 and (conf_now[5] or excess > 0) then
    local refusal
    refusal, leaves = admit(prefix, ARGV[2], conf_now[5], maximum + excess - places, maximum, tonumber(ARGV[4]))
    if refusal then return ARGV[1] .. '\n' .. refusal end
  end

  -- The first write is refused when Redis is full, and the whole push with it. HSET is proven by its first use, and RPUSH too
  -- when nothing but the records has to be removed again.
  local none = prefix .. 'none'
  prove(none, 'SET', 'HDEL')
  if owns then prove(none, 'DEL') end
  if prepends then prove(none, 'LPUSH') end
  if schedules or next(tagged) then prove(none, 'ZADD') end
  if queue then check('SCARD', prefix .. 'tickets') end
  if queue then prove(none, 'LPUSH', 'RPUSH', 'SADD', 'HINCRBY') end
  if fronts or moves then prove_groups(none) end
  if moves then
    for priority = 0, 9 do check('LLEN', KEYS[7 + priority]) end
    prove(none, 'LREM', 'SREM')
  end
  if appends and (prepends or schedules) then prove(none, 'RPUSH') end
  if conf_now[7] then prove(none, 'PTTL', 'PERSIST') end
  if drops then prove(none, 'LTRIM', 'LREM', 'SREM', 'ZREM', 'HGET', 'HINCRBY', 'PEXPIRE', 'GET', 'DEL', 'RPUSH') end
  return nil, function()
    begin_events(conf_now[8])
    if conf_now[7] then renew_expiry(prefix, 0, true) end
    if drops then drop(KEYS, prefix, drops) end
    if conf_now[2] ~= '2' then redis.call('HSET', conf, 'schema', '2') end

    local takeable = false
    local function append(key, ids, first, last)
      local answer = redis.pcall('RPUSH', key, unpack(ids, first, last))
      if type(answer) == 'number' then return end
      in_chunks('HDEL', jobs, ids, 1, #ids)
      error(answer.err)
    end

    local function plain(first, count)
      local entries = {}
      for i = 0, count - 1 do entries[i + 1] = ARGV[first + 2 * i] end
      in_chunks('HSET', jobs, ARGV, first, first + 2 * count - 1)
      for i = first, events and first + 2 * count - 1 or 0, 2 do note_event('enqueued', ARGV[i], ARGV[i + 1], '1') end
      for from = 1, count, 7000 do append(KEYS[7], entries, from, math.min(from + 6999, count)) end
      takeable = true
    end

    local function special(i, now, behind)
      local id, line, delay, priority, text = ARGV[i], ARGV[i + 1], ARGV[i + 3], ARGV[i + 6], ARGV[i + 7]
      local found = parsed[text]
      local instant = delay ~= '' and now + tonumber(delay) or tonumber(ARGV[i + 4])
      if ARGV[i + 5] ~= '' then line = line .. ' e' .. int(now + tonumber(ARGV[i + 5])) end
      if instant and instant > now then line = line .. ' d' .. int(instant) end
      if ARGV[i + 8] == '1' then line = line .. ' i' end
      for _, key in ipairs(found.keys or {}) do
        if key.conflict == 'b' and key.max then text = text .. '\tm' .. int(now + key.max) end
      end
      if behind then text = text .. '\ta' .. behind end
      redis.call('HSET', jobs, id, line .. text .. ARGV[i + 2])
      if events then note_event('enqueued', id, ARGV[i + 2], '1', 'at', instant and instant > now and int(instant) or '') end
      if behind then
        redis.call('HSET', prefix .. 'reruns', behind, id)
      elseif instant and instant > now then
        redis.call('ZADD', due, instant, id)
        if redis.call('ZRANGE', due, 0, 0)[1] == id then takeable = true end
      else
        local group = queue and group_of(found)
        local ready = KEYS[7 + tonumber(priority)]
        if group then
          if join_group(queue, priority, group, id, ARGV[i + 9] == '1') then takeable = true end
        else
          if ARGV[i + 9] == '1' then redis.call('LPUSH', ready, id) else append(ready, {id}, 1, 1) end
          takeable = true
        end
      end
      if ARGV[i + 8] == '1' then
        redis.call('SET', prefix .. 'unique:i:' .. id, id)
        -- Of an earlier job of this id, where they are kept for more than its day. Parts of a stream are known by their numbers alone.
        redis.call('DEL', prefix .. 'result:' .. id, prefix .. 'stream:' .. id, prefix .. 'logs:' .. id)
      end
      for _, key in ipairs(found.keys or {}) do
        if not behind or holder_of(prefix, key) ~= behind then take_key(prefix, key, id) end
      end
    end

    at = 5
    while at <= runs do
      local count = tonumber(ARGV[at + 1])
      if ARGV[at] == 'p' then
        plain(at + 2, count)
        at = at + 2 + 2 * count
      else
        for i = at + 2, at + 2 + 10 * (count - 1), 10 do
          local answer = answers[i]
          if not answer or answer.behind then special(i, now, answer and answer.behind)
          elseif answer[1] ~= 'kept' then
            local groups = answer.moves and queue or nil
            if rewrite(push, groups, answer[2], ARGV[i + 2], ARGV[i + 7], ARGV[i + 3], ARGV[i + 5], answer.key, now) then takeable = true end
            if events then note_event('updated', answer[2], ARGV[i + 2], '1', 'why', 'replaced') end
          end
        end
        at = at + 2 + 10 * count
      end
    end
    change_tags('ZADD', prefix, tagged)
    if queue then
      pass_on(queue, now, 1)
      redis.call('HINCRBY', conf, 'waiting', 0) -- the field tells a turn that there are groups
      write_counters(queue)
      if queue.moved or queue.counters.alarms > 0 then takeable = true end
    end
    if bound ~= '0' and bound ~= conf_now[6] then redis.call('HSET', conf, 'bound', bound) end
    local reply = ARGV[1] .. '\nok'
    if #ids > 0 then reply = reply .. '\n' .. table.concat(ids, '\n') end
    if not conf_now[2] then reply = reply .. '\n\t' end
    if takeable then wake(KEYS[4]) end
    if leaves then redis.call('ZREM', prefix .. 'room', leaves) end
    if conf_now[5] then call_next(prefix) end
    if conf_now[7] then pcall(function() renew_expiry(prefix, clock()) end) end -- it may have stored nothing
    write_events(prefix)
    return reply
  end
end
