-- Giving back what many jobs of a turn have beside their places: unique keys (lib/unique.lua) and tags.

-- Remove those of many unique keys that are still their jobs'.
-- names, owners              lists with the names of the keys and, in the same order, with the ids of their jobs
-- first_name, first_owner    where these begin in the lists
-- count                      their number
-- returns                    nothing
local function remove_keys(names, first_name, owners, first_owner, count)
  for first = 0, count - 1, 7000 do
    local last, own, found = math.min(first + 6999, count - 1), {}, 0
    local holders = redis.call('MGET', unpack(names, first_name + first, first_name + last))
    for i = first, last do
      if holders[i - first + 1] == owners[first_owner + i] then
        found = found + 1
        own[found] = names[first_name + i]
      end
    end
    if found > 0 then redis.call('DEL', unpack(own)) end
  end
end

-- Give back the keys of many jobs that are done, and note their tags.
-- queue    fields prefix and untagged are used
-- lost     the ids of those that are not held any more: they may run elsewhere, and keep what they have
-- names_at, owners_at  where in ARGV the names of unique keys stand, and the ids of their jobs, which have no more than that key
-- owned    their number
-- at       where in ARGV the pairs (id, attributes) stand
-- count    their number
-- returns  nothing
local function release_done(queue, lost, names_at, owners_at, owned, at, count)
  local words, is_lost = ARGV, {}
  for _, id in ipairs(lost) do is_lost[id] = true end
  if #lost + count == 0 then
    -- The usual turn: the words are the lists, so none is made.
    remove_keys(words, names_at, words, owners_at, owned)
  else
    local names, owners = {}, {}
    for i = 0, owned - 1 do
      local id = words[owners_at + i]
      if not is_lost[id] then names[#names + 1], owners[#owners + 1] = words[names_at + i], id end
    end
    for i = at, at + 2 * count - 1, 2 do
      local id = words[i]
      local found = not is_lost[id] and attributes(words[i + 1], {}) or {}
      list_tags(queue.untagged, found.tags, id)
      for _, key in ipairs(found.keys or {}) do
        if key.life ~= 't' then names[#names + 1], owners[#owners + 1] = queue.prefix .. 'unique:k:' .. key.text, id end
      end
    end
    remove_keys(names, 1, owners, 1, #names)
  end
  if redis.call('EXISTS', queue.prefix .. 'reruns') == 1 then
    for i = owners_at, owners_at + owned - 1 do
      if not is_lost[words[i]] then admit_successor(queue.prefix, words[i]) end
    end
    for i = at, at + 2 * count - 1, 2 do
      if not is_lost[words[i]] then admit_successor(queue.prefix, words[i]) end
    end
  end
end

-- Give back the keys that end when their jobs start.
-- prefix   of the queue's keys
-- ids, envelopes, taken  the jobs that were leased, and their number
-- returns  nothing
local function release_started(prefix, ids, envelopes, taken)
  for i = 1, taken do
    if string.find(envelopes[i], '^[^\n]*\tks') then
      for _, key in ipairs(marks(envelopes[i]).keys) do
        local name = prefix .. 'unique:k:' .. key.text
        if key.life == 's' and redis.call('GET', name) == ids[i] then redis.call('DEL', name) end
      end
    end
  end
end
