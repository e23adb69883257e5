-- Prove that every live id is in exactly one place. This reads the whole queue in one step: for tests and quiet hours.
-- needs: numbers leased envelope room
--
-- KEYS  1 jobs  2 state  3 due  4 dead  5 workers  6 conf  7-16 ready:0 … ready:9
-- ARGV  1 refuse above this many jobs  2… tags that have a key: no other way finds those of jobs that are gone
-- returns (problem, id)…    or {"too-large", count}
local count = redis.call('HLEN', KEYS[1])
if count > tonumber(ARGV[1]) then return {'too-large', int(count)} end
local prefix, places, problems, stubs, tagged = string.sub(KEYS[1], 1, -5), {}, {}, 0, {}
local function problem(what, id)
  problems[#problems + 1], problems[#problems + 2] = what, id
end
local function place(id, where)
  if places[id] then problem('in ' .. places[id] .. ' and ' .. where, id) end
  places[id] = where
end
for i = 7, 16 do
  for _, id in ipairs(redis.call('LRANGE', KEYS[i], 0, -1)) do place(id, 'ready') end
end
for _, id in ipairs(redis.call('ZRANGE', KEYS[3], 0, -1)) do place(id, 'scheduled') end
for _, id in ipairs(redis.call('ZRANGE', KEYS[4], 0, -1)) do place(id, 'dead') end
for _, worker in ipairs(redis.call('ZRANGE', KEYS[5], 0, -1)) do
  for _, id in ipairs(ids_held(prefix .. 'leased:' .. worker)) do place(id, 'leased') end
end
local all = redis.call('HGETALL', KEYS[1])
for i = 1, #all, 2 do
  local stub = string.byte(all[i + 1]) == 120
  if stub then stubs = stubs + 1 end
  if not places[all[i]] then problem('nowhere', all[i]) end
  if stub and places[all[i]] ~= 'ready' then problem('stub outside ready', all[i]) end
  places[all[i]] = nil
  local found = not stub and marks(all[i + 1])
  for _, tag in ipairs(found and found.tags or {}) do
    tagged[tag] = (tagged[tag] or 0) + 1
    if not redis.call('ZSCORE', prefix .. 'tag:' .. tag, all[i]) then problem('not found by tag ' .. tag, all[i]) end
  end
end
for i = 2, #ARGV do tagged[ARGV[i]] = tagged[ARGV[i]] or 0 end
for tag, count in pairs(tagged) do
  local listed = redis.call('ZCARD', prefix .. 'tag:' .. tag)
  if listed > count then problem('tag without a live job', tag .. ' ' .. int(listed - count)) end
end
for id, where in pairs(places) do problem('no envelope, but in ' .. where, id) end
for _, id in ipairs(redis.call('HKEYS', KEYS[2])) do
  if redis.call('HEXISTS', KEYS[1], id) == 0 then problem('state without a job', id) end
end
if stubs ~= tonumber(redis.call('HGET', KEYS[6], 'stubs') or 0) then problem('wrong count of stubs', int(stubs)) end
audit_line(prefix, problem)
return problems
