-- The first line of an envelope. It is empty for a plain job, so a plain envelope begins with a line break (byte 10).

-- Read attributes.
-- text     as they stand in an envelope: each behind a tab and its letter
-- found    a table that they are added to
-- returns  that table: unique and group (keys), limits and tags (lists, nil when there are none), keys (all unique keys, the one in
--          unique too: {text, life, ms, conflict, max}; nil when there are none),
--          after (the job that this one is to run after), latest (ms: a debounced job is put off no further)
local function attributes(text, found)
  for letter, value in string.gmatch(text, '\t(%a)([^\t]*)') do
    if letter == 'u' or letter == 'k' then
      local key = {text = value, life = 'd', conflict = 'k'}
      if letter == 'u' then found.unique = value
      else
        local life, ms, conflict, max, name = string.match(value, '^(%l)(%d*)(%l)(%d*) (.*)$')
        key = {text = name, life = life, ms = tonumber(ms), conflict = conflict, max = tonumber(max)}
      end
      found.keys = found.keys or {}
      found.keys[#found.keys + 1] = key
    elseif letter == 'g' then found.group = value
    elseif letter == 'a' then found.after = value
    elseif letter == 'm' then found.latest = tonumber(value)
    elseif letter == 'l' or letter == 't' then
      local name = letter == 'l' and 'limits' or 'tags'
      local list = found[name] or {}
      list[#list + 1] = value
      found[name] = list
    end
  end
  return found
end

-- Read the marks and the attributes of an envelope.
-- envelope  as it is stored in jobs
-- returns   nil for a plain job, else {stub, priority, expires (ms), due (ms), own (the id is the caller's)} and attributes
local function marks(envelope)
  if string.byte(envelope, 1) == 10 then return nil end
  local head, text = string.match(envelope, '^([^\t\n]*)([^\n]*)')
  if head == '' then return attributes(text, {stub = false, priority = 0, own = false}) end
  local older = string.find(head, 'u', 1, true) -- the unique key, in an older layout
  if older then head, text = string.sub(head, 1, older - 1), '\t' .. string.sub(head, older) end
  return attributes(text, {
    stub = string.byte(head, 1) == 120,
    priority = tonumber(string.match(head, 'p(%d)')) or 0,
    expires = tonumber(string.match(head, 'e(%d+)')),
    due = tonumber(string.match(head, 'd(%d+)')),
    own = string.find(head, 'i', 1, true) ~= nil,
  })
end

-- Read the priority of a job.
-- envelope  as it is stored in jobs; false when there is none
-- returns   0 to 9; 0 also for a job without an envelope
local function priority_of(envelope)
  if not envelope or string.byte(envelope, 1) == 10 then return 0 end
  return marks(envelope).priority
end

-- Name the group of a job.
-- found    its marks
-- returns  nil: it is in none
local function group_of(found)
  if found.group then return 'g' .. found.group end
  local limits = found.limits
  if not limits then return nil end
  local first
  for _, limit in ipairs(limits) do
    local name = string.match(limit, '^%d+:(.*)$')
    if name and string.find(name, ':', 1, true) then return 'l' .. name end
    first = first or name
  end
  return first and 'l' .. first
end

-- Read the task of a job.
-- envelope  as it is stored
-- returns   its name; "" of a message, nil of a cancelled job
local function task_of(envelope)
  return envelope and string.match(envelope, '^[^\n]*\n([^\n\t]+)')
end
