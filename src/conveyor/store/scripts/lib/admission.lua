-- Admission: whether a queue with a maximum length takes more jobs.

-- Name a producer as it stands in the line.
-- text, count  as for admit
-- returns   nil of one that does not wait
local function member_of(text, count)
  local who = string.match(text, '^%d+ %S+ (%S+ %S+) %d+ %S+$')
  return who and who .. ' ' .. count
end

-- Decide about a push, or put its producer into the line (lib/room.lua).
-- prefix    of the queue's keys
-- text      "<maximum>[ <full>[ <channel> <number> <since in µs, 0: it comes new> <wait or last>]]": a producer without a channel does
--           not wait, and one that comes for the last time leaves the line
-- line      true when somebody waits
-- length, maximum  jobs that the queue has, and may have
-- count     jobs of this push
-- returns   nil when the jobs may be stored, else the words of the refusal; what leaves the line when they are
local function admit(prefix, text, line, length, maximum, count)
  local room = prefix .. 'room'
  local since, how = string.match(text, '^%d+ %S+ %S+ %S+ (%d+) (%S+)$')
  local member = member_of(text, int(count))
  local score = line and member and redis.call('ZSCORE', room, member)
  local fits = length + count <= maximum
  if score and tonumber(score) < 0 and fits then return nil, member end

  local free = maximum - length
  if line or member then prove(prefix .. 'none', 'SET', 'ZADD', 'ZREM', 'HDEL') end
  if member and since ~= '0' and how == 'wait' then
    redis.call('ZADD', room, since, member) -- it keeps its place, also when that was forgotten
    redis.call('HSET', prefix .. 'conf', 'line', '1')
    line = true
  end
  if line then
    free = call_next(prefix)
    score = member and redis.call('ZSCORE', room, member)
    if score and tonumber(score) < 0 then return nil, member end
  end
  if not score and count <= free and redis.call('ZCOUNT', room, 0, '+inf') == 0 then return nil end
  local refusal = int(length) .. '\n' .. int(maximum)
  if how ~= 'wait' or count > maximum then
    if score and redis.call('ZREM', room, member) == 1 then call_next(prefix) end
    return 'full\n' .. refusal
  end
  if not score then
    local now = redis.call('TIME')
    since = string.format('%d%06d', now[1], now[2])
    redis.call('ZADD', room, since, member)
    redis.call('HSET', prefix .. 'conf', 'line', '1')
  end
  redis.call('PEXPIRE', room, 600000)
  return 'wait\n' .. refusal .. '\n' .. since
end
