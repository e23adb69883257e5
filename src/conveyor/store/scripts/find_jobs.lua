-- Find jobs by a filter, or count them: one step of a walk.
-- needs: numbers envelope leased leased_order heads shut_tasks made_at walk
--
-- KEYS  1 jobs  2 none
-- ARGV  1 "heads": each without its body, and of its errors the last alone, without its traceback · "count"
--       2… as in lib/walk.lua
-- returns {now_ms, 1 at the end, cursor, looked at, ids that may be chosen, …}    then for heads (id, envelope, state, place, extra)…, extra as in list_jobs.lua;
--         for count (place, count)…
local prefix, heads = string.sub(KEYS[1], 1, -5), ARGV[1] == 'heads'
local walk, counts, facts = walk_jobs(prefix, 2, true, heads and 2 or 0), {}, {}
local reply = reply_of(walk)
for _, job in ipairs(walk.found) do
  counts[job.place] = (counts[job.place] or 0) + 1
  if heads then
    local extra = job.at and int(job.at) or ''
    if job.worker then
      local about = not facts[job.worker] and redis.call('HGET', prefix .. 'leased:' .. job.worker, '\tabout') or ''
      facts[job.worker], extra = true, job.worker .. '\t' .. extra .. '\t' .. about
    end
    local state = job.state or redis.call('HGET', prefix .. 'state', job.id) or ''
    for _, part in ipairs({job.id, without_body(job.envelope), with_last_error(state), job.place, extra}) do reply[#reply + 1] = part end
  end
end
if not heads then
  for place, count in pairs(counts) do reply[#reply + 1], reply[#reply + 2] = place, count end
end
return reply
