-- Puts a Colab and a download link on top of every notebook's page. The repository's address is read from
-- settings.ini, so that it is written down once. Used by Quarto and by tools/preview alike.
local function read_settings(root)
  for _, dir in ipairs({ root, root .. "/.." }) do
    local file = io.open(dir .. "/settings.ini")
    if file then
      local s = {}
      for line in file:lines() do
        local key, value = line:match("^([%w_]+)%s*=%s*(.-)%s*$")
        if key then s[key] = value end
      end
      file:close()
      return s
    end
  end
  error("links.lua: no settings.ini in " .. root .. " or above it")
end

function Pandoc(doc)
  local input = quarto and quarto.doc.input_file or pandoc.utils.stringify(doc.meta["notebook"] or "")
  local name = input:match("([^/\\]+)%.ipynb$")
  if not name then return nil end
  local s = read_settings(quarto and quarto.project.directory or ".")
  local repo = s.user .. "/" .. s.repo
  local file = "/" .. s.branch .. "/nbs/" .. name .. ".ipynb"
  local links = pandoc.Plain({
    pandoc.Link("Open in Colab", "https://colab.research.google.com/github/" .. repo .. "/blob" .. file),
    pandoc.Str(" · "),
    pandoc.Link("Download the notebook", "https://raw.githubusercontent.com/" .. repo .. file),
  })
  table.insert(doc.blocks, 1, pandoc.Div(links, pandoc.Attr("", { "notebook-links" })))
  return doc
end
