-- Say what a worker holds, for the one whose own count differs.
--
-- KEYS  1 leased:<worker>
-- ARGV  none
-- returns ids
local ids = {}
for _, id in ipairs(redis.call('HKEYS', KEYS[1])) do
  if string.byte(id) ~= 9 then ids[#ids + 1] = id end
end
return ids
