-- The end of a job: its record, what its id had reserved, and the processes that wait for it.

-- Write the record of a cancelled job.
-- at       ms since the epoch
-- reason   "expired", "purged" or "not started"; nil when a caller cancelled it
-- by       who asked for it; nil or "": nobody says
-- returns  JSON
local function cancelled_record(at, reason, by)
  local asker = by and by ~= '' and '"by":' .. cjson.encode(by) .. ',' or ''
  return '{"status":"cancelled",' .. (reason and '"reason":"' .. reason .. '",' or '') .. asker .. string.format('"at":%.0f}', at)
end

-- Release what a job had reserved: its unique keys at once, an id that the caller gave after a day.
-- prefix   of the queue's keys
-- id       of the job
-- found    its attributes, and own: true when the id is the caller's
-- mark     of a job that ended well, which its own id keeps (lib/ended.lua); nil: it ended otherwise
-- ended    true when it has run to an end, well or not
-- returns  nothing
local function release(prefix, id, found, mark, ended)
  local own = found.own
  release_keys(prefix, id, found, ended)
  if own and mark then redis.call('SET', prefix .. 'unique:i:' .. id, '\t' .. mark, 'PX', 86400000)
  elseif own then redis.call('PEXPIRE', prefix .. 'unique:i:' .. id, 86400000) end
end

-- Tell the processes that wait for a job how it ended.
-- waiters  key waiters
-- id       of the job
-- record   as for announce_to
-- returns  nothing
local function announce(waiters, id, record)
  local channels = redis.call('HGET', waiters, id)
  if channels then announce_to(waiters, id, channels, record) end
end

-- End a job whose envelope was removed, or replaced by a stub: remove its state, keep its record, release and announce.
-- queue   fields prefix, state and waiters are used
-- id      of the job
-- keep    ms that the record is kept; 0: it is only announced
-- record  as for announce
-- found, mark, ended  as for release
-- returns nothing
local function finish(queue, id, keep, record, found, mark, ended)
  redis.call('HDEL', queue.state, id)
  if keep > 0 then redis.call('SET', queue.prefix .. 'result:' .. id, record, 'PX', keep) end
  release(queue.prefix, id, found, mark, ended)
  announce(queue.waiters, id, record)
end

-- Count a job that ended without a report of a worker, among the sums of all time, which metrics read. The step does not fail for it.
-- prefix    of the queue's keys
-- outcome   "cancelled" or "expired"
-- envelope  of the job; false when there is none; a message is not counted
-- returns   nothing
local function count_end(prefix, outcome, envelope)
  local task = task_of(envelope)
  if not task then return end
  redis.pcall('HINCRBY', prefix .. 'stats:total', outcome .. ':' .. task, 1)
  redis.pcall('PEXPIRE', prefix .. 'stats:total', 2678400000)
end
