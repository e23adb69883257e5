-- Tokens: the list on which idle workers block (key wake).

-- Wake an idle worker, unless a token is there already. A token that nobody took for an hour is not needed.
-- A step does not fail for its token: a lost one costs seconds, never a job.
-- key      the list
-- returns  nothing
local function wake(key)
  if redis.pcall('EXISTS', key) ~= 1 then
    redis.pcall('RPUSH', key, '1')
    redis.pcall('PEXPIRE', key, 3600000)
  end
end
