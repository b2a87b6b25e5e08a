-- wrk's script: posts the prepared bodies of a folder in turn, and ends with one JSON line.
-- wrk … -s load.lua http://HOST:PORT/PATH -- FOLDER
local requests, turn = {}, 0

local function read(path)
   local file = io.open(path, "rb")
   if not file then return nil end
   local content = file:read("*a")
   file:close()
   return content
end

function init(args)
   local headers = { ["Content-Type"] = read(args[1] .. "/content-type") }
   while true do
      local body = read(string.format("%s/%03d", args[1], #requests))
      if not body then break end
      requests[#requests + 1] = wrk.format("POST", nil, headers, body)
   end
end

function request()
   turn = turn % #requests + 1
   return requests[turn]
end

function done(summary, latency)
   local errors = summary.errors
   io.write(string.format(
      '\n{"requests": %d, "seconds": %f, "p50": %f, "p99": %f, "errors": %d}\n',
      summary.requests, summary.duration / 1e6, latency:percentile(50) / 1e3, latency:percentile(99) / 1e3,
      errors.connect + errors.read + errors.write + errors.status + errors.timeout))
end
