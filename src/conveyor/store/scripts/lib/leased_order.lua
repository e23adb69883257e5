-- The order of the jobs in a hash leased:<worker>; lib/leased.lua describes the hash.

-- List what a worker holds in the order in which it was leased.
-- key      the hash
-- turn     the one whose jobs are wanted; nil: all
-- returns  ids, the oldest first, and their places
local function ids_in_order(key, turn)
  local all, found = redis.call('HGETALL', key), {}
  for i = 1, #all, 2 do
    local place = tonumber(all[i + 1])
    if string.byte(all[i]) ~= 9 and (not turn or math.floor(place / 8192) == turn) then found[#found + 1] = {place, all[i], all[i + 1]} end
  end
  table.sort(found, function(a, b) return a[1] < b[1] end)
  local places = {}
  for i, one in ipairs(found) do found[i], places[i] = one[2], one[3] end
  return found, places
end
