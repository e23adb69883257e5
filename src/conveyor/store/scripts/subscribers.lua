-- Find the queues that subscribe to a topic, and count what is about to be published to them.
-- needs: topics
--
-- KEYS  1 registry of topics  2 counts
-- ARGV  1 topic  2 number of messages to count, "0": none
-- returns {version of the registry ("": nobody subscribes to anything), queue…}
local version, queues = subscribers_of(KEYS[1], ARGV[1])
if ARGV[2] ~= '0' then count_published(KEYS[2], ARGV[1], ARGV[2], #queues == 0) end
return {version, unpack(queues)}
