-- Read all that is known of several jobs, and register a process that watches those that live.
-- needs: numbers listed envelope kept_result ended_mark leased shut_tasks job_place
--
-- KEYS  1 jobs  2 state  3 due  4 dead  5 workers  6 waiters  7 none
-- ARGV  1 channel of the watching process, behind a star  then for each job: id, "1" for one that may arrive later
-- returns for each job what get_job.lua returns
local queue = {
  prefix = string.sub(KEYS[1], 1, -5), jobs = KEYS[1], state = KEYS[2], due = KEYS[3], dead = KEYS[4], workers = KEYS[5],
}
local places, live = {}, {}
for i = 2, #ARGV, 2 do
  local id = ARGV[i]
  local place = job_place(queue, id, queue.prefix .. 'result:' .. id, queue.prefix .. 'results:' .. string.sub(id, 1, 7))
  places[#places + 1] = place
  local word = place[1]
  local ended = word == 'dead' or word == 'result' or word == 'ended' or word == 'cancelled'
  if not ended and (word ~= 'none' or ARGV[i + 1] == '1') then live[#live + 1] = id end
end
local fields = {}
if #live > 0 then
  local channels = redis.call('HMGET', KEYS[6], unpack(live))
  for i, id in ipairs(live) do
    local waiting = channels[i]
    if not waiting or not listed(waiting, ' ', ARGV[1]) then
      fields[#fields + 1], fields[#fields + 2] = id, (waiting and waiting .. ' ' or '') .. ARGV[1]
    end
  end
end
if #fields > 0 then
  redis.call('HDEL', KEYS[6], '\t')
  redis.call('HSET', KEYS[6], unpack(fields))
end
return places
