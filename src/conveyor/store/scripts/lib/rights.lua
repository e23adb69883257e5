-- Rights: a user may be refused single commands, and a script that is refused one amid its writes does not roll back.

-- Prove that this user may send commands: the step fails here when not. Call it before the first write of another command, and
-- behind a removal where a full Redis must take the step.
-- none     the key that never exists: most commands do nothing to it, and what makes it is removed at once
-- ...      the commands
-- returns  nothing
local function prove(none, ...)
  for _, command in ipairs({...}) do
    local name = ' ' .. command .. ' '
    if command == 'SET' then
      redis.call(command, none, '', 'XX')
    elseif command == 'APPEND' then
      redis.call('DEL', none)
      redis.call(command, none, '')
      redis.call('DEL', none)
    elseif command == 'XADD' then
      redis.call('DEL', none)
      redis.call(command, none, '1-1', 'v', '')
      redis.call('DEL', none)
    elseif command == 'ZADD' then
      redis.call(command, none, 'XX', 0, '')
    elseif string.find(' RPUSH LPUSH SADD HSET HINCRBY ', name, 1, true) then
      redis.call('DEL', none)
      redis.call(command, none, '', 1)
      redis.call('DEL', none)
    elseif string.find(' HDEL HEXISTS HGET HMGET HSCAN LINDEX LPOS PEXPIRE PEXPIREAT EXPIRE SREM ZREM ZSCORE ', name, 1, true) then
      redis.call(command, none, 1)
    elseif command == 'XREVRANGE' then
      redis.call(command, none, '+', '-')
    elseif string.find(' LRANGE LREM LTRIM ZCOUNT ZRANGE ', name, 1, true) then
      redis.call(command, none, 0, 0)
    else
      redis.call(command, none)
    end
  end
end
