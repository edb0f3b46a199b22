"""The benchmarks: they run, their files have one form, and no timing is ever asserted."""
import json
import platform
import re
import runpy
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
SCRIPTS = sorted((ROOT / "benchmarks").glob("bench_*.py"))
STORED = sorted((ROOT / "nbs/results").glob("bench-*.json"))


@pytest.fixture
def common(monkeypatch):
    """benchmarks/common.py, with torch's number of threads put back afterwards."""
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    threads = torch.get_num_threads()
    import common
    yield common
    torch.set_num_threads(threads)


def assert_form(record, script, quick):
    assert record.keys() == {"format", "name", "summary", "command", "quick", "date", "seconds", "rounds", "versions",
                             "hardware", "peers", "tasks"}
    assert record["format"] == 2 and record["name"] == script.stem.replace("_", "-") and record["quick"] is quick
    assert record["command"].startswith(f"python benchmarks/{script.name}")
    assert record["hardware"].keys() == {"cpu", "cores", "threads", "gpu"} and record["hardware"]["threads"] == 1
    assert {"python", "torch", "altbp"} <= record["versions"].keys()
    assert platform.node() not in json.dumps(record) or len(platform.node()) < 4
    for peer in record["peers"]:
        assert peer.keys() == {"name", "variable", "version", "why"} and bool(peer["version"]) != bool(peer["why"])
    assert record["tasks"]
    for name, task in record["tasks"].items():
        assert task["device"] in name or task["device"] == "cpu"
        assert task["rows"][task["reference"]]["ratio"] == 1
        for row in task["rows"].values():
            low, high = row["spread"]
            assert row["ms"] > 0 and 0 < low <= row["ratio"] <= high and 1 <= row["rounds"] <= record["rounds"] * task.get("builds", 1)
        for limit in task["limits"]:
            met = {"<=": limit["value"] <= limit["limit"], ">=": limit["value"] >= limit["limit"]}[limit["op"]]
            assert limit["verdict"] == ("met" if met else "missed")


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda p: p.stem)
def test_every_script_runs(script, common, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", [script.name, "--quick", "--device", "cpu", "--out", str(tmp_path / "out.json")])
    runpy.run_path(str(script), run_name="__main__")
    assert_form(json.loads((tmp_path / "out.json").read_text(encoding="utf-8")), script, quick=True)
    assert "ratios to" in capsys.readouterr().out


@pytest.mark.parametrize("path", STORED, ids=lambda p: p.stem)
def test_stored_files_have_the_form(path):
    script = ROOT / "benchmarks" / f"{path.stem.replace('-', '_')}.py"
    assert_form(json.loads(path.read_text(encoding="utf-8")), script, quick=False)


def test_every_script_has_its_file_and_every_file_its_reader():
    names = {p.stem.replace("_", "-") for p in SCRIPTS}
    assert names == {p.stem for p in STORED}
    text = "".join(p.read_text(encoding="utf-8") for p in (ROOT / "nbs").glob("*.ipynb"))
    assert names == set(re.findall(r"results/(bench-[\w-]+)\.json", text))


@pytest.fixture
def clock(common, monkeypatch):
    """Calls that take a known time: by the clock of the process, and by the wall."""
    now = SimpleNamespace(seconds=0.0)
    monkeypatch.setattr(common.time, "process_time", lambda: now.seconds)
    monkeypatch.setattr(common.time, "perf_counter", lambda: now.seconds)

    def taking(*seconds):
        left = list(seconds)

        def call():
            now.seconds += left.pop(0) if len(left) > 1 else left[0]

        return call

    return taking


def test_ratios_are_of_the_same_round(common, clock):
    warm = [9.0, 9.0]  # rounds that do not count
    calls = {"slow": clock(*warm, 2, 20, 6), "base": clock(*warm, 1, 10, 2)}
    task = common.Task(calls, "base", 3, x=5)
    assert task["x"] == 5 and task["reference"] == "base" and task["device"] == "cpu"
    assert task["rows"]["slow"] == dict(ms=6000, ratio=2, spread=[2, 2.5], rounds=3)
    assert task["rows"]["base"] == dict(ms=2000, ratio=1, spread=[1, 1], rounds=3)
    assert json.loads(json.dumps(task))["rows"] == task["rows"]


def test_a_call_may_sit_out_and_may_make_several_steps(common, clock):
    calls = {"rare": clock(8), "base": clock(1), "many": clock(50)}
    task = common.Task(calls, "base", 5, every={"rare": 2}, per={"many": 100})
    assert task["rows"]["rare"] == dict(ms=8000, ratio=8, spread=[8, 8], rounds=3)
    assert task["rows"]["many"] == dict(ms=500, ratio=0.5, spread=[0.5, 0.5], rounds=5)


def test_a_task_may_be_built_several_times(common, clock):
    built, per_build = [], {"a": [9, 9, 2, 4], "b": [9, 9, 1, 1]}  # two rounds of each build do not count

    def builder(name):
        def build():
            built.append(name)
            return clock(*(t * len(built) for t in per_build[name]))

        return build

    task = common.Task({"a": builder("a"), "b": builder("b")}, "b", 6, every={"a": 2}, builds=3)
    assert len(built) == 6 and all(sorted(built[i : i + 2]) == ["a", "b"] for i in (0, 2, 4)) and task["builds"] == 3
    assert [t is None for t in task.times["a"]] == [False, True] * 3 and None not in task.times["b"]
    which = [built[i : i + 2].index("b") for i in (0, 2, 4)]
    assert task.times["b"] == [s for i, k in zip((1, 3, 5), which) for s in [i + k] * 2]
    assert task["rows"]["a"]["rounds"] == 3 and task["rows"]["b"]["rounds"] == 6
    assert common.between([1, 2, 3, 7, 7, 7], 2) == pytest.approx(5 / 2**0.5)  # medians 2 and 7
    task.limit("ratio", task.ratios("b", "a"), "<=", 1)
    assert task["limits"][0]["between"] == common.between(task.ratios("b", "a"), 3) > 0 and task["rows"]["b"]["between"] == 0


def test_calls_take_turns_in_changing_order(common):
    order = []
    common.interleaved({k: lambda k=k: order.append(k) for k in "abc"}, 10)
    turns = ["".join(order[i : i + 3]) for i in range(0, len(order), 3)]
    assert len(turns) == 12 and all(sorted(t) == ["a", "b", "c"] for t in turns) and len(set(turns)) > 1


def test_limits(common, clock):
    task = common.Task({"a": clock(3), "b": clock(1)}, "b", 3)
    task.limit("at most", task.ratios("a", "b"), "<=", 3)
    task.limit("at least", task.ratios("a", "b"), ">=", 4)
    task.limit("a number", 0.5, "<=", 1)
    assert [(x["value"], x["verdict"]) for x in task["limits"]] == [(3, "met"), (3, "missed"), (0.5, "met")]


def test_on_a_gpu_the_clock_waits_and_the_peak_is_measured(common, clock, monkeypatch):
    done = []
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: done.append("wait"))
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda: done.append("reset"))
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda: 100)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda: 160)
    task = common.Task({"a": clock(3), "b": clock(1)}, "b", 2, "cuda")
    assert task["rows"]["a"]["ratio"] == 3 and task["rows"]["a"]["peak_bytes"] == 60
    assert done.count("wait") == 2 * 2 * (2 + 1) + 2 * 2 and done.count("reset") == 2


def test_all_devices_that_are_there(common, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert common.devices() == ["cpu", "cuda"] and common.devices(["cpu"]) == ["cpu"]
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert common.devices() == ["cpu"]


def test_peers_are_found_or_listed_as_absent(common, tmp_path, monkeypatch):
    absent = common.Peer("Nobody", "no_such_peer.part")
    assert absent.load() is None
    assert absent.record() == {"name": "Nobody", "variable": "ALTBP_NOBODY", "version": None,
                               "why": "no_such_peer is not installed"}
    (tmp_path / "no_such_peer").mkdir()
    (tmp_path / "no_such_peer" / "__init__.py").write_text("")
    (tmp_path / "no_such_peer" / "part.py").write_text("answer = 42")
    monkeypatch.setattr(sys, "path", sys.path[:])
    monkeypatch.setenv("ALTBP_NOBODY", str(tmp_path))
    there = common.Peer("Nobody", "no_such_peer.part")
    assert there.load().answer == 42 and there.record()["version"] == "a checkout" and there.record()["why"] is None


def test_options(common, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(common, "RESULTS", tmp_path / "results")
    seen = []

    def measure(run):
        seen.append((run.rounds, run.quick, run.limits))
        yield "task", common.Task({"a": lambda: sum(range(1000))}, "a", run.rounds)

    common.main(measure, "What it is.\n\nMore.", 7, argv=["--quick"])
    assert not (tmp_path / "results").exists(), "a quick run must not overwrite what is stored"
    common.main(measure, "What it is.\n\nMore.", 7, argv=["--rounds", "2"])
    record = json.loads((tmp_path / "results" / "test-benchmarks.json").read_text(encoding="utf-8"))
    assert record["summary"] == "What it is." and record["command"].endswith("--rounds 2")
    assert seen == [(1, True, False), (2, False, True)]
    for wrong in (["--rounds", "0"], ["--device", "tpu"]):
        with pytest.raises(SystemExit):
            common.main(measure, "", 7, argv=wrong)
