-- Publish messages: a copy of each in every queue that subscribes, all in this step, or nothing.
-- needs: numbers keys tokens sequence envelope tags unique announce outcome rights limits group_limits groups place_change is_leased key_holder conflict room admission events shut_tasks drop expiry accept topics
--
-- KEYS  1 lane:<producer>  2 registry of topics  3 counts  4 outbox  5… the key jobs of each queue that gets copies
--       In a cluster only the first queue gets them here: 2 and 3 are the key none of it, and the outbox has the other copies.
-- ARGV  1 number of this publish in its sequence  2 topic  3 version of the registry that the publisher knows, "-" in a cluster
--       4 number of messages  5 number of blocks, then each: count, so many arguments of push.lua from its fourth one on
--       then for each queue: maximum length, partitions, number of its block
--       then entries for the outbox
-- returns "<number>\nok", then for each queue "\f" and what push.lua says behind its own "ok"
--         "<number>\nchanged\n<version>\n<queue>\n…": others subscribe now; nothing stored
--         "<number>\nrefused <number of the queue>\n…" as in push.lua: that queue refuses its copies; nothing stored anywhere
--         "<number>\nlate…" as in push.lua
local reply = answered(KEYS[1], ARGV[1])
if reply then return reply end
if ARGV[3] ~= '-' and (redis.call('HGET', KEYS[2], 'version') or '') ~= ARGV[3] then
  local version, queues = subscribers_of(KEYS[2], ARGV[2])
  return ARGV[1] .. '\nchanged\n' .. version .. '\n' .. table.concat(queues, '\n')
end

local blocks, at = {}, 6
for block = 1, tonumber(ARGV[5]) do
  blocks[block] = {at + 1, at + tonumber(ARGV[at])}
  at = blocks[block][2] + 1
end
local stores, number = {}, #KEYS - 4
for queue = 1, number do
  local jobs, maximum, partitions, block = KEYS[4 + queue], ARGV[at], ARGV[at + 1], blocks[tonumber(ARGV[at + 2])]
  local prefix = string.sub(jobs, 1, -5)
  local keys = {KEYS[1], jobs, prefix .. 'due', prefix .. 'wake', prefix .. 'conf', prefix .. 'dead'}
  for priority = 0, 9 do keys[7 + priority] = prefix .. 'ready:' .. priority end
  keys[17] = prefix .. 'none'
  local arguments = {ARGV[1], maximum, partitions}
  for i = block[1], block[2] do arguments[#arguments + 1] = ARGV[i] end
  local refusal
  refusal, stores[queue] = prepare_push(keys, arguments)
  if refusal then return ARGV[1] .. '\nrefused ' .. queue .. string.sub(refusal, #ARGV[1] + 1) end
  at = at + 3
end
if at <= #ARGV then
  check('LLEN', KEYS[4])
  prove(string.sub(KEYS[5], 1, -5) .. 'none', 'RPUSH')
end

reply = ARGV[1] .. '\nok'
for queue = 1, number do reply = reply .. '\f' .. string.sub(stores[queue](), #ARGV[1] + 4) end
if at <= #ARGV then in_chunks('RPUSH', KEYS[4], ARGV, at, #ARGV) end
redis.call('SET', KEYS[1], reply, 'PX', sequence_ms(KEYS[1]))
if ARGV[3] ~= '-' then count_published(KEYS[3], ARGV[2], ARGV[4], number == 0) end
return reply
