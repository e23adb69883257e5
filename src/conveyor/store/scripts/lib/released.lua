-- Giving back what many jobs of a turn have beside their places: unique keys (lib/unique.lua) and tags.

-- Give back the keys of many jobs that are done, and note their tags.
-- queue    fields prefix and untagged are used
-- lost     the ids of those that do not count
-- names_at, owners_at  where in ARGV the names of unique keys stand, and the ids of their jobs, which have no more than that key
-- owned    their number
-- at       where in ARGV the pairs (id, attributes) stand
-- count    their number
-- returns  nothing
local function release_done(queue, lost, names_at, owners_at, owned, at, count)
  local given, names, owners, size, first_name, first_owner, not_held = ARGV, ARGV, ARGV, owned, names_at, owners_at, {}
  if count + #lost > 0 then
    names, owners, size, first_name, first_owner = {}, {}, 0, 1, 1
    for _, id in ipairs(lost) do not_held[id] = true end
    local function note_key(id, name)
      size = size + 1
      names[size], owners[size] = name, id
    end
    -- The key of one that is not held may be another job's by now.
    for i = 0, owned - 1 do
      if not not_held[given[owners_at + i]] then note_key(given[owners_at + i], given[names_at + i]) end
    end
    for i = at, at + 2 * count - 1, 2 do
      if not not_held[given[i]] then
        local found = attributes(given[i + 1], {})
        list_tags(queue.untagged, found.tags, given[i])
        for _, key in ipairs(found.keys or {}) do
          if key.life ~= 't' then note_key(given[i], queue.prefix .. 'unique:k:' .. key.text) end
        end
      end
    end
  end
  for first = 0, size - 1, 7000 do
    local last, gone, some, name, owner = math.min(first + 6999, size - 1), {}, 0, first_name + first, first_owner + first
    local holders = redis.call('MGET', unpack(names, name, first_name + last))
    for i = 0, last - first do
      if holders[i + 1] == owners[owner + i] then
        some = some + 1
        gone[some] = names[name + i]
      end
    end
    if some > 0 then redis.call('DEL', unpack(gone)) end
  end
  if redis.call('EXISTS', queue.prefix .. 'reruns') == 1 then
    local function let_follow(i)
      if not not_held[given[i]] then admit_successor(queue.prefix, given[i]) end
    end
    for i = owners_at, owners_at + owned - 1 do let_follow(i) end
    for i = at, at + 2 * count - 1, 2 do let_follow(i) end
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
