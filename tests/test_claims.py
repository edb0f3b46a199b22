"""altbp.claims: comparisons, verdicts, and the agreement of registry and records."""
import json
import math
import subprocess
import sys

import pytest
import sympy as sp
import torch
from hypothesis import given
from hypothesis import strategies as st

from altbp import claims
from altbp.claims import Claim, anchor, audit, card, check, compare, evaluate, read_notebook, read_registry, totals

numbers = st.floats(allow_nan=False)


@given(numbers, numbers)
def test_operators_agree_with_python(a, b):
    assert compare(a, "<=", b) == (a <= b) and compare(a, "<", b) == (a < b)
    assert compare(a, ">=", b) == (a >= b) and compare(a, ">", b) == (a > b)
    assert compare(a, "==", b) == (a == b)


@given(numbers, numbers, st.sampled_from(claims.OPERATORS), st.sampled_from(["holds", "fails"]),
       st.sampled_from(["numeric", "experiment", "control"]))
def test_a_check_passes_exactly_when_its_comparison_is_as_declared(a, b, op, verdict, kind):
    if op == "~" and math.isinf(a) and a == b:
        return  # inf − inf
    want = (verdict == "holds") != (kind == "control")
    if compare(a, op, b) == want:
        assert evaluate("a.b", a, b, op, kind, verdict).verdict == verdict
    else:
        with pytest.raises(AssertionError, match="a.b"):
            evaluate("a.b", a, b, op, kind, verdict)


@pytest.mark.parametrize("kind", claims.KINDS[1:])
def test_nan_is_never_an_answer(kind):
    for m, b in [(math.nan, 1.0), (1.0, math.nan)]:
        with pytest.raises(ValueError, match="NaN"):
            evaluate("a.b", m, b, kind=kind)


def test_symbolic_residuals_must_be_zero():
    x = sp.Symbol("x")
    for zero in (sp.Integer(0), sp.zeros(2, 2), [0, x - x], sp.Matrix([x - x])):
        assert evaluate("a.b", zero, kind="symbolic").measured == "0"
    with pytest.raises(ValueError, match="empty"):
        evaluate("a.b", [], kind="symbolic")
    for other in (x, sp.Matrix([0, x]), [0, (x + 1) ** 2 - x**2 - 2 * x - 1]):
        with pytest.raises(AssertionError):
            evaluate("a.b", other, kind="symbolic")


def test_measured_values_may_be_tensors_and_sympy_numbers():
    assert evaluate("a.b", torch.tensor(0.5), torch.tensor([1.0])).measured == "0.5"
    assert evaluate("a.b", sp.Rational(1, 2), sp.sqrt(2)).bound == "1.41"
    for bad in (torch.ones(2), "x", None, sp.Symbol("x")):
        with pytest.raises(TypeError, match="measured"):
            evaluate("a.b", bad, 1.0)


@pytest.mark.parametrize("kwargs, word", [(dict(kind="proof"), "kind"), (dict(verdict="maybe"), "verdict"),
                                          (dict(op="="), "op"), (dict(id="ab"), "id"), (dict(id="A.b"), "id")])
def test_bad_input_names_the_argument(kwargs, word):
    with pytest.raises(ValueError, match=word):
        evaluate(**{"id": "a.b", "measured": 1, "bound": 1, **kwargs})


def test_not_reproducible_needs_a_reason_and_no_number():
    assert evaluate("a.b", verdict="not reproducible", note="no GPU").note == "no GPU"
    for kwargs in (dict(), dict(measured=1.0, note="no GPU")):
        with pytest.raises(ValueError, match="reason"):
            evaluate("a.b", verdict="not reproducible", **kwargs)


def test_card_escapes_and_anchor_differs():
    a = Claim("a.b", "numeric", "1", "<=", "2", "holds", "<b>")
    assert "&lt;b&gt;" in card(a) and "<b>" not in card(a) and "&lt;=" in card(a)
    b = Claim("a.b", "control", "1", "<=", "2", "holds", "<b>")
    assert anchor(vars(a)) != anchor(vars(b)) and anchor(vars(a)) in card(a)


def test_check_prints_one_line_outside_notebooks():
    run = subprocess.run([sys.executable, "-c", "from altbp.claims import check; check('a.b', 1, 2, note='n = 3')"],
                         capture_output=True, text=True, check=True)
    assert run.stdout == "[holds] a.b numeric 1 <= 2 n = 3\n"


def record(**kwargs):
    return dict(id="p.a", kind="numeric", measured="1", op="<=", bound="2", verdict="holds", note="") | kwargs


REGISTRY = {"p.a": dict(paper="P", statement="…", by=["numeric"])}  # a control is always needed


def test_texts_tell_different_numbers_apart():
    c = evaluate("a.b", 0.1 + 0.2, 0.3, "==", kind="control")
    assert c.measured != c.bound and float(c.measured) != float(c.bound)


@pytest.mark.parametrize("records, word", [
    ([], "no notebook checks it"),
    ([record()], "lacks its control"),
    ([record(), record(kind="control"), record(id="p.b")], "p.b is checked but not declared"),
    ([record(), record(kind="control"), record(verdict="fails")], "one is needed"),
    ([record(kind="control")], "one is needed"),
])
def test_audit_reports(records, word):
    assert any(word in sentence for sentence in audit(REGISTRY, records))


def test_audit_accepts_and_totals_count():
    good = [record(), record(kind="control")]
    assert audit(REGISTRY, good) == [] and totals(REGISTRY, good) == {"P": {"holds": 1}}
    unmeasured = [record(kind="", verdict="not reproducible")]
    assert audit(REGISTRY, unmeasured) == [] and totals(REGISTRY, unmeasured) == {"P": {"not reproducible": 1}}


def test_a_claim_with_controls_only_has_no_verdict():
    with pytest.raises(ValueError, match="no check"):
        claims.verdict_of([record(kind="control")])


def test_reading_registry_and_notebook(tmp_path):
    (tmp_path / "c.yml").write_text("p:\n  title: P\n  claims:\n    a: {statement: s, by: [numeric]}\n")
    assert read_registry(tmp_path / "c.yml") == {"p.a": dict(paper="P", statement="s", by=["numeric"])}
    out = {"output_type": "display_data", "data": {claims.MIME: record()}, "metadata": {}}
    cells = [{"cell_type": "markdown", "source": ""}, {"cell_type": "code", "source": "", "outputs": [out]}]
    (tmp_path / "n.ipynb").write_text(json.dumps({"cells": cells}))
    assert read_notebook(tmp_path / "n.ipynb") == [record(notebook="n.ipynb", cell=1)]
