-- List the limits of a queue, or its groups. Nothing is written.
-- needs: numbers envelope limits limit_use group_limits
--
-- KEYS  1 conf  2 jobs  3 due  4-13 ready:0 … ready:9
-- ARGV  1 "limits" or "groups"  2 how many at most of what is in use and not named in conf
-- returns limits: (name, key, declared, override, used, waiting, opens_at or "")…
--         groups: (key, waiting, weight, paused, running)…
local prefix, most, now = string.sub(KEYS[2], 1, -5), math.min(number_in(ARGV[2]), 1000), clock()
local queue = {prefix = prefix, jobs = KEYS[2], due = KEYS[3], conf = KEYS[1]}
begin_groups(queue)
local conf, texts = redis.call('HGETALL', KEYS[1]), {}
local names, seen, reply, used = {}, {}, {}, 0
for i = 1, #conf, 2 do texts[conf[i]] = conf[i + 1] end

local function add(name, in_use)
  if seen[name] or (in_use and used >= most) then return end
  if in_use then used = used + 1 end
  seen[name] = true
  names[#names + 1] = name
end
-- Add what a hash has of limits or groups in use, from a bounded part of it.
local function scan(hash, step, of)
  local page = redis.call('HSCAN', prefix .. hash, '0', 'COUNT', most)[2]
  for i = step, #page, 2 do
    local name = of(page[i])
    if name then add(name, true) end
  end
end

if ARGV[1] == 'limits' then
  for field in pairs(texts) do
    local name = string.match(field, '^limit:(.*)$') or string.match(field, '^override:(.*)$')
    if name then add(name) end
  end
  local function declared(name)
    if string.byte(name) == 9 then name = string.sub(name, 2) end
    local first = string.byte(name)
    return first ~= 58 and first ~= 59 and first ~= 9 and name or nil -- 9: a schedule, which is due beside limits
  end
  scan('limits', 1, declared)
  scan('waits', 2, declared)
  for _, member in ipairs(redis.call('ZRANGE', KEYS[3], 0, most - 1)) do
    local name = string.byte(member) == 9 and declared(member)
    if name then add(name, true) end
  end
  table.sort(names)
  load_limits(queue, names)
  local left = 2000 -- so many groups are looked into; each of the others counts as one job
  local function waiting_at(name)
    local limit = prefix .. 'limit:' .. name
    local count = redis.call('ZCARD', limit)
    local members = count > 0 and left > 0 and redis.call('ZRANGE', limit, 0, left - 1) or {}
    left = left - #members
    for _, member in ipairs(members) do
      count = count - 1 + redis.call('LLEN', prefix .. 'group:' .. string.sub(member, 1, 1) .. ':' .. string.sub(member, 2))
    end
    return count
  end
  for _, name in ipairs(names) do
    local base, key, s = string.match(name, '^[^:]*'), string.match(name, ':(.*)$') or '', queue.limits[name]
    local room, taken, opens = room_of(queue, s, now), used_of(queue, s, now), nil
    if room < 1 then opens = opens_at(queue, s, 1, now) end
    local at = #reply
    reply[at + 1], reply[at + 2], reply[at + 3] = base, key, texts['limit:' .. base] or ''
    reply[at + 4], reply[at + 5] = texts['override:' .. name] or '', int(taken)
    reply[at + 6] = waiting_at(name)
    reply[at + 7] = opens and int(opens) or ''
  end
  return reply
end

for field in pairs(texts) do
  local key = string.match(field, '^weight:(.*)$') or string.match(field, '^paused:(.*)$')
  if key then add(':' .. key) end
end
local lists = {} -- the groups of a key
local function note(priority, group)
  local name = key_limit(group)
  lists[name] = lists[name] or {}
  lists[name][#lists[name] + 1] = prefix .. 'group:' .. priority .. ':' .. group
  add(name, true)
end
for i = 4, 13 do
  for _, entry in ipairs(redis.call('LRANGE', KEYS[i], 0, most - 1)) do
    if string.byte(entry) == 9 then note(i - 4, string.sub(entry, 2)) end
  end
end
local page = redis.call('HSCAN', prefix .. 'waits', '0', 'COUNT', most)[2]
for i = 1, #page, 2 do note(string.sub(page[i], 1, 1), string.sub(page[i], 2)) end
table.sort(names)
load_limits(queue, names)
-- Concurrency limits by a key may open the groups of it, whose jobs hold slots there and not at the limit of the key itself.
local opening = {}
for field, text in pairs(texts) do
  local base = string.match(field, '^limit:(.*)$')
  if base and string.match(text, '^c %d+ [^-]') then opening[#opening + 1] = base end
end
local function running_of(name)
  local most, fields = queue.limits[name].count, {string.sub(name, 2)} -- the group of a limit without a key is called as the limit
  for i, base in ipairs(string.byte(name) == 58 and opening or {}) do fields[i + 1] = base .. name end
  for _, count in ipairs(read_fields(prefix .. 'limits', fields)) do most = math.max(most, tonumber(count or 0)) end
  return most
end
for _, name in ipairs(names) do
  local at, waiting, s = #reply, 0, queue.limits[name]
  for _, list in ipairs(lists[name] or {}) do waiting = waiting + redis.call('LLEN', list) end
  reply[at + 1], reply[at + 2], reply[at + 3] = string.sub(name, 2), waiting, s.weight
  reply[at + 4], reply[at + 5] = s.paused and 1 or 0, running_of(name)
end
return reply
