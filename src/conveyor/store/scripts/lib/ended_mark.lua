-- Reading of the marks of jobs that ended well; lib/ended.lua says where they are.

-- Read what is remembered of a job that is not in the queue.
-- prefix   of the queue's keys
-- id       of the job
-- returns  its mark, nil when it is not known to have ended well; true when the id is one of a caller's own that was here within a day
local function ended_mark(prefix, id)
  local own = redis.call('GET', prefix .. 'unique:i:' .. id)
  if own then return string.match(own, '^\t(.)$'), true end
  if #id ~= 22 then return nil, false end
  local text = redis.call('GET', prefix .. 'ended:' .. string.sub(id, 1, 7))
  local at = text and 1
  while at do
    at = string.find(text, id, at, true)
    if at and at % 23 == 1 then return string.sub(text, at + 22, at + 22), false end
    at = at and at + 1
  end
  return nil, false
end
