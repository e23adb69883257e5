-- Names of workers, as people read them.

-- Read the name of a worker.
-- about    what it said of itself
-- returns  host:pid; nil when it did not say them
local function name_of(about)
  local host, pid = string.match(about, '"host":"([^"\\]*)"'), string.match(about, '"pid":(%d+)')
  return host and pid and host .. ':' .. pid
end
