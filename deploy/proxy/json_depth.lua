-- Says whether a request's JSON is nested more deeply than a question can be: in the variable txn.too_deep.
-- A question is an object with lists: two levels. A body that is not whole, or has a string without an end, counts as too deep.
local MOST = 8

core.register_action("json_depth", { "http-req" }, function(txn)
    local body = txn.sf:req_body()
    local wanted = tonumber(txn.sf:req_fhdr("content-length"))
    local depth, deepest = 0, 0
    -- strings hold any bracket: drop escapes first, then all between quotes
    local bare = body:gsub("\\.", ""):gsub('"[^"]*"', "")
    for bracket in bare:gmatch("[%[%]{}]") do
        depth = depth + ((bracket == "[" or bracket == "{") and 1 or -1)
        deepest = math.max(deepest, depth)
        if deepest > MOST then break end
    end
    local whole = wanted ~= nil and #body == wanted and not bare:find('"', 1, true)
    txn:set_var("txn.too_deep", deepest > MOST or not whole)
end)
