-- Jobs that ended well and whose value is not kept: known for ten minutes, so that "it ended" is told from "it never was".
-- Those with generated ids of the same 64 ms share a string, ended:<first 7 characters>, to which a turn appends with one
-- command: 15 characters of the id and a mark, "-" it returned no value, "+" it returned one that is not kept any more.
-- An id of the caller's own has its mark in unique:i:<id>, which is kept for a day; a tab stands before it, which ids do not have.

-- Add a job to those that are to be remembered. An id that was not generated is left out. Nothing is written here.
-- windows  a table of first characters to texts
-- id       of the job
-- mark     "-" or "+"
-- returns  nothing
local function note_ended(windows, id, mark)
  if #id ~= 22 then return end
  local name = string.sub(id, 1, 7)
  local texts = windows[name]
  if not texts then
    texts = {}
    windows[name] = texts
  end
  texts[#texts + 1] = string.sub(id, 8) .. mark
end

-- Remember jobs. They have ended, and callers who are refused the knowledge have lost no job: so nothing fails for it.
-- prefix   of the queue's keys
-- windows  as note_ended fills it
-- returns  nothing
local function remember_ended(prefix, windows)
  for name, texts in pairs(windows) do
    local key = prefix .. 'ended:' .. name
    redis.pcall('APPEND', key, table.concat(texts))
    redis.pcall('PEXPIRE', key, 600000)
  end
end
