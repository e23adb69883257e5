-- Reading of kept results; lib/results.lua says where they are.

-- Read a kept result.
-- own      key result:<id>
-- window   key results:<window> of the same id
-- id       of the job
-- returns  the record; false when there is none, or its time is over
local function kept_result(own, window, id)
  local record = redis.call('GET', own)
  if record then return record end
  local field = redis.call('HGET', window, id)
  local ends, rest = string.match(field or '', '^(%d+) *\n(.*)$')
  return ends and tonumber(ends) > clock() and rest
end
