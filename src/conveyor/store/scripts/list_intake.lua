-- Move raw entries of a plain list into the queue, where they are kept before a worker takes them.
-- needs: numbers keys tokens rights
--
-- KEYS  1 jobs  2 ready:0  3 the plain list  4 intake  5 wake
-- ARGV  1 how many at most  2 the stem of the new ids  3 the text before each entry that makes it an envelope
-- returns the number of entries moved
local want, moved, base = math.min(number_in(ARGV[1]), 1000), 0, 0
check('LLEN', KEYS[2], KEYS[3], KEYS[4])

-- A repeat of this call brings the same stem for other entries: an id that lives is passed over, never overwritten.
local function taken()
  local ids = {}
  for i = 1, want do ids[i] = ARGV[2] .. string.format('%04d', base + i) end
  for _, found in ipairs(redis.call('HMGET', KEYS[1], unpack(ids))) do
    if found then return true end
  end
  return false
end
while want > 0 and taken() do base = base + want end

redis.call('HDEL', KEYS[1], '\t')
prove(string.sub(KEYS[1], 1, -5) .. 'none', 'LPOP', 'HSET', 'RPUSH')
for _, source in ipairs({KEYS[4], KEYS[3]}) do
  local entries = want > moved and redis.call('LPOP', source, want - moved)
  if entries and #entries > 0 then
    local pairs_, ids = {}, {}
    for i, entry in ipairs(entries) do
      local id = ARGV[2] .. string.format('%04d', base + moved + i)
      pairs_[2 * i - 1], pairs_[2 * i], ids[i] = id, ARGV[3] .. entry, id
    end
    redis.call('HSET', KEYS[1], unpack(pairs_))
    redis.call('RPUSH', KEYS[2], unpack(ids))
    moved = moved + #entries
  end
end
if moved > 0 then wake(KEYS[5]) end
return moved
