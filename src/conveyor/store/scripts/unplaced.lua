-- Read one page of the ids of a queue: of its jobs that are neither scheduled, dead nor leased, or of a ready list.
--
-- KEYS  1 jobs  2 due  3 dead  4 workers  5-14 ready:0 … ready:9
-- ARGV  1 "jobs" or a priority  2 cursor of HSCAN, or offset in the list  3 how many at most
-- returns {next cursor ("0": the end), ids…}
if ARGV[1] ~= 'jobs' then
  local first, count = tonumber(ARGV[2]), tonumber(ARGV[3])
  local ids = redis.call('LRANGE', KEYS[5 + tonumber(ARGV[1])], first, first + count - 1)
  return {#ids == count and tostring(first + count) or '0', unpack(ids)}
end
local page = redis.call('HSCAN', KEYS[1], ARGV[2], 'COUNT', ARGV[3])
local prefix, workers, reply = string.sub(KEYS[1], 1, -5), redis.call('ZRANGE', KEYS[4], 0, -1), {page[1]}
for i = 1, #page[2], 2 do
  local id = page[2][i]
  local placed = redis.call('ZSCORE', KEYS[2], id) or redis.call('ZSCORE', KEYS[3], id)
  for _, worker in ipairs(workers) do
    placed = placed or redis.call('HEXISTS', prefix .. 'leased:' .. worker, id) == 1
  end
  if not placed then reply[#reply + 1] = id end
end
return reply
