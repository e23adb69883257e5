-- Change which queues subscribe to the topics of a pattern.
-- needs: topics
--
-- KEYS  1 registry of topics
-- ARGV  1 "add" · "remove" · "leave": the queues leave all patterns  2 pattern, "" for leave  3 version that the registry gets
--       4… queues
-- returns the number of subscriptions that were added or removed
local registry, how, version = KEYS[1], ARGV[1], ARGV[3]
local fields = how == 'leave' and redis.call('HKEYS', registry) or {'=' .. ARGV[2]}
local changed, lists, named = 0, {}, {}
for i = 4, #ARGV do named[ARGV[i]] = true end
for _, field in ipairs(fields) do
  if string.sub(field, 1, 1) == '=' then
    local kept, has, before = {}, {}, changed
    for queue in string.gmatch(redis.call('HGET', registry, field) or '', '%S+') do
      has[queue] = true
      if how ~= 'add' and named[queue] then changed = changed + 1 else kept[#kept + 1] = queue end
    end
    if how == 'add' then
      for queue in pairs(named) do
        if not has[queue] then
          kept[#kept + 1] = queue
          changed = changed + 1
        end
      end
    end
    if changed > before then
      table.sort(kept)
      lists[field] = table.concat(kept, ' ')
    end
  end
end
if changed == 0 then return 0 end

local shapes, seen, patterns = {}, {}, 0
local all = redis.call('HKEYS', registry)
if how == 'add' then all[#all + 1] = '=' .. ARGV[2] end
for _, field in ipairs(all) do
  if string.sub(field, 1, 1) == '=' and lists[field] ~= '' then
    patterns = patterns + 1
    local pattern = words_of(string.sub(field, 2))
    for at, word in ipairs(pattern) do
      if word ~= '*' and word ~= '#' then pattern[at] = 'a' end
    end
    local shape = table.concat(pattern, '.')
    if string.find(shape, '[*#]') and not seen[shape] then
      seen[shape] = true
      shapes[#shapes + 1] = shape
    end
  end
end
-- The first write of a change that takes away is a removal, so that a full Redis takes it. What nobody subscribes to leaves no key.
if how ~= 'add' then redis.call('HDEL', registry, '\t') end
if patterns == 0 then
  redis.call('DEL', registry)
  return changed
end
table.sort(shapes)
redis.call('HSET', registry, 'version', version, 'shapes', table.concat(shapes, ' '))
for field, list in pairs(lists) do
  if list == '' then redis.call('HDEL', registry, field) else redis.call('HSET', registry, field, list) end
end
return changed
