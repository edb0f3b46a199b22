"""The site: the book renders without a defect, and the renderer's check does find each kind of defect."""
import json
import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PREVIEW = runpy.run_path(str(ROOT / "tools" / "preview"))
CONFIG = """
project: {type: book}
book:
  title: Toy
  description: A toy
  page-footer: {left: foot}
  chapters: [index.qmd, {part: Part one, chapters: [nbs/one.ipynb, nbs/two.qmd]}]
  appendices: [nbs/z.qmd]
bibliography: nbs/toy.bib
format: {html: {theme: [cosmo, nbs/toy.scss]}}
"""
SVG = "<svg xmlns='http://www.w3.org/2000/svg' width='9' height='9'/>"


def code(source, *outputs):
    return dict(cell_type="code", source=source, outputs=list(outputs), metadata={}, execution_count=None)


def shown(**data):
    mime = {"html": "text/html", "markdown": "text/markdown", "latex": "text/latex", "svg": "image/svg+xml"}
    data = {mime[k]: v for k, v in data.items()} | {"text/plain": "plain text"}
    return dict(output_type="display_data", data=data, metadata={})


def render(root, pages=(), text="", cells=(), appendix="", index="# Home {.unnumbered}\n", files=()):
    """Write a toy book into `root` and render it; return (its defects, {page: HTML}, number of pages converted)."""
    (root / "nbs").mkdir(exist_ok=True)
    raw = dict(cell_type="raw", metadata={}, source="---\ntitle: One\nsubtitle: Why?\noutput-file: first.html\n---")
    cells = [raw, *(c if isinstance(c, dict) else dict(cell_type="markdown", metadata={}, source=c) for c in cells)]
    files = dict(files) | {
        "_quarto.yml": CONFIG.replace("two.qmd", ", nbs/".join(["two.qmd", *pages])), "index.qmd": index,
        "nbs/two.qmd": f"---\ntitle: Two\n---\n\n{text}\n", "nbs/z.qmd": f"---\ntitle: Letters\n---\n\n{appendix}\n",
        "nbs/one.ipynb": json.dumps(dict(cells=cells, metadata={}, nbformat=4, nbformat_minor=4)), "nbs/pic.svg": SVG,
        "nbs/toy.bib": "@book{known2000, author={Known, Ann}, title={What}, year={2000}}",
        "nbs/toy.scss": "/*-- scss:defaults --*/\n$a: 1;\n/*-- scss:rules --*/\n// note\n.claim { color: red; }\n"}
    for name, content in files.items():
        (root / name).write_text(content, encoding="utf-8")
    found, _, new = PREVIEW["render"](root, root / "_docs")
    names = ("index.html", "nbs/first.html", "nbs/two.html", "nbs/z.html")
    return found, {n: (root / "_docs" / n).read_text(encoding="utf-8") for n in names}, new


@pytest.fixture
def toy(tmp_path):
    """Return `render` for a fresh folder; `toy.out` is its site, `toy.new` how many pages the last call converted."""
    def toy(*args, **kwargs):
        found, pages, toy.new = render(tmp_path, (), *args, **kwargs)
        return found, pages

    toy.out = tmp_path / "_docs"
    return toy


def test_the_book_has_no_defect():
    command = [sys.executable, str(ROOT / "tools" / "preview"), "--check"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-3000:]


# Each defect is found ---------------------------------------------------------------------------------------------

DEFECTS = [
    ("Text.\n\n:::\n", "stray fence: :::"),
    ("::: {.proof}\nIt never ends.\n", "unclosed"),
    ("As @thm-none says.", "unresolved reference: ?@thm-none"),
    ("As [-@eq-none] says.", "unresolved reference: ?@eq-none"),
    ("See `@fig-x`{=html}.", "unresolved reference: @fig-x"),
    ("A formula $x$ {#eq-inline} in a line has no number.", "unresolved reference: {#eq-inline}"),
    ("::: {#thm-twice}\nA.\n:::\n\n::: {#thm-twice}\nB.\n:::\n", "label defined twice: thm-twice"),
    ("As [@unknown2000] says.", "unknown2000 not found"),
    ("As @unknown2000 says.", "unknown2000 not found"),
    (r"The sum $\frac{1}{$ is odd.", "Could not convert TeX math"),
    (r"$$ \nosuchmacro{x} $$", "Could not convert TeX math"),
    (r"A line with \emph{TeX} in it.", r"raw TeX: \emph{TeX}"),
    (r"It is $ x + 1 $ long.", "raw TeX: $ x + 1 $"),
    ("[a](nowhere.html)", "broken link: nowhere.html"),
    ("[a](nowhere.ipynb)", "broken link: nowhere.ipynb"),
    ("[a](one.ipynb#nowhere)", "broken link: first.html#nowhere"),
    ("[a](#nowhere)", "broken link: #nowhere"),
    ("![alt](nowhere.svg)", "broken link: nowhere.svg"),
    ("![](pic.svg)", "image without alt text: pic.svg"),
    ("{{< video film.mp4 >}}", "shortcode: {{<"),
    ("#| label: fig-x", "cell directive: #| label: fig-x"),
]
CELL_DEFECTS = [
    (code("x = 1\n#| echo: false"), "cell directive: #| echo: false"),
    (code("#| label: fig-a\n#| fig-cap: A\nplot()", shown(svg=SVG)), "image without alt text"),
    (code("x", shown(html="<a href='gone.html'>x</a>")), "broken link: gone.html"),
    (code("x", shown(latex=r"$\displaystyle \nosuch{x}$")), "Could not convert TeX math"),
]


@pytest.fixture(scope="module")
def broken(tmp_path_factory):
    """Return the defects of a book with one broken page for each of DEFECTS, and a notebook with CELL_DEFECTS."""
    files = {f"nbs/page{i}.qmd": f"---\ntitle: Page {i}\n---\n\n{text}\n" for i, (text, _) in enumerate(DEFECTS)}
    pages = [f"page{i}.qmd" for i in range(len(DEFECTS))]
    return render(tmp_path_factory.mktemp("broken"), pages, cells=[c for c, _ in CELL_DEFECTS], files=files)[0]


@pytest.mark.parametrize("i, message", list(enumerate(message for _, message in DEFECTS)))
def test_a_defect_is_reported(broken, i, message):
    assert [page for page, what in broken if message in what and page == f"nbs/page{i}.qmd"], broken


@pytest.mark.parametrize("message", [message for _, message in CELL_DEFECTS])
def test_a_defect_of_a_cell_is_reported(broken, message):
    assert "nbs/one.ipynb" in [page for page, what in broken if message in what]


def test_a_sound_page_among_broken_ones_has_no_defect(broken):
    assert not [what for page, what in broken if page in ("index.qmd", "nbs/two.qmd", "nbs/z.qmd")]


def test_a_label_may_not_be_used_on_two_pages(toy):
    found, _ = toy("::: {#thm-a}\nA.\n:::", appendix="::: {#thm-a}\nB.\n:::")
    assert found == [("nbs/z.qmd", "label defined twice: thm-a")]


def test_code_and_plain_prose_are_no_defects(toy):
    text = "Cells start with `#| label: fig-x`, refs with `@thm-x`, TeX with `$`, divs with `:::`; it costs $5.\n\n" \
           "```\n::: {#thm-x}\n$x$ \\frac{a}{b} ?@thm-x\n#| label: fig-x\n```\n\n" \
           "Mail me@home-page.org. [@known2000, p. 3]"
    assert toy(text)[0] == []


# Numbers and references -------------------------------------------------------------------------------------------

THEOREM = "::: {#thm-%s}\n## Title $x$\n\nText.\n\n$$\na = b\n$$ {#eq-%s}\n:::\n"


def test_numbers_restart_in_each_chapter_and_appendices_have_letters(toy):
    cells = [THEOREM % ("a", "a") + "\n::: {#lem-a}\nText.\n:::\n", "::: {#thm-b}\nText.\n:::"]
    found, pages = toy(THEOREM % ("c", "c"), cells, THEOREM % ("z", "z"))
    assert found == []
    assert re.findall(r"<strong>(\w+ [\d.]+(?: \(Title)?)", pages["nbs/first.html"].replace("\xa0", " ")) == \
        ["Theorem 1.1 (Title", "Lemma 1.1", "Theorem 1.2"]
    assert "Theorem\xa02.1 (Title" in pages["nbs/two.html"] and "Theorem\xa0A.1 (Title" in pages["nbs/z.html"]
    numbers = [re.findall(r'equation-number">(.*?)<', p) for p in pages.values()]
    assert numbers == [[], ["(1.1)"], ["(2.1)"], ["(A.1)"]]
    assert "<h2" not in pages["nbs/z.html"].split("<main>")[1].split("</main>")[0]  # a theorem's title is no section


def test_references_link_across_pages(toy):
    found, pages = toy(
        "@thm-a, [-@thm-a], [Thm. @thm-a], [@eq-a; @thm-a], @Thm-a, @sec-end, @sec-deep, "
        "[there](one.ipynb#thm-a).\n\n"
        "## Start\n\n## End {#sec-end}\n\n### Deep {#sec-deep}\n\n## {.unnumbered}\n",
        [THEOREM % ("a", "a") + "\nSee @sec-end and @thm-a."], index="# Home {.unnumbered}\n\n@thm-a\n")
    assert found == []
    links = re.findall(r'<a href="([^"]+)" class="quarto-xref">(.*?)</a>', pages["nbs/two.html"])
    first, eq = "first.html#thm-a", "first.html#eq-a"
    assert links == [(first, "Theorem&nbsp;1.1"), (first, "1.1"), (first, "Thm.&nbsp;1.1"),
                     (eq, "Equation&nbsp;1.1"), (first, "Theorem&nbsp;1.1"), (first, "Theorem&nbsp;1.1"),
                     ("#sec-end", "Section&nbsp;2.2"), ("#sec-deep", "Section&nbsp;2.2.1")]
    assert '<a href="first.html#thm-a">there</a>' in pages["nbs/two.html"]
    assert 'href="two.html#sec-end" class="quarto-xref">Section&nbsp;2.2' in pages["nbs/first.html"]
    assert 'href="nbs/first.html#thm-a"' in pages["index.html"]
    assert '2.2</span> End' in pages["nbs/two.html"] and "2.2.1</span>" not in pages["nbs/two.html"]


def test_tables_figures_and_listings_have_numbered_captions(toy):
    found, pages = toy(
        "| a | b |\n|---|---|\n| 1 | 2 |\n\n: Two *numbers* {#tbl-x}\n\n![A line](pic.svg){#fig-x}\n\n"
        "::: {#fig-y}\n![a dot](pic.svg)\n\nA dot, as in @fig-x\n:::\n\n"
        "::: {#lst-x}\n```python\nx = 1\n```\n\nA listing\n:::\n\n@tbl-x @fig-y @lst-x @tbl-cell",
        [code("#| label: tbl-cell\n#| tbl-cap: From a cell\nx", shown(markdown="| a |\n|---|\n| 1 |"))])
    assert found == []
    page = pages["nbs/two.html"].replace("\xa0", " ")
    assert "<caption>Table 2.1: Two <em>numbers</em></caption>" in page
    assert "<figcaption>Listing 2.1: A listing</figcaption>" in page
    assert 'Figure 2.1: A line' in page and 'Figure 2.2: A dot, as in <a href="#fig-x"' in page
    assert "Table 1.1: From a cell" in pages["nbs/first.html"].replace("\xa0", " ")


# Cells, callouts, pages -------------------------------------------------------------------------------------------

def test_directives_decide_what_a_cell_shows(toy):
    stream = dict(output_type="stream", name="stdout", text="printed *text* \x1b[31mred\x1b[0m\n")
    figure = '#| label: fig-a\n#| fig-cap: "A \\"fine\\" $x$, see @fig-a"\n' \
             '#| fig-alt: "say \\"it\\""\n#| code-fold: true\nplot()'
    found, pages = toy(cells=[
        code("shown_source()", stream), code("#| echo: false\nhidden_source()", shown(html="<b id='card'>bold</b>")),
        code("#| include: false\nexcluded()", shown(html="<b>excluded</b>")), code(figure, shown(svg=SVG)),
        code("#| output: asis\n#| echo: false\nasis()", dict(stream, text="An *emphatic* line, [to it](#card).")),
        code("#| code-fold: show\n#| code-summary: Exported source\ndef f(): pass"),
        code("#| output: false\nquiet()", stream), code("sympy", shown(latex=r"$\displaystyle \frac{a}{b}$"))])
    page = pages["nbs/first.html"]
    assert found == []
    assert "printed *text* red" in page and page.count("printed") == 1 and "<b id='card'>bold</b>" in page
    assert "hidden_source" not in page and "excluded" not in page and "quiet" in page and "plain text" not in page
    assert 'alt="say &quot;it&quot;"' in page and (toy.out / "nbs/one_files/figure_4_0.svg").exists()
    assert re.search(r"<figcaption>Figure\s1\.1: A “fine” <math", page)
    assert re.search(r"<details><summary>\s*Code\s*</summary>", page) and "An <em>emphatic</em> line" in page
    assert re.search(r"<details open><summary>\s*Exported source\s*</summary>", page) and "<mfrac>" in page


def test_callouts_hold_cells_and_proofs_have_titles(toy):
    found, pages = toy("::: {.callout-note}\n## A *title*\nText.\n:::\n\n::: {.callout-warning}\nText.\n:::\n\n"
                       "::: {.proof}\nEasy.\n:::\n\n::: {#rem-x}\nWell.\n:::\n",
                       ['::: {.callout-tip collapse="true" title="Solution"}\nIdea.', code("1 + 1"),
                        "Done.\n:::\n\nAfter."])
    assert found == []
    solution = re.search(r'<div class="callout callout-tip">\s*<details><summary>\s*Solution\s*</summary>'
                         r'(.*?)</details>', pages["nbs/first.html"], re.S)[1]
    assert "Idea." in solution and 'class="cell"' in solution and "Done." in solution and "After." not in solution
    page = pages["nbs/two.html"]
    assert re.search(r"callout-note.>\s*<details open><summary>\s*A <em>title</em>", page) and "Warning" in page
    assert "<em>Proof</em>." in page and "<em>Remark\xa02.1</em>." in page


def test_home_page_includes_the_readme_and_copies_what_it_links_to(toy):
    readme = "# toy\n\n<!-- t -->\n[one](nbs/one.ipynb), [text](notes.txt), ![a dot](nbs/pic.svg)\n<!-- /t -->"
    found, pages = toy(index="# Home {.unnumbered}\n\n{{< include README.md >}}\n",
                       files={"README.md": readme, "notes.txt": "x"})
    assert found == []
    assert '<a href="nbs/first.html">one</a>' in pages["index.html"] and (toy.out / "notes.txt").exists()
    assert (toy.out / "nbs/pic.svg").exists() and pages["index.html"].count("Home</h1>") == 1


def test_sidebar_neighbours_and_style(toy):
    _, pages = toy("As [@known2000] says.")
    page = pages["nbs/two.html"]
    places = [page.index(s) for s in ("Part one", "<span>1</span>", "<span>2</span>", "Appendices", "<span>A</span>")]
    assert places == sorted(places)
    assert re.findall(r'href="(\S+)" aria-current="page"', page) == ["two.html"]
    assert 'rel="prev" href="first.html"' in page and 'rel="next" href="z.html"' in page
    assert 'rel="prev"' not in pages["index.html"] and 'rel="next"' not in pages["nbs/z.html"]
    assert "<title>Two – Toy</title>" in page and 'href="../preview.css"' in page and 'id="ref-known2000"' in page
    style = (toy.out / "preview.css").read_text(encoding="utf-8")
    assert style.startswith("\n\n.claim { color: red; }\n") and "$a" not in style
    assert not re.search(r'(?:src|href)="(?:https?:)?//', page)  # it reads offline


def test_only_what_has_changed_is_converted_anew(toy):
    toy("@thm-a", [THEOREM % ("a", "a")])
    assert toy.new == 4
    assert toy("@thm-a", [THEOREM % ("a", "a")])[0] == [] and toy.new == 0
    _, pages = toy("@thm-a", ["::: {#thm-new}\nNew.\n:::", THEOREM % ("a", "a")])
    assert toy.new == 1 and 'href="first.html#thm-a" class="quarto-xref">Theorem&nbsp;1.2' in pages["nbs/two.html"]
    assert toy("@thm-a", ["No theorem."])[0] == [("nbs/two.qmd", "unresolved reference: ?@thm-a")]
