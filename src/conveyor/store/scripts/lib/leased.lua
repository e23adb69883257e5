-- The hash leased:<worker>. Its fields are the ids of the jobs that the worker holds, and names of our own that begin with a
-- tab (byte 9): always \tturn, \tabout and \tlease, at times \tcancel and \tleft. Ids hold no control characters.
-- The value of an id is its place: 8192 times the number of the turn that leased it, plus its position in that turn. It is a whole
-- number, which a command takes at a third of the cost of a text. The numbers of a worker's turns rise, and each is the instant
-- of its turn in ms since the beginning of 2025, by the server's clock as the worker knew it. The place of a job that extend has
-- moved is negative: it belongs to no turn of its new identity.

-- Count what a worker holds.
-- key      the hash
-- returns  number of jobs; 0 when there is no such hash. Of an idle worker, as most are of many queues, one command tells it.
local function count_held(key)
  local fields = redis.call('HLEN', key)
  return fields > 3 and fields - 3 - redis.call('HEXISTS', key, '\tcancel') or 0
end

-- Read when a job was leased.
-- place    the value of its id
-- returns  ms since the epoch as text; nil of a turn whose number is not an instant, because the worker did not know the time yet
local function leased_at(place)
  local number = math.floor(math.abs(tonumber(place)) / 8192)
  return number > 1000000000 and string.format('%.0f', number + 1735689600000) or nil
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
