-- The place of a job.

-- Find a job in its queue, or what is remembered of it.
-- queue    fields prefix, jobs, state, due, dead and workers are used
-- id       of the job
-- own      key result:<id>
-- window   key results:<window> of the same id
-- returns  {place, envelope, state, extra…} as the header of get_job.lua says
local function job_place(queue, id, own, window)
  local envelope = redis.call('HGET', queue.jobs, id)
  local attempts = redis.call('HGET', queue.state, id) or ''
  if not envelope or string.byte(envelope) == 120 then
    local record = kept_result(own, window, id)
    if record then return {'result', '', '', record} end
    if envelope then return {'cancelled', '', '', ''} end
    local mark, known = ended_mark(queue.prefix, id)
    if mark then return {'ended', '', '', mark} end
    return {'none', '', '', known and '1' or ''}
  end
  local due = redis.call('ZSCORE', queue.due, id)
  if due then return {'scheduled', envelope, attempts, int(tonumber(due))} end
  local after = string.match(envelope, '^[^\n]*\ta([^\t\n]*)')
  if after and redis.call('HGET', queue.prefix .. 'reruns', after) == id then return {'waiting', envelope, attempts, after} end
  local died = redis.call('ZSCORE', queue.dead, id)
  if died then return {'dead', envelope, attempts, int(tonumber(died))} end
  for _, worker in ipairs(redis.call('ZRANGE', queue.workers, 0, 999)) do
    local held = redis.call('HMGET', queue.prefix .. 'leased:' .. worker, id, '\tabout')
    if held[1] then return {'leased', envelope, attempts, worker, leased_at(held[1]) or '', held[2] or ''} end
  end
  local paused = read_paused(redis.call('HGET', queue.prefix .. 'conf', 'paused_tasks'))
  local waits = (string.byte(envelope) ~= 10 and group_of(marks(envelope))) or (paused and is_shut(queue.prefix, paused, task_of(envelope)))
  return {waits and 'waiting' or 'ready', envelope, attempts, ''}
end
