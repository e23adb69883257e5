-- Partial results of jobs: a stream for each job that emits some. The id of an entry is the attempt and the number of the part
-- within it, so that a part that comes again is known, and is left out.

-- Read the parts of a record, and check the stream. Nothing is written here.
-- key      stream:<id>
-- record   "<longest> <attempt> <first number> <bytes of each>…\n" and then the parts
-- returns  most entries that the stream keeps, list of ids and parts that it does not have yet
local function new_parts(key, record)
  local last = redis.call('XREVRANGE', key, '+', '-', 'COUNT', 1)[1]
  local last_attempt, last_number = string.match(last and last[1] or '0-0', '^(%d+)-(%d+)$')
  last_attempt, last_number = tonumber(last_attempt), tonumber(last_number)
  local head, at = string.match(record, '^([^\n]*)\n()')
  local most, attempt, number, sizes = string.match(head, '^(%d+) (%d+) (%d+)(.*)$')
  attempt, number = tonumber(attempt), tonumber(number)
  local parts = {}
  for size in string.gmatch(sizes, '%d+') do
    size = tonumber(size)
    if attempt > last_attempt or (attempt == last_attempt and number > last_number) then
      parts[#parts + 1] = int(attempt) .. '-' .. int(number)
      parts[#parts + 1] = string.sub(record, at, at + size - 1)
    end
    at, number = at + size, number + 1
  end
  return most, parts
end

-- Add parts to a stream.
-- key, record  as for new_parts
-- life     ms that the stream is kept from now on
-- returns  nothing
local function add_parts(key, record, life)
  local most, parts = new_parts(key, record)
  for i = 1, #parts, 2 do redis.call('XADD', key, 'MAXLEN', most, parts[i], 'v', parts[i + 1]) end
  redis.call('PEXPIRE', key, int(life))
end
