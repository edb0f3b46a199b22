"""What the benchmarks share: options, turns, peers that may be missing, and one form of the file.

A **task** is a dictionary of calls that take turns: in every round each call runs once, in a new random order, so that a
busy moment of the machine hits all alike. Times are CPU times of one thread, on a GPU wall-clock times till it is idle. A row
gives the median time of a call, and the median and the quartiles of its ratios to the reference's time in the same round.
A task may be built several times: where a call's memory happens to lie moves its time by a few percent for as long as it
lives, and more rounds do not help against that; `between` is the standard deviation of the builds' medians. A **limit** is a
number that was set before anything was measured; its verdict is the median's.
"""
import argparse
import datetime
import gc
import json
import os
import random
import shlex
import statistics
import sys
import time
from importlib import metadata
from pathlib import Path
from types import SimpleNamespace

import torch

from altbp.data import atomic
from altbp.experiments import _hardware, _versions
from altbp.zoo import library

RESULTS = Path(__file__).resolve().parent.parent / "nbs/results"
FORMAT = 2  # of the file


# Time and memory ----------------------------------------------------------------------------------------------------

def interleaved(calls, rounds, device="cpu", every=None, per=None, builds=None):
    """Return the seconds of every call in each round, and the calls: divided by `per`, None where one sits out all but one in `every`.

    Up to two rounds come before those that count. With `builds`, the values make the calls: so many times, in a random order,
    each time for its share of the rounds.
    """
    gpu, every, per = device != "cpu", every or {}, per or {}
    wait, clock = (torch.cuda.synchronize, time.perf_counter) if gpu else (lambda: None, time.process_time)
    order, times, rng, n = list(calls), {name: [] for name in calls}, random.Random(0), builds or 1
    for b in range(n):
        rng.shuffle(order)
        built = {name: calls[name]() for name in order} if builds else calls
        first, last = rounds * b // n, rounds * (b + 1) // n
        gc.collect()
        gc.freeze()  # what is there now need not be looked through in every round
        for r in range(first - min(2, rounds - 1), last):
            rng.shuffle(order)
            gc.collect()  # not within a call
            for name in order:
                if r >= first and r % every.get(name, 1):
                    times[name].append(None)
                    continue
                wait()
                start = clock()
                built[name]()
                wait()
                if r >= first:
                    times[name].append((clock() - start) / per.get(name, 1))
        gc.unfreeze()
    return times, built


def peak_bytes(call):
    """Return what a call allocates on the GPU at most, beyond what was there."""
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    call()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def middle(values):
    """Return the median and the quartiles."""
    values = list(values)
    quartiles = statistics.quantiles(values, n=4, method="inclusive")[::2] if len(values) > 1 else 2 * values
    return statistics.median(values), quartiles


def between(values, builds):
    """Return the standard deviation of the builds' medians, each of its share of the values."""
    n = len(values)
    return statistics.stdev(statistics.median(values[n * b // builds : n * (b + 1) // builds]) for b in range(builds))


class Task(dict):
    """The record of calls that took turns. Rows and tasks may be given fields of their own, for instance bytes."""

    def __init__(self, calls, reference, rounds, device="cpu", *, every=None, per=None, builds=None, **about):
        self.times, built = interleaved(calls, rounds, device, every, per, builds)
        super().__init__(device=device, reference=reference, **({"builds": builds} if builds else {}), **about, rows={}, limits=[])
        for name, t in self.times.items():
            known = [s for s in t if s is not None]
            ratios = self.ratios(name, reference)
            ratio, spread = middle(ratios)
            self["rows"][name] = dict(ms=1e3 * statistics.median(known), ratio=ratio, spread=spread, rounds=len(known))
            if builds and builds > 1:
                self["rows"][name]["between"] = between(ratios, builds)
            if device != "cpu":
                self["rows"][name]["peak_bytes"] = peak_bytes(built[name])

    def ratios(self, name, base):
        """Return the ratios of two calls' times in the rounds that both took part in."""
        return [a / b for a, b in zip(self.times[name], self.times[base]) if None not in (a, b)]

    def limit(self, what, values, op, bound):
        """Hold the median of values, or one value, against a bound."""
        value, spread = middle(values if isinstance(values, list) else [values])
        met = value <= bound if op == "<=" else value >= bound
        self["limits"].append(dict(what=what, value=value, spread=spread, op=op, limit=bound,
                                   verdict="met" if met else "missed"))
        if self.get("builds", 1) > 1 and isinstance(values, list):
            self["limits"][-1]["between"] = between(values, self["builds"])


# Peers ----------------------------------------------------------------------------------------------------------------

class Peer:
    """Another library, installed or in the folder that the environment variable ALTBP_NAME names."""

    def __init__(self, name, module):
        self.name, self.module, self.variable = name, module, f"ALTBP_{name.upper()}"
        self.version = self.why = None

    def load(self):
        """Return the module, or None; remember the version, or why it is missing."""
        if folder := os.environ.get(self.variable):
            sys.path.insert(0, folder)
        try:
            module = library(self.module)
        except ImportError as error:
            self.why = str(error).split("; try")[0]
            return None
        try:
            self.version = metadata.version(self.module.split(".")[0])
        except metadata.PackageNotFoundError:
            self.version = "a checkout"
        return module

    def record(self):
        """Return what the file says of the peer."""
        return {k: getattr(self, k) for k in ("name", "variable", "version", "why")}


# The script -----------------------------------------------------------------------------------------------------------

def devices(asked=None):
    """Return the devices asked for, or all that are there."""
    return asked or ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]


def show(name, task):
    """Print a task."""
    print(f"{name} ({task['device']}), ratios to {task['reference']}: median, quartiles")
    for row, r in task["rows"].items():
        kept = "".join(f"  {r[k] / 2**20:9.2f} MiB" for k in ("saved_bytes", "peak_bytes") if k in r)
        print(f"  {row:44s} {r['ms']:10.3f} ms {r['ratio']:8.3f}  {r['spread'][0]:.3f} … {r['spread'][1]:.3f}{kept}")
    for x in task["limits"]:
        builds = f" (builds differ by {x['between']:.2g})" if "between" in x else ""
        print(f"  {x['verdict']:6s}  {x['what']}: {x['value']:.3g}{builds}, limit {x['op']} {x['limit']:g}", flush=True)


def main(measure, doc, rounds, peers=(), argv=None):
    """Run a script: `measure(run)` yields names and tasks; `run` has device, rounds, quick, the peers' modules,
    and whether the limits, which are of a CPU and of whole tasks, apply."""
    name = Path(measure.__code__.co_filename).stem
    brought = "".join(f"\n  {p.variable}=FOLDER  import {p.name} from there; without it, as installed" for p in peers)
    parser = argparse.ArgumentParser(description=doc + (f"\nenvironment:{brought}" if peers else ""),
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=rounds, help=f"how often every call takes its turn ({rounds})")
    parser.add_argument("--quick", action="store_true", help="one round of small tasks, to see that all works; stores nothing "
                        "unless --out is given")
    parser.add_argument("--device", action="append", choices=["cpu", "cuda"], help="may be given twice; default: all there are")
    parser.add_argument("--out", type=Path, help=f"default: nbs/results/{name.replace('_', '-')}.json")
    a = parser.parse_args(argv)
    if a.rounds < 1:
        parser.error(f"--rounds: {a.rounds} is not 1, 2, 3, …")
    torch.set_num_threads(1)
    start, tasks, rounds = time.perf_counter(), {}, 1 if a.quick else a.rounds
    found = {p.name: p.load() for p in peers}
    for p in peers:
        print(f"{p.name}: {p.version or f'absent ({p.why})'}")
    for device in devices(a.device):
        torch.manual_seed(0)
        for task_name, task in measure(SimpleNamespace(device=device, rounds=rounds, quick=a.quick, peers=found,
                                                         limits=device == "cpu" and not a.quick)):
            show(task_name, task)
            tasks[task_name if device == "cpu" else f"{task_name}, {device}"] = task
    words = ["python", f"benchmarks/{name}.py", *(["--quick"] if a.quick else []),
             *(w for d in a.device or () for w in ("--device", d)), "--rounds", str(rounds)]
    record = dict(format=FORMAT, name=name.replace("_", "-"), summary=doc.splitlines()[0], command=shlex.join(words), quick=a.quick,
                  date=datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
                  seconds=round(time.perf_counter() - start, 1), rounds=rounds, versions=_versions(),
                  hardware=_hardware(devices()[-1]),
                  peers=[p.record() for p in peers], tasks=tasks)
    out = a.out or (None if a.quick else RESULTS / f"{record['name']}.json")
    if out:
        with atomic(out) as temp:
            temp.write_text(json.dumps(record, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
