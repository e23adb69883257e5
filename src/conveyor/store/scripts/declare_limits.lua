-- Record the limits that a program declares, all or none: one whose kind, or the argument that it is by, differs from what is
-- recorded is refused.
-- needs: numbers keys tokens envelope rights limits group_limits groups declared
--
-- KEYS  1 conf  2 jobs  3 due  4 wake  5 none
-- ARGV  1 "1": another number replaces the recorded one, "" it is kept  2… (name text)…
-- returns (name, recorded text)… of those that differ; then nothing was recorded
local fields, different, changed, values = {}, {}, {}, {}
for i = 2, #ARGV, 2 do fields[#fields + 1] = 'limit:' .. ARGV[i] end
if #fields == 0 then return {} end
for i, found in ipairs(read_fields(KEYS[1], fields)) do
  local name, text = ARGV[2 * i], ARGV[2 * i + 1]
  if found and (string.byte(found) ~= string.byte(text) or string.match(found, '%S+$') ~= string.match(text, '%S+$')) then
    different[#different + 1], different[#different + 2] = name, found
  elseif not found or (ARGV[1] == '1' and found ~= text) then
    values[#values + 1], values[#values + 2] = 'limit:' .. name, text
    if found then changed[name] = true end
  end
end
if #different > 0 or #values == 0 then return different end
local queue = {prefix = string.sub(KEYS[2], 1, -5), jobs = KEYS[2], due = KEYS[3], conf = KEYS[1]}
begin_groups(queue)
redis.call('HDEL', KEYS[1], '\t')
if next(changed) then
  prove_groups(KEYS[5])
  prove(KEYS[5], 'HSCAN')
end
in_chunks('HSET', KEYS[1], values, 1, #values)
if next(changed) then
  touch_changed(queue, function(limit) return changed[string.match(limit, '^[^:]*')] end, clock())
  wake(KEYS[4])
end
return {}
