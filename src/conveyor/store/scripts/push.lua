-- Accept messages: all of them, or none.
-- needs: numbers keys tokens sequence envelope tags unique announce outcome rights limits group_limits groups place_change is_leased key_holder conflict room admission events shut_tasks drop expiry accept
--
-- KEYS  1 lane:<producer>  2 jobs  3 due  4 wake  5 conf  6 dead  7-16 ready:0 … ready:9  17 none
-- ARGV  1 number of this push in its sequence, "<last> <first>" of one that stands for several
--       2 maximum length (0: none) and what is done beyond it, as lib/admission.lua says; ! nothing refuses it  3 partitions of the queue (1: none)
--       4 number of jobs  then runs, in order:
--       "p" count (id envelope)…
--       "s" count (id marks rest delay_ms due_at_ms expires_ms priority attributes own front)…   "" where not given
-- returns "<number>\nok\n<id>\n<id>…"    the ids of the special jobs: the one given, or behind a tab the one that exists, and behind
--         another tab what was done about it: replaced, rerun; "\n\t" at the end: the queue was new here
--         "<number>\nfull\n<length>\n<maximum>", "<number>\nschema\n<found>": nothing stored
--         "<number>\nwait\n<length>\n<maximum>\n<since>": nothing stored, and its producer stands in the line since then
--         "<number>\nduplicate\n<id>\n<key>": a job has the key, and the push is to be refused then; nothing stored
--         "<number>\npartitions\n<found>": the queue has another number of them, "" none yet; nothing stored
--         "<number>\nlate\n<last number>": a later push of this producer was answered already, or a part of this one; nothing stored
local reply = answered(KEYS[1], ARGV[1])
if reply then return reply end

local refusal, store = prepare_push(KEYS, ARGV)
if refusal then return refusal end
reply = store()
local name = string.sub(KEYS[1], #KEYS[2] - 3) -- behind the prefix of the queue
if string.sub(name, 1, 6) == 'inbox:' then
  -- Of an outbox, which may repeat a push however late. A queue that goes when nobody uses it keeps it for a week.
  if redis.call('HGET', KEYS[5], 'expires') then redis.call('SET', KEYS[1], reply, 'PX', 604800000)
  else redis.call('SET', KEYS[1], reply) end
else
  redis.call('SET', KEYS[1], reply, 'PX', sequence_ms(KEYS[1]))
end
return reply
