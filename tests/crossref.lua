-- What Quarto does with @fig-x, @tbl-x and @sec-x in a website: a link with a number to a label of the same
-- page; any other label is shown as "?@fig-x". What is left are citations: pandoc's --citeproc, which takes a quarter
-- of pandoc's time, only for a page that has some. Used by pages.py only.
local numbers, counts, cited = {}, {fig = 0, tbl = 0, sec = 0}, false
local words = {fig = "Figure", tbl = "Table", sec = "Section"}

local function note(kind)
  return function(block)
    local id = block.identifier
    if id and id:match("^" .. kind .. "%-") then
      counts[kind] = counts[kind] + 1
      numbers[id] = counts[kind]
    end
  end
end

local function refer(cite)
  local out = pandoc.List()
  for k, one in ipairs(cite.citations) do
    local kind = one.id:lower():match("^(%a+)%-")
    if kind ~= "eq" and not words[kind] then return nil end
    if k > 1 then out:insert(pandoc.Str(", ")) end
    local id = one.id:sub(1, 1):lower() .. one.id:sub(2)
    if numbers[id] then
      out:insert(pandoc.Link({pandoc.Str(words[kind] .. " " .. numbers[id])}, "#" .. id))
    else
      out:insert(pandoc.Str("?@" .. one.id))
    end
  end
  return out
end

local function cites() cited = true end

local function resolve(page) return cited and pandoc.utils.citeproc(page) or nil end

return {{Figure = note("fig"), Image = note("fig"), Div = note("fig"), Table = note("tbl"), Header = note("sec")}, {Cite = refer},
  {Cite = cites}, {Pandoc = resolve}}
