-- Tags. The ids of the jobs that have a tag stand in the sorted set tag:<tag>, all with the score 0, so in the order of the ids.
-- A job is there from its push until it is gone; a dead letter is not gone. A set without ids leaves no key.

-- Add a job to lists of ids by tag.
-- lists    tag → ids
-- tags     of the job; nil: none
-- id       of the job
-- returns  nothing
local function list_tags(lists, tags, id)
  for _, tag in ipairs(tags or {}) do
    lists[tag] = lists[tag] or {}
    table.insert(lists[tag], id)
  end
end

-- Carry out a command for the ids of each tag, many in one.
-- command  ZADD or ZREM
-- prefix   of the queue's keys
-- lists    tag → ids
-- returns  nothing
local function change_tags(command, prefix, lists)
  for tag, ids in pairs(lists) do
    local words = {}
    for _, id in ipairs(ids) do
      if command == 'ZADD' then words[#words + 1] = '0' end
      words[#words + 1] = id
    end
    -- Nothing is lost with an entry of an index, so that no step fails for it.
    for first = 1, #words, 7000 do
      redis.pcall(command, prefix .. 'tag:' .. tag, unpack(words, first, math.min(first + 6999, #words)))
    end
  end
end
