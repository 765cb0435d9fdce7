-- Script for wrk: requests the paths of a file in turn.
-- All requests are built beforehand, so that each costs the client the same.
local requests = {}
local index = 0

function init(arguments)
  for path in io.lines(arguments[1]) do requests[#requests + 1] = wrk.format("GET", path) end
end

function request()
  index = index % #requests + 1
  return requests[index]
end
