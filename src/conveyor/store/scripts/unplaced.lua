-- Read one page of the ids of a queue: of its jobs that are neither scheduled, dead nor leased, nor wait for another job; or of a ready list, with those in
-- the groups whose tickets stand there; or of the groups whose tickets wait at limits.
-- needs: is_leased
--
-- KEYS  1 jobs  2 due  3 dead  4 workers  5-14 ready:0 … ready:9
-- ARGV  1 "jobs", a priority, or "waits"  2 cursor of HSCAN, or offset in the list  3 how many at most, or groups
-- returns {next cursor ("0": the end), ids…}
local prefix = string.sub(KEYS[1], 1, -5)
local function add_group(ids, priority, group)
  for _, id in ipairs(redis.call('LRANGE', prefix .. 'group:' .. priority .. ':' .. group, 0, -1)) do ids[#ids + 1] = id end
end
local reply = {}
if ARGV[1] == 'waits' then
  local page = redis.call('HSCAN', prefix .. 'waits', ARGV[2], 'COUNT', 100)
  reply[1] = page[1]
  for i = 1, #page[2], 2 do add_group(reply, string.sub(page[2][i], 1, 1), string.sub(page[2][i], 2)) end
  return reply
elseif ARGV[1] ~= 'jobs' then
  local first, count = tonumber(ARGV[2]), tonumber(ARGV[3])
  local entries = redis.call('LRANGE', KEYS[5 + tonumber(ARGV[1])], first, first + count - 1)
  reply[1] = #entries == count and tostring(first + count) or '0'
  for _, entry in ipairs(entries) do
    if string.byte(entry) == 9 then add_group(reply, ARGV[1], string.sub(entry, 2)) else reply[#reply + 1] = entry end
  end
  return reply
end
local page = redis.call('HSCAN', KEYS[1], ARGV[2], 'COUNT', ARGV[3])
local workers = redis.call('ZRANGE', KEYS[4], 0, -1)
reply[1] = page[1]
for i = 1, #page[2], 2 do
  local id = page[2][i]
  local placed = redis.call('ZSCORE', KEYS[2], id) or redis.call('ZSCORE', KEYS[3], id) or is_leased(prefix, id, workers)
  local after = string.match(page[2][i + 1], '^[^\n]*\ta([^\t\n]*)')
  placed = placed or after and redis.call('HGET', prefix .. 'reruns', after) == id and redis.call('HEXISTS', KEYS[1], after) == 1
  if not placed then reply[#reply + 1] = id end
end
return reply
