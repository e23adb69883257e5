-- The registry of topics: which queues subscribe to which pattern. A HASH of "=<pattern>" → names of queues with spaces between
-- them, "shapes" → where the wildcards of all patterns stand, and "version", another text after each change.

-- Cut the name of a topic, or a pattern, into its words.
-- name     words with points between them
-- returns  the words
local function words_of(name)
  local words = {}
  for word in string.gmatch(name, '[^.]+') do words[#words + 1] = word end
  return words
end

-- Find the queues that subscribe to a topic. It costs one look for each shape of pattern that is in use, however many patterns,
-- topics and queues there are. A shape is a pattern whose plain words are "a".
-- registry  the key
-- topic     its name, without wildcards
-- returns   the version of the registry ("" while nobody subscribes to anything), names of queues without doubles, sorted
local function subscribers_of(registry, topic)
  local found = redis.call('HMGET', registry, 'version', 'shapes', '=' .. topic)
  local words, fields, names, seen = words_of(topic), {}, {}, {}
  for shape in string.gmatch(found[2] or '', '%S+') do
    local pattern = words_of(shape)
    local rest = pattern[#pattern] == '#'
    if #pattern == #words or (rest and #pattern <= #words + 1) then
      for at, word in ipairs(pattern) do
        if word == 'a' then pattern[at] = words[at] end
      end
      fields[#fields + 1] = '=' .. table.concat(pattern, '.')
    end
  end
  local lists = #fields > 0 and redis.call('HMGET', registry, unpack(fields)) or {}
  lists[#fields + 1] = found[3]
  for at = 1, #fields + 1 do
    for queue in string.gmatch(lists[at] or '', '%S+') do
      if not seen[queue] then
        seen[queue] = true
        names[#names + 1] = queue
      end
    end
  end
  table.sort(names)
  return found[1] or '', names
end

-- Count what was published. It is counted by topic for 10,000 topics, and for all the others together. A step does not fail for it.
-- counts   the key: "+<topic>" → published, "-<topic>" → of these to nobody
-- topic    its name
-- number   of messages
-- nobody   true when no queue subscribes
-- returns  nothing
local function count_published(counts, topic, number, nobody)
  local names = nobody and {'+', '-'} or {'+'}
  for _, sign in ipairs(names) do
    local reached = redis.pcall('HINCRBY', counts, sign .. topic, number)
    if reached == tonumber(number) and redis.pcall('HLEN', counts) > 20002 then
      redis.pcall('HDEL', counts, sign .. topic)
      redis.pcall('HINCRBY', counts, sign, number)
    end
  end
end
