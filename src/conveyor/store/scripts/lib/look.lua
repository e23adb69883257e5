-- Looking at a queue for which a worker holds nothing. Nothing is written.

-- Tell whether a turn with the flag l would find something to do.
-- workers, dead, outbox  keys of the queue
-- now       ms
-- lease_ms  lease of the worker that asks
-- returns   true or false. Producers in line are a reason to look: a call of one that died just then lapses.
local function needs_upkeep(workers, dead, outbox, now, lease_ms)
  return redis.call('ZCOUNT', workers, '-inf', now + lease_ms / 2) > 0
    or redis.call('ZCOUNT', workers, now + 1.5 * lease_ms, '+inf') > 0
    or redis.call('EXISTS', outbox, string.sub(workers, 1, -8) .. 'room') > 0
    or redis.call('ZCARD', dead) > 100000
    or redis.call('ZCOUNT', dead, '-inf', now - 7776000000) > 0
end
