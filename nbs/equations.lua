-- The equations' numbers are the paper's, not a count of the page: `$$ ... $$ {#eq-11}` is shown with (11)
-- beside it and has the anchor eq-11; `@eq-11` on the same page becomes a link, "equation (11)", and
-- `[-@eq-11]` only "(11)". From another page: `[equation (11)](04_drifting.ipynb#eq-11)`.
-- Quarto runs this filter before its own, which would number the equations of every page from 1.

local known = {}

local function label(inline)
  return inline and inline.t == "Str" and inline.text:match("^{#(eq%-[%w%-]+)}([%.,;]?)$")
end

local function numbered(math, id)
  local name = id:gsub("^eq%-", "")
  known[id] = name
  local method = PANDOC_WRITER_OPTIONS and PANDOC_WRITER_OPTIONS.html_math_method
  if type(method) == "table" then method = method.method end
  if method == "mathml" then -- texmath has no \tag
    local number = pandoc.Span({pandoc.Str("(" .. name .. ")")}, {class = "eq-number"})
    return pandoc.Span({math, number}, {id = id, class = "equation"})
  end
  if not math.text:find("\\tag") then math.text = math.text .. " \\tag{" .. name .. "}" end
  return pandoc.Span({math}, {id = id, class = "equation"})
end

local function equations(inlines)
  local out, i = pandoc.List(), 1
  while i <= #inlines do
    local here, after = inlines[i], i + 1
    if here.t == "Math" and here.mathtype == "DisplayMath" then
      while inlines[after] and (inlines[after].t == "Space" or inlines[after].t == "SoftBreak") do
        after = after + 1
      end
      local id = label(inlines[after])
      if id then here, i = numbered(here, id), after end
    end
    out:insert(here)
    i = i + 1
  end
  return out
end

local function references(cite)
  local out = pandoc.List()
  for k, one in ipairs(cite.citations) do
    local id = one.id:gsub("^Eq%-", "eq-")
    if not known[id] then return nil end
    local word = one.id:match("^Eq%-") and "Equation " or "equation "
    if one.mode == "SuppressAuthor" then word = "" end
    if k > 1 then out:insert(pandoc.Str(", ")) end
    out:insert(pandoc.Link({pandoc.Str(word .. "(" .. known[id] .. ")")}, "#" .. id))
  end
  return out
end

return {{Inlines = equations}, {Cite = references}}
