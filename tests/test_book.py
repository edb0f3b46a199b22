"""The book as a whole: references, links, cells, stored outputs, and what is generated from them."""
import json
import re
import statistics
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).resolve().parent.parent
NBS = ROOT / "nbs"
NOTEBOOKS = sorted(NBS.glob("*.ipynb"))
CHAPTERS = [p for p in NOTEBOOKS if p.name[0] == "0"]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "index.qmd", *sorted(NBS.glob("*.qmd")), *NOTEBOOKS]
KINDS = "eq|thm|lem|prp|cor|def|exm|exr|fig|tbl|sec|lst|cnj|rem|sol|alg"
LABEL = re.compile(rf"\{{#((?:{KINDS})-[\w-]+)|^#\|\s*label:\s*((?:{KINDS})-[\w-]+)", re.M)
REF = re.compile(rf"(?<![\w`@])@((?:{KINDS})-[\w-]+)")
CITATION = re.compile(rf"(?<![\w`@.])@(?!(?:{KINDS})-)([a-z]+\d{{4}}[a-z]?)\b")


def cells(path, kind=None):
    """Return the cells of a notebook, or one text cell for a Markdown file."""
    if path.suffix != ".ipynb":
        return [] if kind == "code" else [{"cell_type": "markdown", "source": path.read_text(encoding="utf-8")}]
    out = json.loads(path.read_text(encoding="utf-8"))["cells"]
    return [dict(c, source="".join(c["source"])) for c in out if kind in (None, c["cell_type"])]


def prose(path):
    """Return what a page says: text cells without code blocks, and the captions of its figures."""
    text = "\n".join(c["source"] for c in cells(path, "markdown"))
    captions = re.findall(r"^#\|\s*(?:fig|tbl)-cap:(.*)$", "\n".join(c["source"] for c in cells(path, "code")), re.M)
    return re.sub(r"```.*?```", "", "\n".join([text, *captions]), flags=re.S)


def labels(path):
    """Return the labels that a page defines."""
    return [a or b for c in cells(path) for a, b in LABEL.findall(c["source"])]


def lines(source):
    """Return the number of lines of code in a cell, directives apart."""
    return sum(bool(s.strip()) and not s.startswith("#|") for s in source.splitlines())


def each(pages):
    return pytest.mark.parametrize("page", pages, ids=lambda p: p.name)


# References and links ---------------------------------------------------------------------------------------------

def test_labels_are_unique():
    every = [label for p in PAGES for label in labels(p)]
    assert sorted(set(every)) == sorted(every)


@each(PAGES)
def test_every_reference_has_its_label(page):
    known = {label for p in PAGES for label in labels(p)}
    assert not set(REF.findall(prose(page))) - known


@each(NOTEBOOKS)
def test_docstrings_cite_labels_that_exist(page):
    known = {label for p in PAGES for label in labels(p)}
    assert not set(REF.findall("\n".join(c["source"] for c in cells(page, "code")))) - known


@each(PAGES)
def test_every_citation_has_its_entry(page):
    entries = re.findall(r"^@\w+\{(\w+),", (NBS / "references.bib").read_text(encoding="utf-8"), re.M)
    assert len(entries) == len(set(entries))
    assert not set(CITATION.findall(prose(page))) - set(entries)


@each(PAGES)
def test_every_relative_link_has_its_target(page):
    for target in re.findall(r"\]\(([^)\s#]+)[^)]*\)", prose(page)):
        if not re.match(r"https?:|mailto:", target):
            assert (page.parent / target).exists() or (ROOT / target).exists(), target


@each(NOTEBOOKS)
def test_no_typed_numbers(page):
    found = re.search(r"\b(?:Figure|Theorem|Equation|Eq\.|Section|Table|Chapter) \d", prose(page))
    assert not found, f"{found[0]!r}: use a reference or a link"


def test_every_chapter_is_in_the_site():
    site = yaml.safe_load((ROOT / "_quarto.yml").read_text(encoding="utf-8"))["book"]
    listed = re.findall(r"nbs/[\w.-]+", json.dumps([site["chapters"], site["appendices"]]))
    assert sorted(listed) == sorted(str(p.relative_to(ROOT).as_posix()) for p in [*NOTEBOOKS, *NBS.glob("*.qmd")])
    chapters = [f for f in listed if f.startswith("nbs/0")]
    assert chapters == sorted(chapters)


def test_the_checks_above_see_what_they_look_for(tmp_path):
    page = tmp_path / "page.qmd"
    page.write_text("::: {#thm-a}\n:::\n$$ x $$ {#eq-b}\nSee @thm-a, @eq-c, [@nobody1999], `@fig-code` and a@b.com.")
    assert labels(page) == ["thm-a", "eq-b"]
    assert REF.findall(prose(page)) == ["thm-a", "eq-c"]
    assert CITATION.findall(prose(page)) == ["nobody1999"]


# Cells ------------------------------------------------------------------------------------------------------------

@each(NOTEBOOKS)
def test_front_matter(page):
    head = yaml.safe_load(cells(page)[0]["source"].strip().strip("-"))
    assert {"title", "subtitle", "description", "output-file"} <= head.keys()
    # nbdev derives this name from the notebook's; another one would give two sites
    assert head["output-file"] == re.sub(r"^\d+[a-z]?_", "", page.stem) + ".html"
    assert not re.search(r"^# ", prose(page), re.M), "the title comes from the front matter"


@each(NOTEBOOKS)
def test_options_of_cells_are_yaml(page):
    for c in cells(page, "code"):
        lines = re.findall(r"^#\| (\S+:.*)$", c["source"], re.M)
        options = yaml.safe_load("\n".join(lines)) or {}
        assert len(options) == len(lines), c["source"][:80]


@each(NOTEBOOKS)
def test_cell_limits(page):
    code = [lines(c["source"]) for c in cells(page, "code") if c["source"].strip()]
    assert max(code) <= 30 and statistics.median(code) <= 8
    assert len(cells(page)) <= 130 and len(re.sub(r"\$[^$]*\$", " ", prose(page)).split()) <= 3500
    assert not any(re.match(r"#\|\s*exports?:|#\|\s*exporti:", c["source"]) for c in cells(page, "code"))


@each(NOTEBOOKS)
def test_figures_have_caption_and_alt_text(page):
    for c in cells(page, "code"):
        if any("image/" in k for o in c["outputs"] for k in o.get("data", {})):
            for key in ("label: fig-", "fig-cap:", "fig-alt:"):
                assert f"#| {key}" in c["source"], f"{key} is missing in\n{c['source'][:200]}"


@each(CHAPTERS)
def test_chapters_have_exercises_with_solutions(page):
    text = prose(page)
    n = len(re.findall(r"^### Exercise: ", text, re.M))
    assert n >= 3 and len(re.findall(r'collapse="true" title="Solution"', text)) == n


# Stored outputs ---------------------------------------------------------------------------------------------------

@each(NOTEBOOKS)
def test_stored_outputs_are_up_to_date(page, book):
    assert not book.stale(page), f"{page.name}: its stored outputs are stale; run `make notebooks`"


@each(NOTEBOOKS)
def test_no_stored_errors_or_warnings(page):
    for c in cells(page, "code"):
        for o in c["outputs"]:
            assert o["output_type"] != "error" and o.get("name") != "stderr", c["source"][:200]
            assert "text/html" not in o.get("data", {}), "HTML outputs make the site load scripts from elsewhere"


@each(NOTEBOOKS)
def test_notebooks_are_clean(page, book):
    from execnb.nbio import dict2nb, nb2str
    from nbdev.clean import clean_nb

    text = page.read_text(encoding="utf-8")
    nb = dict2nb(json.loads(text))
    clean_nb(nb, allowed_metadata_keys=book.settings()["allowed_metadata_keys"].split())
    assert json.loads(nb2str(nb)) == json.loads(text), f"{page.name}: run nbdev_clean"


@each(NOTEBOOKS)
def test_exported_module_is_in_sync(page, tmp_path):
    from nbdev.export import nb_export

    name = re.search(r"#\| default_exp (\S+)", "\n".join(c["source"] for c in cells(page, "code")))
    if name:
        later = NOTEBOOKS[NOTEBOOKS.index(page) + 1 :]  # a module may go on in a later notebook of its chapter
        more = [p for p in later if any(re.match(rf"#\| exporti?s? {name[1]}\n", c["source"]) for c in cells(p, "code"))]
        for part in [page, *more]:
            nb_export(part, lib_path=tmp_path)
        made = (tmp_path / f"{name[1]}.py").read_text(encoding="utf-8")
        # markers and relative imports depend on where the package is, and it is elsewhere here
        plain = lambda s: re.sub(r"^# (%%|AUTOGENERATED).*$", "", s, flags=re.M).replace("from altbp.", "from .")
        assert plain(made) == plain((ROOT / "altbp" / f"{name[1]}.py").read_text(encoding="utf-8"))


def test_fingerprint_sees_code_modules_and_data(book, tmp_path, monkeypatch):
    nb = {"cells": [{"cell_type": "code", "source": "#| label: fig-a\nimport altbp.figures\nload('results/a.json')"}],
          "metadata": {}}
    (tmp_path / "results").mkdir()
    (tmp_path / "results" / "a.json").write_text("1")
    page = tmp_path / "x.ipynb"
    page.write_text(json.dumps(nb))
    monkeypatch.setattr(book, "NBS", tmp_path)
    first = book.fingerprint(page)
    page.write_text(page.read_text().replace("fig-a", "fig-b"))
    assert book.fingerprint(page) == first, "a label changes no output"
    (tmp_path / "results" / "a.json").write_text("2")
    second = book.fingerprint(page)
    assert second != first
    monkeypatch.setattr(book, "module_text", lambda name: (f"changed {name}", frozenset()))
    assert book.fingerprint(page) != second
    page.write_text(page.read_text().replace("load(", "save("))
    assert book.fingerprint(page) not in (first, second)


def test_generated_files_are_in_sync(book):
    for path, text in book.derived().items():
        assert path.read_text(encoding="utf-8") == text, f"{path.name}: run `python tools/book.py sync`"


def test_every_declared_claim_is_checked():
    from altbp import claims

    records = [r for p in NOTEBOOKS for r in claims.read_notebook(p)]
    assert not claims.audit(claims.read_registry(NBS / "claims.yml"), records)


# What papers claim, results, reading order, glossary ---------------------------------------------------------------

SPECIFIED = ("fa", "cv", "gait", "reinmax", "sbp", "parallel")  # the blocks of claims.yml that have a paper to answer for


def test_every_claim_of_a_paper_is_checked_or_says_why_not(book):
    assert set(book.papers()) == set(SPECIFIED)
    for block, entries in book.papers().items():
        for e in entries:
            assert e["claim"].endswith(".") and e.keys() <= {"claim", "where", "ledger", "open"}, (block, e)
            assert ("ledger" in e) != ("open" in e) and (e.get("ledger") or e["open"].strip()), f"{block}: {e['claim']}"
            assert not set(e.get("ledger", [])) - book.verdicts().keys(), f"{block}: {e['claim']}"


def test_every_ledger_entry_is_mapped_and_linked_once(book):
    page = (NBS / "ledger.qmd").read_text(encoding="utf-8")
    for id in book.verdicts():
        assert page.count(f"::: {{#{book.anchor(id)} ") == 1
        if id.split(".")[0] in SPECIFIED:
            assert f"](#{book.anchor(id)})" in page, f"{id} stands neither in papers.yml nor beyond the paper"


def test_the_map_tells_a_missing_check(book, monkeypatch):
    gap = [{"claim": "One.", "where": "Theorem 1", "ledger": ["fa.descent"]}, {"claim": "Two.", "open": "no data"}]
    monkeypatch.setattr(book, "papers", lambda: {"fa": gap})
    table, beyond = book.coverage("fa")
    assert "| One. (Theorem 1) | holds: [`fa.descent`](#ledger-fa-descent) |" in table
    assert "| Two. | not checked here: no data |" in table
    assert "[`fa.no-saddles`]" in beyond and "fa.descent" not in beyond and book.coverage("bp") == []


def test_results_are_complete_and_of_the_present_code(book):
    from altbp.experiments import discover, fingerprint

    known, quick = discover(), json.loads(book.QUICK.read_text(encoding="utf-8"))
    for row in book.result_rows():
        e, file = known[row["run"]], book.stored(NBS / "results" / f"{row['run']}.json")
        assert row["case"] in e.cases and row.get("over", e.cases[0]) in e.cases, row["what"]
        assert file["fingerprint"] == fingerprint(e), f"{row['run']}: stored results are stale"
        assert book.measure(row, NBS / "results"), f"{row['what']}: no stored runs"
        if row.get("quick"):
            assert book.quick_case(row) in e.quick and book.quick_key(row) in quick["values"], row["what"]
            assert quick["fingerprints"][row["run"]] == fingerprint(e), f"{row['run']}: the quick run is stale"
    assert len(quick["values"]) == len({book.quick_key(r) for r in book.result_rows() if r.get("quick")})


@pytest.mark.parametrize("name", ["digits-mlp", "gait-digits"])
def test_quick_runs_give_the_stored_values_again(book, name, tmp_path):
    from altbp.experiments import discover, run_experiment

    quick = json.loads(book.QUICK.read_text(encoding="utf-8"))["values"]
    assert run_experiment(discover()[name], out=tmp_path, quick=True)[1] == 0
    for row in book.result_rows():
        if row["run"] == name and row.get("quick"):
            assert book.measure(row, tmp_path, quick=True)[0] == pytest.approx([quick[book.quick_key(row)]], rel=0.02)


def test_numbers_and_commands_of_the_results_table(book):
    number = lambda *a: book.number(*a).replace("\N{NO-BREAK SPACE}", " ")
    assert number([0.8731]) == "0.8731" and number([1.0, 1.0]) == "1 ± 0"
    assert number([97.2, 97.4], "%") == "97.30 ± 0.14 %" and number([1200, 1600]) == "1400 ± 283"
    assert book.pick({"a": [[1, 2], [3, 5]]}, "a/-1") == [4] and book.pick({"a": {"b": [1, 2]}}, "a/b/0") == [1]
    assert book.pick({"a": [3, 5]}, "a", each=True) == [3, 5]
    row = {"run": "digits-mlp", "case": {"width": 32}}
    assert book.command(row, [0, 1]) == ("altbp run digits-mlp --seeds 2 --case width=32", [{"width": 32}])
    assert book.command(row, [0])[0] == "altbp run digits-mlp --case width=32"
    assert book.command(row, [0, 2])[0] == "altbp run digits-mlp --seeds 0,2, --case width=32"


def test_quick_values_are_compared_at_the_digits_shown(book, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(book, "QUICK", tmp_path / "quick.json")
    kept = {"seconds": {"a": 1.0}, "values": {"x": 0.87651, "y": 2.0}}
    monkeypatch.setattr(book, "quick", lambda folder: kept)
    assert book.keep_quick(tmp_path, check=False) == 0 and book.keep_quick(tmp_path, check=True) == 0
    monkeypatch.setattr(book, "quick", lambda folder: {"seconds": {}, "values": {"x": 0.87653, "y": 2.1, "z": 1.0}})
    assert book.keep_quick(tmp_path, check=True) == 1
    out = capsys.readouterr().out
    assert "y: 2 is stored, 2.1 was found" in out and "z: only in one" in out and "x:" not in out


def test_every_chapter_says_what_to_read_first(book):
    order = list(book.numbered())
    assert set(order) <= book.READ_FIRST.keys()
    for name in order:
        assert all(order.index(first) < order.index(name) for first in book.READ_FIRST[name])


def test_the_glossary_is_in_order_and_each_term_has_its_place():
    text = (NBS / "glossary.qmd").read_text(encoding="utf-8")
    terms = re.findall(r"^\*\*(.+)\*\*\n: ((?:.+\n)+)", text, re.M)
    names = [name.lower() for name, _ in terms]
    assert names == sorted(names) and len(set(names)) == len(names) == text.count("\n**") >= 60
    for name, definition in terms:
        assert REF.search(definition), f"{name}: a definition links to the section or theorem that explains it"


# The package ------------------------------------------------------------------------------------------------------

def test_import_needs_torch_and_numpy_only():
    modules = [p.stem for p in (ROOT / "altbp").glob("*.py") if p.stem[0] != "_"]
    # not sympy: torch's compiler imports it, and torch requires it
    assert not [m for m in modules if re.search(r"^(import|from) sympy", (ROOT / f"altbp/{m}.py").read_text("utf-8"), re.M)]
    blocked = ["fastcore", "nbdev", "execnb", "matplotlib", "sklearn", "tqdm", "yaml", "PIL", "IPython", "scipy"]
    code = (f"import sys\nfor m in {blocked}: sys.modules[m] = None\nimport altbp\n"
            "assert not [m for m in sys.modules if m.startswith(('torch', 'altbp.'))], 'import altbp is not light'\n"
            f"import importlib\nfor m in {modules}: importlib.import_module('altbp.' + m)")
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT, timeout=120)


def test_public_functions_are_documented():
    import importlib
    import inspect

    for p in (ROOT / "altbp").glob("*.py"):
        if p.stem[0] == "_":
            continue
        module = importlib.import_module(f"altbp.{p.stem}")
        for name in module.__all__:
            thing = getattr(module, name)
            if inspect.isfunction(thing) or inspect.isclass(thing):
                assert inspect.getdoc(thing), f"altbp.{p.stem}.{name} has no docstring"


def test_tracked_files_name_no_machine():
    files = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split("\n")
    for f in filter(None, files):
        path = ROOT / f
        if path.is_file() and path.name != "test_book.py":
            found = re.search(rb"/(?:work|root|home|Users)/[\w.]|pypi\.org|files\.pythonhosted", path.read_bytes())
            assert not found, f"{f}: {found[0]}"


# The home page ----------------------------------------------------------------------------------------------------

SNIPPETS = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(encoding="utf-8"), re.S)


@pytest.mark.parametrize("code", SNIPPETS, ids=lambda code: re.search(r"altbp\.(\w+)", code)[1])
def test_the_readmes_first_results(code, capsys):
    assert len(code.splitlines()) <= 5
    exec(compile(code, "README.md", "exec"), {"__name__": "readme"})
    assert capsys.readouterr().out.strip()


def test_the_readme_has_a_first_result_of_each_chapter():
    used = {module for code in SNIPPETS for module in re.findall(r"altbp\.(\w+)", code)}
    assert {"backprop", "feedback_alignment", "convergence", "target_prop", "reinmax", "stochastic_backprop_practice",
            "parallel_backprop", "side_by_side"} <= used
