"""altbp.experiments: registering, running, resuming, tables, and the command line."""
import json
import math
import re
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from altbp import experiments as E


@pytest.fixture(autouse=True)
def registry(monkeypatch):
    """A registry of the test's own, and no import of the chapters."""
    own = {}
    monkeypatch.setattr(E, "REGISTRY", own)
    monkeypatch.setattr(E, "discover", lambda: dict(sorted(own.items())))
    return own


@pytest.fixture
def toy():
    """An experiment that counts its calls and fails on demand."""
    calls, trouble = [], {}

    @E.experiment("toy", "A toy", cases=[dict(scale=1.0), dict(scale=2.0)], quick=[dict(scale=1.0)])
    def toy(seed, device, quick=False, scale=1.0):
        calls.append((scale, seed, quick))
        if (scale, seed) in trouble: raise trouble[scale, seed]
        return {"value": scale * seed, "curve": torch.arange(3), "quick": quick}

    toy.calls, toy.trouble = calls, trouble
    return toy


def run(tmp_path, *args):
    return E.main(["run", *map(str, args), "--out", str(tmp_path)])


def runs(tmp_path, name="toy"):
    return [(r["case"]["scale"], r["seed"]) for r in E.load_results(tmp_path / f"{name}.json")["runs"]]


# Registering ------------------------------------------------------------------------------------------------------

def good(seed, device, quick=False, a=1): return {"a": a}
def another(seed, device, quick=False): return {}


@pytest.mark.parametrize("name", ["", "Two", "two_words", "-a", "a-", "../x", "a b"])
def test_names_are_file_names(name):
    with pytest.raises(ValueError, match="name"):
        E.experiment(name, "…")


@pytest.mark.parametrize("options, error, message", [
    (dict(cases=[]), ValueError, "no cases"), (dict(quick=[]), ValueError, "no cases"),
    (dict(cases=[dict(b=1)]), TypeError, "does not fit"), (dict(quick=[dict(seed=1)]), TypeError, "does not fit"),
    (dict(cases=[dict(a=(1, 2))]), TypeError, "survive JSON"), (dict(cases=[dict(a=torch.ones(1))]), TypeError, "JSON"),
])
def test_bad_registrations(options, error, message, registry):
    with pytest.raises(error, match=message):
        E.experiment("x", "…", **options)(good)
    assert "x" not in registry


def test_same_name_twice(registry):
    assert E.experiment("x", "…")(good) is good
    E.experiment("x", "again")(good)  # a notebook's cell run a second time
    assert registry["x"].summary == "again" and registry["x"].module == __name__
    with pytest.raises(ValueError, match=f"{__name__} has an experiment of this name"):
        E.experiment("x", "…")(another)


def test_fingerprint_is_that_of_the_text(tmp_path, monkeypatch):
    import importlib.util

    def fingerprint_of(text):
        path = tmp_path / f"m{time.perf_counter_ns()}.py"
        path.write_text("from altbp.experiments import *\ndef helper(x):\n    return x + 1\n" + text)
        spec = importlib.util.spec_from_file_location(path.stem, path)
        spec.loader.exec_module(importlib.util.module_from_spec(spec))
        return E.fingerprint(E.REGISTRY.pop("x"))

    plain = "@experiment('x', '…')\ndef f(seed, device, quick=False):\n    return {'a': seed}\n"
    same = [plain.replace("'…'", "'…', cases=[{}, {}],\n    quick=[{}]"), plain.replace("    return", "\n    # note\n    return")]
    other = [plain.replace("seed}", "seed + 1}"), plain.replace("'…'", "'…', uses=[helper]"),
             plain.replace("    return", "    if seed:\n        return")]
    base = fingerprint_of(plain)
    assert [fingerprint_of(t) for t in same] == [base, base]
    assert len({base, *map(fingerprint_of, other)}) == 4


# Running and resuming ---------------------------------------------------------------------------------------------

def test_a_run_stores_everything(tmp_path, toy):
    assert run(tmp_path, "toy", "--seeds", 3) == 0
    stored = json.loads((tmp_path / "toy.json").read_text())
    assert stored["format"] == 1 and stored["name"] == "toy" and stored["summary"] == "A toy"
    assert runs(tmp_path) == [(1.0, 0), (1.0, 1), (1.0, 2), (2.0, 0), (2.0, 1), (2.0, 2)]
    r = stored["runs"][4]
    assert r["result"] == {"value": 2.0, "curve": [0, 1, 2], "quick": False} and r["quick"] is False
    assert r["command"] == "altbp run toy --seeds 3 --device cpu"
    assert r["versions"].keys() == {"python", "torch", "numpy", "altbp"} and r["versions"]["torch"] == torch.__version__
    assert r["hardware"].keys() == {"cpu", "cores", "threads", "gpu"} and r["hardware"]["gpu"] is None
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\+00:00", r["date"]) and r["seconds"] >= 0
    assert str(tmp_path) not in (tmp_path / "toy.json").read_text()
    assert [p.name for p in tmp_path.iterdir()] == ["toy.json"]


def test_only_missing_runs_are_made(tmp_path, toy):
    run(tmp_path, "toy", "--seeds", 2)
    toy.calls.clear()
    assert run(tmp_path, "toy", "--seeds", "1,5") == 0
    assert toy.calls == [(1.0, 5, False), (2.0, 5, False)]
    toy.calls.clear()
    assert run(tmp_path, "toy", "--seeds", 2) == 0 and toy.calls == []
    assert run(tmp_path, "toy", "--seeds", 2, "--quick") == 0
    assert toy.calls == [(1.0, 0, True), (1.0, 1, True)] and len(runs(tmp_path)) == 8


def test_a_failure_is_reported_and_the_others_are_stored(tmp_path, toy, capsys):
    toy.trouble[1.0, 1] = RuntimeError("a cable was pulled")
    assert run(tmp_path, "toy", "--seeds", 2) == 1
    out, err = capsys.readouterr()
    assert runs(tmp_path) == [(1.0, 0), (2.0, 0), (2.0, 1)]
    assert "case {'scale': 1.0}, seed 1 failed" in err and "a cable was pulled" in err
    assert "3 new, 1 failed, 3 stored" in out
    toy.trouble.clear()
    toy.calls.clear()
    assert run(tmp_path, "toy", "--seeds", 2) == 0 and toy.calls == [(1.0, 1, False)]


def test_interruption_loses_one_run_and_says_how_to_go_on(tmp_path, toy, capsys):
    toy.trouble[2.0, 0] = KeyboardInterrupt()
    assert run(tmp_path, "toy", "--seeds", 2) == 130
    err = capsys.readouterr().err
    assert runs(tmp_path) == [(1.0, 0), (1.0, 1)]
    assert "2 runs are stored" in err and f"altbp run toy --seeds 2 --device cpu --out {tmp_path}" in err
    toy.trouble.clear()
    toy.calls.clear()
    assert run(tmp_path, "toy", "--seeds", 2) == 0 and toy.calls == [(2.0, 0, False), (2.0, 1, False)]


def test_interruption_before_the_first_run_is_stored(tmp_path, toy, capsys):
    toy.trouble[1.0, 0] = KeyboardInterrupt()
    assert run(tmp_path, "toy") == 130
    assert "0 runs are stored" in capsys.readouterr().err and not list(tmp_path.iterdir())


@pytest.mark.parametrize("content", ["", "{", "[]", '{"runs": []}', "not JSON"])
def test_a_damaged_file_is_reported_and_kept(tmp_path, toy, capsys, content):
    (tmp_path / "toy.json").write_text(content)
    for command in ("run", "show"):
        assert E.main([command, "toy", "--out", str(tmp_path)]) == 2
        assert "toy.json" in capsys.readouterr().err
    assert E.main(["list", "--out", str(tmp_path)]) == 0 and "damaged" in capsys.readouterr().out
    assert (tmp_path / "toy.json").read_text() == content and toy.calls == []
    assert run(tmp_path, "toy", "--fresh") == 2 and (tmp_path / "toy.json").read_text() == content


def test_another_format_is_refused(tmp_path, toy, capsys):
    run(tmp_path, "toy")
    path = tmp_path / "toy.json"
    path.write_text(path.read_text().replace('"format": 1', '"format": 2'))
    assert run(tmp_path, "toy", "--seeds", 2) == 2 and "format 2" in capsys.readouterr().err


def test_changed_code_is_refused_until_fresh(tmp_path, toy, capsys):
    run(tmp_path, "toy", "--seeds", 2)
    path, bak = tmp_path / "toy.json", tmp_path / "toy.json.bak"
    old = path.read_text().replace(E.fingerprint(E.REGISTRY["toy"]), "0123456789abcdef")
    path.write_text(old)
    toy.calls.clear()
    assert run(tmp_path, "toy", "--seeds", 3) == 2 and toy.calls == []
    assert "4 runs were made by other code" in (err := capsys.readouterr().err) and "--fresh" in err
    toy.trouble[1.0, 0] = KeyboardInterrupt()
    assert run(tmp_path, "toy", "--fresh") == 130  # nothing new yet: the old file is where it was
    assert path.read_text() == old and not bak.exists()
    toy.trouble.clear()
    assert run(tmp_path, "toy", "--fresh") == 0
    assert runs(tmp_path) == [(1.0, 0), (2.0, 0)] and bak.read_text() == old
    assert sorted(p.name for p in tmp_path.iterdir()) == ["toy.json", "toy.json.bak"]
    assert run(tmp_path, "toy", "--fresh") == 0  # the first backup is not lost to the second
    assert bak.read_text() == old and (tmp_path / "toy.json.bak1").exists()


def test_a_file_of_another_experiment_is_refused(tmp_path, toy, capsys):
    run(tmp_path, "toy")
    path = tmp_path / "toy.json"
    path.write_text(path.read_text().replace('"name": "toy"', '"name": "joy"'))
    assert run(tmp_path, "toy", "--seeds", 2) == 2 and "'joy'" in capsys.readouterr().err


def test_checkpoint_folder_survives_an_interruption_and_then_goes(tmp_path, capsys):
    seen = []

    @E.experiment("long", "…", cases=[dict(scale=1), dict(scale=2)])
    def long(seed, device, quick=False, scale=1, checkpoint=None):
        seen.append((checkpoint / "state.txt").exists())
        (checkpoint / "state.txt").write_text("half")
        if len(seen) == 2: raise KeyboardInterrupt
        return {"scale": scale}

    assert run(tmp_path, "long") == 130
    kept, = (tmp_path / ".checkpoints" / "long").iterdir()
    assert (kept / "state.txt").read_text() == "half"
    assert run(tmp_path, "long") == 0 and seen == [False, False, True]
    assert [p.name for p in tmp_path.iterdir()] == ["long.json"]


def test_fresh_forgets_checkpoints(tmp_path):
    seen, stop = [], [True]

    @E.experiment("long", "…")
    def long(seed, device, quick=False, checkpoint=None):
        seen.append(any(checkpoint.iterdir()))
        (checkpoint / "state.txt").write_text("half")
        if stop: raise RuntimeError
        return {"a": 1}

    assert run(tmp_path, "long") == 1 and run(tmp_path, "long") == 1
    stop.clear()
    assert run(tmp_path, "long", "--fresh") == 0 and seen == [False, True, False]


@pytest.mark.parametrize("result, message", [
    ([1], "the result is a list"), ({"a": "x"}, r"result\['a'\]: expected numbers, got str"),
    ({"a": [1, {"b": object()}]}, r"result\['a'\]\[…\]\['b'\]"), (None, "NoneType"),
])
def test_results_are_numbers(tmp_path, capsys, result, message):
    @E.experiment("bad", "…")
    def bad(seed, device, quick=False): return result
    assert run(tmp_path, "bad") == 1 and re.search(message, capsys.readouterr().err)
    assert not (tmp_path / "bad.json").exists()


def test_what_is_not_finite_is_null(tmp_path):
    @E.experiment("nan", "…")
    def nan(seed, device, quick=False): return {"a": math.nan, "b": [np.float64(1), torch.tensor(math.inf)], "c": np.int64(3)}
    assert run(tmp_path, "nan") == 0
    r, = E.load_results(tmp_path / "nan.json")["runs"]
    assert r["result"] == {"a": None, "b": [1.0, None], "c": 3} and "NaN" not in (tmp_path / "nan.json").read_text()


# Tables -----------------------------------------------------------------------------------------------------------

def made(values, **case):
    return [dict(case=case, seed=i, quick=False, result=v) for i, v in enumerate(values)]


@settings(max_examples=50, deadline=None)
@given(st.lists(st.floats(-1e6, 1e6), min_size=2, max_size=8))
def test_mean_and_deviation_against_numpy(values):
    row, = E.summary_table({"runs": made([{"a": v} for v in values])}).rows
    mean, std, finite, n = row["a"]
    assert mean == pytest.approx(np.mean(values), rel=1e-9, abs=1e-6)
    assert std == pytest.approx(np.std(values, ddof=1), rel=1e-6, abs=1e-6) and finite == n == len(values)


def test_table_text_is_aligned():
    table = E.summary_table({"runs": made([{"a": 0.5}, {"a": 0.7}], rule="bp") + made([{"a": 10.0}, {"a": 10.4}], rule="long-name")})
    lines = str(table).splitlines()
    assert lines[0].split() == ["rule", "n", "a"] and lines[2].split() == ["bp", "2", "0.60", "±", "0.14"]
    assert lines[3].split() == ["long-name", "2", "10.20", "±", "0.28"]
    assert len({line.index("2 ") for line in lines[2:]}) == 1 and not any(l != l.rstrip() for l in lines)
    assert table.markdown().splitlines()[:2] == ["| rule | n | a |", "| --- | --- | --- |"]
    assert table._repr_markdown_() == table.markdown() and repr(table) == str(table)


def test_table_of_one_seed_missing_numbers_and_cases_with_other_arguments():
    rows = made([{"a": 1.25}], x=1) + made([{"a": None}, {"a": 3.0}], x=2, y=True) + made([{"b": None}], x=3)
    table = E.summary_table({"runs": rows})
    assert table.columns == ["x", "y", "n", "a", "b"]
    body = [line.split("|")[1:-1] for line in table.markdown().splitlines()[2:]]
    assert [[c.strip() for c in row] for row in body] == [
        ["1", "", "1", "1.25", "–"], ["2", "True", "2", "3 (1 of 2)", "–"], ["3", "", "1", "–", "–"]]
    assert E.summary_table({"runs": rows}, ["b"]).columns == ["x", "y", "n", "b"]
    with pytest.raises(ValueError, match="metrics: 'c' is not one of a, b"):
        E.summary_table({"runs": rows}, ["c"])


def test_quick_runs_have_a_table_of_their_own(tmp_path, toy):
    run(tmp_path, "toy", "--seeds", 2), run(tmp_path, "toy", "--seeds", 5, "--quick")
    results = E.load_results(tmp_path / "toy.json")
    assert [r["n"] for r in E.summary_table(results).rows] == [2, 2]
    assert [r["n"] for r in E.summary_table(results, quick=True).rows] == [5]


# The command line -------------------------------------------------------------------------------------------------

def test_show(tmp_path, toy, capsys):
    run(tmp_path, "toy", "--seeds", 3)
    capsys.readouterr()
    assert E.main(["show", "toy", "--out", str(tmp_path)]) == 0
    out = capsys.readouterr().out
    assert "toy: A toy" in out and re.search(r"2\.0 +3 +2\.0 ± 2\.0", out) and "curve" not in out
    assert E.main(["show", "toy", "--markdown", "--metrics", "value", "--out", str(tmp_path)]) == 0
    assert "| scale | n | value |" in capsys.readouterr().out
    assert E.main(["show", "toy", "--metrics", "nothing", "--out", str(tmp_path)]) == 2
    assert E.main(["show", "toy", "--quick", "--out", str(tmp_path)]) == 0 and "no such runs" in capsys.readouterr().out
    assert E.main(["show", "all", "--out", str(tmp_path / "empty")]) == 0
    assert E.main(["show", "toy", "--out", str(tmp_path / "empty")]) == 2
    assert "altbp run toy" in capsys.readouterr().err


def test_list(tmp_path, toy, capsys):
    run(tmp_path, "toy", "--seeds", 2), run(tmp_path, "toy", "--quick")
    capsys.readouterr()
    assert E.main(["list", "--out", str(tmp_path)]) == 0
    line = capsys.readouterr().out.splitlines()[2]
    assert re.fullmatch(rf"toy +{__name__} +2 +4 +A toy", line)


def test_usage_errors(tmp_path, toy, capsys):
    for args, message in [
        ([], "usage"), (["walk"], "invalid choice"), (["run"], "usage"), (["run", "toi"], "did you mean toy?"),
        (["run", "qqqq"], "altbp list"), (["show", "toi"], "did you mean toy?"),
        (["run", "toy", "--seeds", "0"], "--seeds"), (["run", "toy", "--seeds", "a"], "--seeds"),
        (["run", "toy", "--seeds", "1,-2"], "--seeds"), (["run", "toy", "--case", "scale"], "key=value"),
        (["run", "toy", "--case", "scale=9"], "no case agrees with scale=9; there are {'scale': 1.0}"),
        (["run", "toy", "--case", "depth=1"], "no case agrees"), (["run", "toy", "--device", "tpu"], "--device: 'tpu'"),
        (["run", "toy", "--threads", "0"], "--threads"),
    ]:
        assert E.main([*args, *(["--out", str(tmp_path)] if len(args) > 1 else [])]) == 2, args
        assert message in capsys.readouterr().err, args
    assert toy.calls == [] and not list(tmp_path.iterdir())


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_missing_gpu_is_a_usage_error(tmp_path, toy, capsys):
    assert run(tmp_path, "toy", "--device", "cuda") == 2 and "no GPU" in capsys.readouterr().err


def test_help_is_not_an_error(capsys):
    assert E.main(["--help"]) == 0 and "list | run | show" in capsys.readouterr().out


def test_case_selects(tmp_path, toy):
    assert run(tmp_path, "toy", "--case", "scale=2.0") == 0 and toy.calls == [(2.0, 0, False)]
    r, = E.load_results(tmp_path / "toy.json")["runs"]
    assert r["command"] == "altbp run toy --seeds 1 --device cpu --case scale=2.0"
    toy.calls.clear()
    assert run(tmp_path, "toy", "--case", "scale=2.0", "--case", "scale=1.0", "--seeds", "7,") == 0
    assert toy.calls == [(1.0, 7, False), (2.0, 7, False)]


def test_stored_commands_can_be_given_again(tmp_path, toy):
    run(tmp_path, "toy", "--seeds", "7,", "--quick")
    import shlex
    command = shlex.split(E.load_results(tmp_path / "toy.json")["runs"][0]["command"])
    toy.calls.clear()
    assert E.main([*command[1:], "--out", str(tmp_path / "again")]) == 0 and toy.calls == [(1.0, 7, True)]


def test_threads(tmp_path, toy):
    before = torch.get_num_threads()
    try:
        assert run(tmp_path, "toy", "--threads", 1) == 0 and torch.get_num_threads() == 1
        assert E.load_results(tmp_path / "toy.json")["runs"][0]["hardware"]["threads"] == 1
    finally:
        torch.set_num_threads(before)


def test_all_goes_on_after_a_refused_file(tmp_path, toy, capsys):
    @E.experiment("zoo", "…")
    def zoo(seed, device, quick=False): return {"a": 1}
    (tmp_path / "toy.json").write_text("{")
    assert run(tmp_path, "all") == 2 and (tmp_path / "zoo.json").exists() and toy.calls == []


# The book's own ---------------------------------------------------------------------------------------------------

def test_digits_mlp_is_a_function_of_the_seed_and_resumes(tmp_path):
    a = E.digits_mlp(0, "cpu", quick=True, width=8)
    assert E.digits_mlp(0, "cpu", quick=True, width=8, checkpoint=tmp_path) == a and (tmp_path / "fit.pt").exists()
    assert E.digits_mlp(0, "cpu", quick=True, width=8, checkpoint=tmp_path) == a
    assert a["test_accuracy"] > 0.6 and E.digits_mlp(1, "cpu", quick=True, width=8) != a


def test_module_as_a_command(tmp_path):
    """`python -m altbp.experiments` uses one registry, and finds the experiments of all modules."""
    done = subprocess.run([sys.executable, "-m", "altbp.experiments", "list", "--out", str(tmp_path)],
                          capture_output=True, text=True, cwd=Path(E.__file__).parent.parent)
    assert done.returncode == 0 and re.search(r"^digits-mlp +altbp\.experiments +6 +0 ", done.stdout, re.M)


def test_a_module_that_cannot_be_imported_costs_a_warning(monkeypatch, capsys):
    monkeypatch.undo()
    real = E.importlib.import_module
    monkeypatch.setattr(E.importlib, "import_module", lambda n: real(n) if n != "altbp.claims" else 1 / 0)
    assert "digits-mlp" in E.discover()
    assert "warning: altbp.claims cannot be imported" in capsys.readouterr().err


def test_stored_results_are_of_the_code_that_is_here(monkeypatch):
    """The results that the book shows were made by the experiments that it lists."""
    monkeypatch.undo()
    found = E.discover()
    folder = Path(E.__file__).parent.parent / "nbs" / "results"
    stored = {n: E.load_results(folder / f"{n}.json") for n in found if (folder / f"{n}.json").exists()}
    assert "digits-mlp" in stored and all(r["name"] == n for n, r in stored.items())
    assert [n for n, r in stored.items() if r["fingerprint"] != E.fingerprint(found[n])] == []  # made by other code
