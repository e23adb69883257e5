-- Jobs that ended well and whose value is not kept: known for ten minutes, so that "it ended" is told from "it never was".
-- Those with generated ids of the same 64 ms share a string, ended:<first 7 characters>, to which a turn appends with one
-- command: ids, each with a mark behind it, "-" it returned no value, "+" it returned one that is not kept any more. Whole ids,
-- since one that the script has already costs nothing to append, and its part would be a new text for each job.
-- An id of the caller's own has its mark in unique:i:<id>, which is kept for a day; a tab stands before it, which ids do not have.

-- Add a job to those that are to be remembered. An id that was not generated is left out. Nothing is written here.
-- marked   a table of marks and first characters to ids
-- id       of the job
-- mark     "-" or "+"
-- returns  nothing
local function note_ended(marked, id, mark)
  if #id ~= 22 then return end
  local windows, name = marked[mark], string.sub(id, 1, 7)
  if not windows then
    windows = {}
    marked[mark] = windows
  end
  local ids = windows[name]
  if ids then ids[#ids + 1] = id else windows[name] = {id} end
end

-- Remember jobs. They have ended, and callers who are refused the knowledge have lost no job: so nothing fails for it.
-- prefix   of the queue's keys
-- marked   as note_ended fills it
-- returns  nothing
local function remember_ended(prefix, marked)
  for mark, windows in pairs(marked) do
    for name, ids in pairs(windows) do
      local key = prefix .. 'ended:' .. name
      redis.pcall('APPEND', key, table.concat(ids, mark) .. mark)
      redis.pcall('PEXPIRE', key, 600000)
    end
  end
end
