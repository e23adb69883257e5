-- The hash leased:<worker>. Its fields are the ids of the jobs that the worker holds, and names of our own that begin with a
-- tab (byte 9): always \tturn, \tabout and \tlease, at times \tcancel and \tleft. Ids hold no control characters.
-- The value of an id is its place: 8192 times the number of the turn that leased it, plus its position in that turn.

-- Count what a worker holds.
-- key      the hash
-- returns  number of jobs; 0 when there is no such hash
local function count_held(key)
  local fields = redis.call('HLEN', key)
  return fields > 0 and fields - 3 - redis.call('HEXISTS', key, '\tcancel') or 0
end

-- List what a worker holds.
-- key      the hash
-- returns  ids, in no order
local function ids_held(key)
  local ids = {}
  for _, field in ipairs(redis.call('HKEYS', key)) do
    if string.byte(field) ~= 9 then ids[#ids + 1] = field end
  end
  return ids
end

-- List what a worker holds in the order in which it was leased.
-- key      the hash
-- turn     number of the turn whose jobs are wanted; nil: all turns
-- returns  ids, the oldest first
local function ids_in_order(key, turn)
  local all, found = redis.call('HGETALL', key), {}
  for i = 1, #all, 2 do
    local place = tonumber(all[i + 1])
    if string.byte(all[i]) ~= 9 and (not turn or math.floor(place / 8192) == turn) then found[#found + 1] = {place, all[i]} end
  end
  table.sort(found, function(a, b) return a[1] < b[1] end)
  local ids = {}
  for i, pair in ipairs(found) do ids[i] = pair[2] end
  return ids
end
