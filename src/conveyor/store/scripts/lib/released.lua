-- Giving back what many jobs of a turn have beside their places: unique keys (lib/unique.lua) and tags.

-- Give back the keys of many jobs that are done, and note their tags.
-- prefix   of the queue's keys
-- untagged the ids of jobs that are gone, by their tags
-- lost     the ids of those that do not count
-- at       where in ARGV the pairs (id, attributes) stand
-- count    their number
-- returns  nothing
local function release_done(prefix, untagged, lost, at, count)
  local names, owners, size, lead, not_held = {}, {}, 0, prefix .. 'unique:k:', {}
  for _, id in ipairs(lost) do not_held[id] = true end
  for i = at, at + 2 * count - 1, 2 do
    local id, text = ARGV[i], ARGV[i + 1]
    if not_held[id] then -- its key may be another job's by now
    elseif string.byte(text, 2) == 117 and not string.find(text, '\t', 2, true) then -- one key and no more, as most have
      size = size + 1
      names[size], owners[size] = lead .. string.sub(text, 3), id
    else
      local found = attributes(text, {})
      list_tags(untagged, found.tags, id)
      for _, key in ipairs(found.keys or {}) do
        if key.life ~= 't' then
          size = size + 1
          names[size], owners[size] = lead .. key.text, id
        end
      end
    end
  end
  for first = 1, size, 7000 do
    local last, gone = math.min(first + 6999, size), {}
    local holders = redis.call('MGET', unpack(names, first, last))
    for i = first, last do
      if holders[i - first + 1] == owners[i] then gone[#gone + 1] = names[i] end
    end
    if #gone > 0 then redis.call('DEL', unpack(gone)) end
  end
  if redis.call('EXISTS', prefix .. 'reruns') == 1 then
    for i = at, at + 2 * count - 1, 2 do
      if not not_held[ARGV[i]] then admit_successor(prefix, ARGV[i]) end
    end
  end
end

-- Give back the keys that end when their jobs start.
-- prefix   of the queue's keys
-- ids, envelopes, taken  the jobs that were leased, and their number
-- returns  nothing
local function release_started(prefix, ids, envelopes, taken)
  for i = 1, taken do
    -- The plain search is the fast one; the other tells a first line from a body.
    if string.byte(envelopes[i]) ~= 10 and string.find(envelopes[i], '\tks', 1, true) and string.find(envelopes[i], '^[^\n]*\tks') then
      for _, key in ipairs(marks(envelopes[i]).keys) do
        local name = prefix .. 'unique:k:' .. key.text
        if key.life == 's' and redis.call('GET', name) == ids[i] then redis.call('DEL', name) end
      end
    end
  end
end
