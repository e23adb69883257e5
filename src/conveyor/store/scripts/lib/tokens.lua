-- Tokens: the list on which idle workers block (key wake).

-- Wake an idle worker, unless a token is there already. A token that nobody took for an hour is not needed.
-- key      the list
-- returns  nothing
local function wake(key)
  if redis.call('EXISTS', key) == 0 then
    redis.call('RPUSH', key, '1')
    redis.call('PEXPIRE', key, 3600000)
  end
end
