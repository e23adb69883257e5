-- Giving back the unique keys of many jobs of a turn; lib/unique.lua says what they are.

-- Give back the keys of many jobs that are done.
-- prefix   of the queue's keys
-- done     the ids of those that count
-- at       where in ARGV the pairs (id, attributes) stand
-- count    their number
-- returns  nothing
local function release_done(prefix, done, at, count)
  local names, owners, ids, held = {}, {}, {}, {}
  for _, id in ipairs(done) do held[id] = true end
  for i = at, at + 2 * count - 1, 2 do
    local id = ARGV[i]
    if held[id] then
      held[id] = nil
      ids[#ids + 1] = id
      for _, key in ipairs(attributes(ARGV[i + 1], {}).keys or {}) do
        if key.life ~= 't' then names[#names + 1], owners[#owners + 1] = prefix .. 'unique:k:' .. key.text, id end
      end
    end
  end
  for first = 1, #names, 7000 do
    local last, gone = math.min(first + 6999, #names), {}
    local holders = redis.call('MGET', unpack(names, first, last))
    for i = first, last do
      if holders[i - first + 1] == owners[i] then gone[#gone + 1] = names[i] end
    end
    if #gone > 0 then redis.call('DEL', unpack(gone)) end
  end
  if #ids > 0 and redis.call('EXISTS', prefix .. 'reruns') == 1 then
    for _, id in ipairs(ids) do admit_successor(prefix, id) end
  end
end

-- Give back the keys that end when their jobs start.
-- prefix   of the queue's keys
-- ids, envelopes, taken  the jobs that were leased, and their number
-- returns  nothing
local function release_started(prefix, ids, envelopes, taken)
  for i = 1, taken do
    if string.byte(envelopes[i]) ~= 10 and string.find(envelopes[i], '^[^\n]*\tks') then
      for _, key in ipairs(marks(envelopes[i]).keys) do
        local name = prefix .. 'unique:k:' .. key.text
        if key.life == 's' and redis.call('GET', name) == ids[i] then redis.call('DEL', name) end
      end
    end
  end
end
