-- For wrk: asks for the paths of a file one after another. All requests are made beforehand, so each costs the same.
local requests, at = {}, 0

function init(arguments)
  for path in io.lines(arguments[1]) do requests[#requests + 1] = wrk.format("GET", path) end
end

function request()
  at = at % #requests + 1
  return requests[at]
end
