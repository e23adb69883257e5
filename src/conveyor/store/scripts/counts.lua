-- Count what a queue holds.
-- needs: numbers leased counts
--
-- KEYS  1 jobs  2 due  3 dead  4 workers  5 conf  6-15 ready:0 … ready:9  16 outbox
--       then, for a plain list, the list and its intake
-- ARGV  none
-- returns {now_ms, ready, scheduled, leased, dead, workers, paused, max_length or -1, entries of the plain list and its intake,
--         entries of the outbox, records more than there are places, waiting, producers that wait for room,
--         jobs that full="drop-oldest" has dropped, workers whose leases have ended, which the others are without, oldest ready id or "", its envelope's marks}
local lists = {}
for i = 17, #KEYS do lists[#lists + 1] = KEYS[i] end
local now = clock()
return {now, count_queue(string.sub(KEYS[1], 1, -5), KEYS[1], lists, now)}
