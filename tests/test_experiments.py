"""altbp.experiments: registering, running, resuming, tables, and the command line."""
import io
import json
import math
import multiprocessing
import os
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
    assert run(tmp_path, "toy") == 2 and "--fresh begins anew" in capsys.readouterr().err
    assert run(tmp_path, "toy", "--fresh") == 0 and "kept as toy.json.bak" in capsys.readouterr().err
    assert (tmp_path / "toy.json.bak").read_text() == content and runs(tmp_path) == [(1.0, 0), (2.0, 0)]


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
    assert E.main(["show", "toy", "--quick", "--out", str(tmp_path)]) == 0 and "no such runs; 6 full runs are stored" in capsys.readouterr().out
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
        (["run", "toy", "--seeds", "0"], "--seeds"), (["run", "toy", "--seeds", "a"], "'a' is neither a number (5) nor a list"), (["run", "toy", "--seeds", ""], "'' is neither"),
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


# Found by a hostile reader ----------------------------------------------------------------------------------------

def test_runs_that_another_process_stored_meanwhile_are_kept(tmp_path):
    """Between reading the file and writing it, somebody else stores another seed."""
    calls = []

    @E.experiment("pair", "…")
    def pair(seed, device, quick=False):
        calls.append(seed)
        if seed == 0: assert E.run_experiment(E.REGISTRY["pair"], [1, 2], out=tmp_path) == (2, 0)
        return {"a": seed}
    assert E.run_experiment(E.REGISTRY["pair"], [0, 1, 3], out=tmp_path) == (2, 0)  # 1 is stored by then
    assert calls == [0, 1, 2, 3]
    assert sorted(r["seed"] for r in E.load_results(tmp_path / "pair.json")["runs"]) == [0, 1, 2, 3]
    assert [p.name for p in tmp_path.iterdir()] == ["pair.json"]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_processes_at_one_experiment_lose_no_run_and_make_none_twice(tmp_path):
    @E.experiment("many", "…", cases=[dict(x=1), dict(x=2)])
    def many(seed, device, quick=False, x=1, checkpoint=None):
        with (checkpoint / "owner").open("x"): pass  # fails if another process is at this run
        with (tmp_path / "log.txt").open("a") as log: log.write(f"{x} {seed}\n")
        time.sleep(0.003)
        return {"a": x * seed}
    fork, out = multiprocessing.get_context("fork"), tmp_path / "out"
    args = [(E.REGISTRY["many"], seeds, "cpu", out) for seeds in (range(8), range(7, -1, -1), range(4, 12))]
    workers = [fork.Process(target=E.run_experiment, args=a) for a in args]
    for w in workers: w.start()
    for w in workers: w.join(60)
    assert [w.exitcode for w in workers] == [0, 0, 0]
    want = sorted((x, s) for x in (1, 2) for s in range(12))
    assert sorted((r["case"]["x"], r["seed"]) for r in E.load_results(out / "many.json")["runs"]) == want
    assert sorted(tuple(map(int, l.split())) for l in (tmp_path / "log.txt").read_text().splitlines()) == want
    assert [p.name for p in out.iterdir()] == ["many.json"]


def test_a_run_that_is_being_made_is_skipped_with_a_word(tmp_path, capsys):
    @E.experiment("self", "…")
    def twice(seed, device, quick=False):
        status.append(E.run_experiment(E.REGISTRY["self"], [0], out=tmp_path))
        with pytest.raises(E.ResultsError, match="another process is making runs.*--fresh"):
            E.run_experiment(E.REGISTRY["self"], [0], out=tmp_path, fresh=True)
        return {"a": 1}
    status = []
    assert E.run_experiment(E.REGISTRY["self"], [0], out=tmp_path) == (1, 0) and status == [(0, 0)]
    assert "seed 0: skipped, another process is making it now" in capsys.readouterr().err


def test_a_lock_that_a_killed_process_left_is_free(tmp_path, toy):
    e = E.REGISTRY["toy"]
    path = E._folder(e, tmp_path, E.fingerprint(e) + E._key(dict(scale=1.0), 0, False)).with_suffix(".lock")
    path.parent.mkdir(parents=True)
    path.write_text("")
    assert E.run_experiment(e, [0], out=tmp_path) == (2, 0)
    assert [p.name for p in tmp_path.iterdir()] == ["toy.json"]


def test_code_that_changed_meanwhile_is_not_mixed_in(tmp_path):
    path = tmp_path / "slow.json"

    @E.experiment("slow", "…")
    def slow(seed, device, quick=False):
        if path.exists(): path.write_text(path.read_text().replace(E.fingerprint(E.REGISTRY["slow"]), "0123456789abcdef"))
        return {"a": seed}
    with pytest.raises(E.ResultsError, match="made by other code"):
        E.run_experiment(E.REGISTRY["slow"], [0, 1], out=tmp_path)
    assert [r["seed"] for r in E.load_results(path)["runs"]] == [0]


def test_seeds_and_cases_may_come_from_iterators(tmp_path, toy):
    e = E.REGISTRY["toy"]
    seeds = (np.int64(s) for s in (3, 1, 3))
    assert E.run_experiment(e, seeds, out=tmp_path, cases=iter(e.cases)) == (4, 0)
    assert sorted(runs(tmp_path)) == [(1.0, 1), (1.0, 3), (2.0, 1), (2.0, 3)]
    toy.calls.clear()
    for bad in ([0, 0.5], [True], ["1"], 3):
        with pytest.raises(TypeError, match="seeds"):
            E.run_experiment(e, bad, out=tmp_path)
    with pytest.raises(ValueError, match=r"cases: \{'scale': 9.0\} is not a case of toy; there are \{'scale': 1.0\}"):
        E.run_experiment(e, out=tmp_path, cases=[dict(scale=9.0)])
    assert toy.calls == []


def spoil(path, change):
    stored = json.loads(path.read_text())
    change(stored["runs"])
    path.write_text(json.dumps(stored))


@pytest.mark.parametrize("change, message", [
    (lambda r: r.__setitem__(1, 5), "run 2: a int in place"), (lambda r: r[1].pop("case"), "run 2: 'case' is missing"),
    (lambda r: r[0].update(seed="0"), "run 1: 'seed'"), (lambda r: r[0].update(seed=True), "run 1: 'seed'"),
    (lambda r: r[0].update(quick=0), "run 1: 'quick'"), (lambda r: r[1].update(result=[1]), "run 2: 'result'"),
    (lambda r: r[1]["result"].update(value="x"), "run 2: the result 'value' is text"),
])
def test_a_bad_record_is_named_and_hides_no_other_experiment(tmp_path, toy, capsys, change, message):
    @E.experiment("zoo", "Animals")
    def zoo(seed, device, quick=False): return {"a": 1}
    run(tmp_path, "all")
    spoil(tmp_path / "toy.json", change)
    with pytest.raises(E.ResultsError, match=f"toy.json: {message}"):
        E.load_results(tmp_path / "toy.json")
    assert run(tmp_path, "toy") == 2 and message in capsys.readouterr().err
    assert E.main(["list", "--out", str(tmp_path)]) == 0
    out = capsys.readouterr().out
    assert re.search(r"^toy .* damaged ", out, re.M) and re.search(r"^zoo .* 1 +Animals", out, re.M)
    assert E.main(["show", "all", "--out", str(tmp_path)]) == 2
    shown = capsys.readouterr()
    assert "zoo: Animals" in shown.out and message in shown.err


def test_numbers_that_are_not_finite_are_counted(tmp_path, toy, capsys):
    run(tmp_path, "toy", "--seeds", 3)
    def change(rows): rows[0]["result"]["value"], rows[1]["result"]["value"] = math.nan, math.inf
    spoil(tmp_path / "toy.json", change)
    capsys.readouterr()
    assert E.main(["show", "toy", "--out", str(tmp_path)]) == 0 and "2.0 (1 of 3)" in capsys.readouterr().out
    table = E.summary_table({"runs": made([{"a": 10**400}, {"a": [1]}, {"a": 1.0}])})
    assert table.rows[0]["a"] == (1.0, None, 1, 3)
    assert "inf" in str(E.summary_table({"runs": made([{"a": 1.7e308}, {"a": 1.7e308}, {"a": -1.7e308}])}))


def test_stale_results_are_marked(tmp_path, toy, capsys):
    run(tmp_path, "toy")
    for command in (["list"], ["show", "toy"]):
        capsys.readouterr()
        E.main([*command, "--out", str(tmp_path)])
        shown = capsys.readouterr()
        assert "stale" not in shown.out + shown.err
    path = tmp_path / "toy.json"
    path.write_text(path.read_text().replace(E.fingerprint(E.REGISTRY["toy"]), "0123456789abcdef"))
    assert E.main(["list", "--out", str(tmp_path)]) == 0 and re.search(r"^toy .* 2 \(stale\) +A toy", capsys.readouterr().out, re.M)
    assert E.main(["show", "toy", "--out", str(tmp_path)]) == 0
    shown = capsys.readouterr()
    assert len(shown.err.splitlines()) == 1 and "stale" in shown.err and "toy: A toy" in shown.out


def test_a_folder_that_cannot_be_written_is_found_before_computing(tmp_path, toy, capsys):
    (tmp_path / "file").write_text("")
    assert E.main(["run", "toy", "--out", str(tmp_path / "file")]) == 2
    err = capsys.readouterr().err
    assert len(err.splitlines()) == 1 and "--out: cannot write to" in err and toy.calls == []
    assert E.main(["run", "toy", "--out", str(tmp_path / "file" / "below")]) == 2 and toy.calls == []


def test_quick_and_fresh_put_no_full_runs_aside(tmp_path, toy, capsys):
    run(tmp_path, "toy"), run(tmp_path, "toy", "--quick")
    before = (tmp_path / "toy.json").read_text()
    toy.calls.clear()
    assert run(tmp_path, "toy", "--quick", "--fresh") == 2 and "2 full runs" in capsys.readouterr().err
    assert (tmp_path / "toy.json").read_text() == before and toy.calls == []
    assert run(tmp_path, "toy", "--fresh") == 0 and runs(tmp_path) == [(1.0, 0), (2.0, 0)]
    assert (tmp_path / "toy.json.bak").read_text() == before and "toy.json.bak" in capsys.readouterr().err


def test_show_says_that_only_quick_runs_are_stored(tmp_path, toy, capsys):
    run(tmp_path, "toy", "--quick")
    assert E.main(["show", "toy", "--out", str(tmp_path)]) == 0
    assert "no such runs; 1 quick runs are stored (see --quick)" in capsys.readouterr().out


def test_version(capsys):
    import altbp
    assert E.main(["--version"]) == 0 and capsys.readouterr().out == f"altbp {altbp.__version__}\n"


def test_markdown_cells_keep_to_themselves():
    table = E.summary_table({"runs": made([{"a": 1.0}], rule="x|y\nz")})
    assert table.markdown().splitlines()[2] == r"| x\|y z | 1 | 1 |"


def test_a_terminal_without_the_characters(tmp_path, toy, monkeypatch):
    run(tmp_path, "toy", "--seeds", 2)
    raw = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(raw, encoding="ascii"))
    assert E.main(["show", "toy", "--out", str(tmp_path)]) == 0
    assert b"toy: A toy" in raw.getvalue() and b"0.5 ? 0.7" in raw.getvalue()


def test_the_reader_of_the_output_may_leave(tmp_path, toy, monkeypatch, capfd):
    read, write = os.pipe()
    os.close(read)
    with os.fdopen(write, "w") as closed:
        monkeypatch.setattr(sys, "stdout", closed)
        assert E.main(["list", "--out", str(tmp_path)]) == 141
    assert capfd.readouterr().err == ""


def test_ctrl_c_at_any_moment(monkeypatch, capsys):
    def interrupted(): raise KeyboardInterrupt
    monkeypatch.setattr(E, "discover", interrupted)
    assert E.main(["list"]) == 130 and capsys.readouterr().err.strip() == "interrupted"
