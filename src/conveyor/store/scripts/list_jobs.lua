-- Read one page of jobs in a state: at most 500 entries, and about 1 MiB of them, so that a call takes a few milliseconds
-- whatever the jobs hold. The reply says how many entries were looked at; the next page begins behind them.
-- needs: numbers envelope leased leased_order heads shut_tasks made_at walk
--
-- KEYS  1 jobs  2 state  3 due  4 dead  5 workers  6 recent  7-16 ready:0 … ready:9
-- ARGV  1 ready, waiting, scheduled, leased, dead, dead-oldest or done · ids for those from 11 on, in whatever state
--       2 offset  3 count of entries (at most 500)
--       4 "heads": of each job the envelope without its body, and the state with the last error alone, without its traceback
--         "short": likewise, with the beginning of the body
--       5-10 a filter as in lib/walk.lua, its tag and states "", all "" for done and ids  11… ids
-- returns {entries looked at, 0 when no later one can be wanted, (id, envelope or "", state or "", extra)…}    extra: due or death in ms, the entry of a finished job, or
--         of a leased one, separated by tabs: its worker, since when (ms, or ""), and at the first of a worker what it said of itself
local prefix = string.sub(KEYS[1], 1, -5)
local offset, count, heads = tonumber(ARGV[2]), math.min(tonumber(ARGV[3]), 500), ARGV[4]
local rows, extras, stop = {}, {}, offset + count - 1
local holders, facts, filter = {}, {}, read_filter(5)

-- Add what a list has within the page, which goes over several lists.
local skip, room = offset, count
local function take(key)
  local length = redis.call('LLEN', key)
  if room > 0 and skip < length then
    for _, id in ipairs(redis.call('LRANGE', key, skip, skip + room - 1)) do rows[#rows + 1] = id end
    room = count - #rows
    skip = 0
  else
    skip = skip - length
  end
end

local function ready()
  for i = 16, 7, -1 do take(KEYS[i]) end
end

-- Those in groups, in the order of the groups' names, then those that are to run after others.
local function waiting()
  local members = redis.call('SMEMBERS', prefix .. 'tickets')
  for _, member in ipairs(redis.call('HKEYS', prefix .. 'waits')) do members[#members + 1] = member end
  table.sort(members)
  for _, member in ipairs(members) do
    if room <= 0 then return end
    take(prefix .. 'group:' .. string.sub(member, 1, 1) .. ':' .. string.sub(member, 2))
  end
  if room <= 0 then return end
  local pairs_ = redis.call('HGETALL', prefix .. 'reruns')
  for at = 2 * skip + 1, math.min(#pairs_, 2 * (skip + room)), 2 do
    rows[#rows + 1] = pairs_[at + 1]
    extras[#rows] = pairs_[at]
  end
end

local function sorted(key, reading)
  local pairs_ = redis.call(reading, key, offset, stop, 'WITHSCORES')
  for i = 1, #pairs_, 2 do
    rows[#rows + 1] = pairs_[i]
    extras[#rows] = int(tonumber(pairs_[i + 1]))
  end
end

local function leased()
  local seen = 0
  for _, worker in ipairs(redis.call('ZRANGE', KEYS[5], 0, 999)) do
    local key = prefix .. 'leased:' .. worker
    local held = count_held(key)
    -- Those that the page passes over are counted and not read.
    if seen + held > offset then
      facts[worker] = redis.call('HGET', key, '\tabout') or ''
      local ids, places = ids_in_order(key)
      for i, id in ipairs(ids) do
        if seen + i > offset and #rows < count then
          rows[#rows + 1] = id
          holders[#rows], extras[#rows] = worker, leased_at(places[i])
        end
      end
      held = #ids
    end
    seen = seen + held
    if #rows >= count then return end
  end
end

if ARGV[1] == 'ready' then ready()
elseif ARGV[1] == 'waiting' then waiting()
elseif ARGV[1] == 'scheduled' then sorted(KEYS[3], 'ZRANGE')
elseif ARGV[1] == 'dead' then sorted(KEYS[4], 'ZREVRANGE')
elseif ARGV[1] == 'dead-oldest' then sorted(KEYS[4], 'ZRANGE')
elseif ARGV[1] == 'leased' then leased()
elseif ARGV[1] == 'ids' then
  for i = 11, #ARGV do rows[#rows + 1] = ARGV[i] end
else
  local entries = redis.call('LRANGE', KEYS[6], offset, stop)
  local reply = {#entries}
  for _, entry in ipairs(entries) do
    reply[#reply + 1], reply[#reply + 2], reply[#reply + 3], reply[#reply + 4] = '', '', '', entry
  end
  return reply
end

local reply, size = {0}, 0
for i, id in ipairs(rows) do
  if size >= 1048576 then break end
  reply[1] = i
  local moment, place = tonumber(extras[i] or ''), ARGV[1] == 'dead-oldest' and 'dead' or ARGV[1]
  -- They come newest first.
  if filter.since and ARGV[1] == 'dead' and moment < filter.since then
    reply[1] = 0
    break
  end
  local envelope = redis.call('HGET', KEYS[1], id)
  size = size + (envelope and #envelope or 0)
  local job = {id = id, envelope = envelope, place = place, at = moment}
  local wanted = is_chosen(prefix, filter, job)
  size = size + #(job.state or '')
  if wanted ~= false then
    local state = job.state or redis.call('HGET', KEYS[2], id) or ''
    if not job.state then size = size + #state end
    if heads ~= '' then envelope, state = heads == 'heads' and without_body(envelope) or with_short_body(envelope), with_last_error(state) end
    local extra, worker = extras[i] or '', holders[i]
    if worker then
      extra = worker .. '\t' .. extra .. '\t' .. facts[worker]
      size = size + #facts[worker]
      facts[worker] = ''
    end
    reply[#reply + 1], reply[#reply + 2], reply[#reply + 3], reply[#reply + 4] = id, envelope, state, extra
  end
end
return reply
