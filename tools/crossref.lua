-- Numbers what carries a label, as Quarto does in a book. `data-label="label=number"` tells tools/preview, which then
-- fills in the references of all pages (links to xref:label). Callouts and folded code become <details>.
local names = { thm = "Theorem", lem = "Lemma", cor = "Corollary", prp = "Proposition", cnj = "Conjecture",
  def = "Definition", exm = "Example", exr = "Exercise", alg = "Algorithm", sol = "Solution", rem = "Remark",
  fig = "Figure", tbl = "Table", lst = "Listing", eq = "Equation", sec = "Section" }
local floats = { fig = true, tbl = true, lst = true }
local proofs = { proof = "Proof", solution = "Solution", remark = "Remark" }
local chapter, counts, sections = "", {}, { 0, 0, 0, 0, 0, 0 }
local P, nbsp, filter = pandoc, pandoc.Str("\u{a0}"), { traverse = "topdown" }

local function kind(label) -- "thm" of "thm-chain-rule"
  local k = (label:match("^(%a+)%-.") or ""):lower()
  return names[k] and k
end

local function numbered(el, k, number) -- "Theorem 2.1", and "2.1"
  counts[k] = (counts[k] or 0) + 1
  number = number or (chapter == "" and "" or chapter .. ".") .. counts[k]
  el.attributes["data-label"] = el.identifier .. "=" .. number
  return P.Inlines({ P.Str(names[k]), nbsp, P.Str(number) }), number
end

local function prepend(blocks, inlines)
  if #blocks == 0 or not blocks[1].t:match("^P[la][ar]") then blocks:insert(1, P.Plain({})) end
  blocks[1].content = inlines .. blocks[1].content
end

local function take_title(div) -- a leading heading is the title of a theorem or a callout
  return #div.content > 0 and div.content[1].t == "Header" and div.content:remove(1).content
end

local function details(div, class, open, summary)
  local start = P.RawBlock("html", "<details" .. (open and " open" or "") .. "><summary>")
  div.content = P.Blocks({ start, P.Plain(summary), P.RawBlock("html", "</summary>") }) .. div.content
  div.content:insert(P.RawBlock("html", "</details>"))
  div.attr = P.Attr(div.identifier, { class })
  return div
end

local function theorem(div, k, proof)
  local title, text = take_title(div), k and numbered(div, k) or P.Inlines(proof)
  if title then text = text .. { P.Str(" (") } .. title .. { P.Str(")") } end
  local class = proof and "proof" or "theorem"
  text = P.Span(proof and { P.Emph(text), P.Str(".") } or P.Strong(text), { class = class .. "-title" })
  prepend(div.content, P.Inlines({ text, P.Space() }))
  div.classes = { class, (proof or names[k]):lower() }
  return div:walk({ Header = function(h) h.classes:insert("unnumbered") return h end })
end

local function caption(el)
  local k = kind(el.identifier)
  if floats[k] then prepend(el.caption.long, numbered(el, k) .. { P.Str(": ") }) end
  return el
end

function filter.Div(div)
  local k = kind(div.identifier)
  for _, class in ipairs(div.classes) do
    local callout = class:match("^callout%-(.*)")
    if callout then
      local title = div.attributes.title and P.read(div.attributes.title).blocks[1].content
      title = title or take_title(div) or callout:gsub("^.", string.upper)
      return details(div, "callout " .. class, div.attributes.collapse ~= "true", title)
    elseif class == "code-fold" then
      return details(div, class, div.classes:includes("show"), div.attributes.summary)
    elseif proofs[class] and not k then
      return theorem(div, nil, proofs[class])
    end
  end
  if floats[k] or div.classes:includes("float") then -- the last paragraph is the caption
    local last = div.content[#div.content]
    local long = last and last.t == "Para" and { P.Plain(div.content:remove().content) } or {}
    return caption(P.Figure(div.content, { long = long }, P.Attr(div.identifier)))
  elseif k and k ~= "eq" and k ~= "sec" then
    return theorem(div, k, (k == "rem" or k == "sol") and names[k])
  end
end

filter.Figure, filter.Table = caption, caption

function filter.Header(h)
  if chapter == "" or h.level < 2 or h.classes:includes("unnumbered") then return nil end
  for i = h.level, 6 do sections[i] = i == h.level and sections[i] + 1 or 0 end
  local number = chapter .. "." .. table.concat(sections, ".", 2, h.level)
  if kind(h.identifier) == "sec" then numbered(h, "sec", number) end
  local span = P.Inlines({ P.Span(number, { class = "header-section-number" }), P.Space() })
  if h.level == 2 then h.content = span .. h.content end
  return h
end

function filter.Inlines(list) -- $$ … $$ {#eq-label}
  local out = P.Inlines({})
  for _, el in ipairs(list) do
    local id, rest = (el.t == "Str" and el.text or ""):match("^{#(eq%-[%w_-]+)}(.*)$")
    if id and out[#out] and out[#out].t:match("^So?[fp]") then out:remove() end
    if id and out[#out] and out[#out].mathtype == "DisplayMath" then
      el = P.Span(out:remove(), P.Attr(id, { "equation" }))
      local _, number = numbered(el, "eq")
      el.content:insert(P.Span("(" .. number .. ")", { class = "equation-number" }))
    end
    out:extend(el.t == "Span" and rest and { el, P.Str(rest) } or { el })
  end
  return out
end

function filter.Cite(cite)
  local out = P.Inlines({})
  for i, c in ipairs(cite.citations) do
    local k = kind(c.id)
    if not k then return nil end
    local prefix = #c.prefix > 0 and c.prefix or c.mode ~= "SuppressAuthor" and names[k] or ""
    if i > 1 then out:insert(P.Str(", ")) end
    out:insert(P.Link(prefix, "xref:" .. c.id:gsub("^.", string.lower), "", { class = "quarto-xref" }))
  end
  return out
end

function filter.Image(image)
  image.caption = image.attributes["fig-alt"] or image.caption
  image.attributes["fig-alt"] = nil
  image.classes:insert("figure-img")
  return image
end

-- TeX that no writer of HTML knows would vanish without a word: leave it in the text, where the check finds it.
function filter.RawInline(el)
  return el.format:match("tex") and not el.text:match("^\\begin") and P.Str(el.text) or nil
end
function filter.RawBlock(el) return filter.RawInline(el) and P.Plain(filter.RawInline(el)) end

function Pandoc(doc)
  chapter = P.utils.stringify(doc.meta.number or "")
  return doc:walk(filter)
end
