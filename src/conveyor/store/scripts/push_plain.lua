-- Accept plain messages, all of them or none: messages that need an envelope and an entry and no more. This script makes no
-- function and repeats a few lines of push.lua and its parts, because it is called most: it takes 14 µs in Redis instead of 33.
-- lazy: events expiry
--
-- KEYS  1 lane:<producer>  2 jobs  3 ready:0  4 wake  5 conf  6 dead
-- ARGV  1 number of this push in its sequence  2 maximum length (0: none)  3 partitions of the queue (1: none)
--       4… (id envelope)…
-- returns as push.lua: "<number>\nok", "<number>\nok\n\t", "<number>\nfull\n<length>\n<maximum>", "<number>\nschema\n<found>",
--         "<number>\npartitions\n<found>", "<number>\nlate"
local redis, KEYS, ARGV = redis, KEYS, ARGV -- looked up once: globals that are read at each use were 2 % of a push
local number = ARGV[1]
local conf = redis.call('HMGET', KEYS[5], 'schema', 'max_length', 'stubs', 'partitions', 'line', 'bound', 'expires', 'events')
local schema, maximum, refusal = conf[1], conf[2] or ARGV[2], nil
if schema ~= '2' and schema and schema ~= '1' then return number .. '\nschema\n' .. schema end
local last_argument = #ARGV
if (conf[4] or '1') ~= ARGV[3] then refusal = '\npartitions\n' .. (conf[4] or '')
elseif maximum ~= '0' then
  maximum = tonumber(maximum)
  local length = redis.call('HLEN', KEYS[2]) - redis.call('ZCARD', KEYS[6]) - tonumber(conf[3] or 0)
  if length + (last_argument - 3) / 2 > maximum or (conf[5] and redis.call('EXISTS', string.sub(KEYS[5], 1, -5) .. 'room') == 1) then
    refusal = string.format('\nfull\n%.0f\n%.0f', length, maximum)
  end
end
if refusal then
  local seen = redis.call('GET', KEYS[1])
  return seen and string.match(seen, '^%d+') == number and seen or number .. refusal
end

-- The first write is refused when Redis is full, and the whole push with it. The sequence tells a repeat from a new push.
local reply = number .. (schema and '\nok' or '\nok\n\t')
local kept = string.byte(KEYS[1], -1) == 43 and '86400000' or '7200000' -- as in lib/sequence.lua
local last = redis.call('SET', KEYS[1], reply, 'PX', kept, 'GET')
if last then
  local seen = string.match(last, '^%d+')
  if seen == number then
    if last ~= reply then redis.call('SET', KEYS[1], last, 'PX', kept) end -- it was withdrawn, and stays so
    return last
  end
  -- Compared as text, since two conversions were 4 % of a push. No number begins with 0.
  if #seen > #number or #seen == #number and seen > number then
    redis.call('SET', KEYS[1], last, 'PX', kept)
    return number .. '\nlate'
  end
end

-- Scripts do not roll back. Reading each key first would cost every push, so the writes are undone when a key turns out to
-- hold another type. A write answers with a number, or with the table of an error.
local problem
if conf[7] then
  local kept_on, why = pcall(function() lazy().renew_expiry(string.sub(KEYS[5], 1, -5), 0, true) end)
  if not kept_on then problem = type(why) == 'table' and why or {err = why} end
end
if problem then -- nothing is stored
elseif last_argument == 5 then
  local answer = redis.pcall('HSET', KEYS[2], ARGV[4], ARGV[5])
  if type(answer) == 'table' then problem = answer
  else
    answer = redis.pcall('RPUSH', KEYS[3], ARGV[4])
    if type(answer) == 'table' then
      problem = answer
      redis.call('HDEL', KEYS[2], ARGV[4])
    end
  end
else
  local ids = {}
  for i = 4, last_argument, 2 do ids[#ids + 1] = ARGV[i] end
  for first = 4, last_argument, 7000 do
    local answer = redis.pcall('HSET', KEYS[2], unpack(ARGV, first, math.min(first + 6999, last_argument)))
    if type(answer) == 'table' then problem = answer break end
  end
  for first = 1, problem and 0 or #ids, 7000 do
    local answer = redis.pcall('RPUSH', KEYS[3], unpack(ids, first, math.min(first + 6999, #ids)))
    if type(answer) == 'table' then
      problem = answer
      for from = 1, #ids, 7000 do redis.call('HDEL', KEYS[2], unpack(ids, from, math.min(from + 6999, #ids))) end
      break
    end
  end
end
if problem then
  if last then redis.call('SET', KEYS[1], last, 'PX', kept) else redis.call('DEL', KEYS[1]) end
  return problem
end
if schema ~= '2' then redis.call('HSET', KEYS[5], 'schema', '2') end
if ARGV[2] ~= '0' and ARGV[2] ~= conf[6] then redis.call('HSET', KEYS[5], 'bound', ARGV[2]) end
if redis.pcall('EXISTS', KEYS[4]) ~= 1 then
  redis.pcall('RPUSH', KEYS[4], '1')
  redis.pcall('PEXPIRE', KEYS[4], '3600000')
end
if conf[8] then
  lazy().begin_events(conf[8])
  for i = 4, last_argument, 2 do lazy().note_event('enqueued', ARGV[i], ARGV[i + 1], '1') end
  lazy().write_events(string.sub(KEYS[5], 1, -5))
end
return reply
