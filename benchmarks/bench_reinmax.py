"""Time and memory of the estimators of altbp.reinmax and of their peers, side by side in one process.

usage: python benchmarks/bench_reinmax.py [--device cpu|cuda] [--rounds 60] [--threads 1] [--out nbs/results/bench-reinmax.json]

Each round calls every estimator once (Gumbel-Rao every 10th round), forward and backward, in a new random order, so that
a slow moment of the machine hits all alike. Reported are medians over the rounds, the medians of the rounds' ratios to ST
and to ReinMax, the bytes that autograd keeps for the backward pass, and on a GPU the peak allocation. The package `reinmax`
is timed if it is installed.
"""
import argparse
import datetime
import json
import math
import os
import platform
import random
import shlex
import statistics
import sys
import time
from functools import partial
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import torch
import torch.nn.functional as F

import altbp
from altbp.backprop import saved_bytes
from altbp.reinmax import reinmax, st
from altbp.reinmax_family import gapped_st, gumbel_rao, st_gumbel_softmax

SHAPES = [(64, 128, 2), (100, 4, 8), (100, 30, 10), (512, 128, 2), (64, 32, 1024), (4096, 64)]


def gumbel_rao_by_autograd(logits, tau=0.5, k=100):
    """Gumbel-Rao as it is usually written: autograd keeps all k relaxed samples."""
    pi = logits.softmax(-1)
    index = torch.multinomial(pi.detach().reshape(-1, pi.shape[-1]), 1).reshape(*pi.shape[:-1], 1)
    noise = torch.empty(*pi.shape[:-1], k, pi.shape[-1], device=pi.device).exponential_().clamp_min(1e-30)
    won = index[..., None, :].expand(*index.shape[:-1], k, 1)
    first = noise.gather(-1, won)
    z = -(noise / pi.detach()[..., None, :] + first).log()
    z = z.scatter(-1, won, -first.log())
    wide = logits[..., None, :]
    soft = ((z - wide.detach() + wide) / tau).softmax(-1).mean(-2)
    return F.one_hot(index[..., 0], pi.shape[-1]) - soft.detach() + soft


def st_by_hand(logits):
    """Straight-through in three lines of plain PyTorch."""
    pi = logits.softmax(-1)
    index = torch.multinomial(pi.detach().reshape(-1, pi.shape[-1]), 1).reshape(pi.shape[:-1])
    return F.one_hot(index, pi.shape[-1]) - pi.detach() + pi


def candidates(shape):
    """Return name -> sampler for a shape."""
    out = {"st": st, "reinmax": reinmax, "reinmax tau=1.3": partial(reinmax, tau=1.3),
           "stgs": partial(st_gumbel_softmax, tau=0.5), "gst": gapped_st,
           "st, plain PyTorch": st_by_hand, "stgs, torch": partial(F.gumbel_softmax, tau=0.5, hard=True)}
    if math.prod(shape) <= 65536:
        out["gr k=100"] = partial(gumbel_rao, tau=0.5, k=100)
        out["gr k=100, autograd"] = gumbel_rao_by_autograd
    try:
        from reinmax import reinmax as peer
        out["reinmax package"] = lambda x: peer(x, 1.0)[0]
        out["reinmax package tau=1.3"] = lambda x: peer(x, 1.3)[0]
    except ImportError:
        pass
    return out


def once(sampler, logits, g, sync):
    """Return the seconds of one forward and backward pass."""
    sync()
    start = time.perf_counter()
    torch.autograd.grad(sampler(logits), logits, g)
    sync()
    return time.perf_counter() - start


def measure(shape, rounds, device):
    """Return one row for each estimator."""
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(shape, generator=generator).to(device).requires_grad_()
    g = torch.randn(shape, generator=generator).to(device)
    sync = torch.cuda.synchronize if device != "cpu" else lambda: None
    samplers = candidates(shape)
    times = {name: [] for name in samplers}
    for name, sampler in samplers.items():
        for _ in range(2): once(sampler, logits, g, sync)
    every = {name: 10 if name.startswith("gr") else 1 for name in samplers}
    order = list(samplers)
    for r in range(rounds):
        random.shuffle(order)
        for name in order:
            times[name].append(None if r % every[name] else once(samplers[name], logits, g, sync))
    rows = []
    for name, sampler in samplers.items():
        pairs = [p for p in zip(times[name], times["st"], times["reinmax"]) if p[0] is not None]
        row = dict(shape=list(shape), name=name, ms=1e3 * statistics.median(a for a, _, _ in pairs),
                   ratio=statistics.median(a / b for a, b, _ in pairs), rounds=len(pairs),
                   to_reinmax=statistics.median(a / c for a, _, c in pairs),
                   saved_bytes=saved_bytes(lambda: sampler(logits), exclude=[logits]))
        if device != "cpu":
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            once(sampler, logits, g, sync)
            row["peak_bytes"] = torch.cuda.max_memory_allocated() - before
        rows.append(row)
    return rows


def table(rows):
    """Return the rows as text, one shape after the other."""
    lines = [f"{'shape':>15}  {'estimator':24} {'ms':>8} {'to ST':>7} {'to RM':>7} {'saved KiB':>10}"]
    for r in rows:
        lines.append(f"{'×'.join(map(str, r['shape'])):>15}  {r['name']:24} {r['ms']:8.3f} {r['ratio']:7.2f} "
                     f"{r['to_reinmax']:7.2f} {r['saved_bytes'] / 1024:10.1f}")
    return "\n".join(lines)


def main():
    """Measure, print the table, and write the file."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--rounds", type=int, default=60)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", default=str(ROOT / "nbs/results/bench-reinmax.json"))
    a = parser.parse_args()
    torch.set_num_threads(a.threads)
    random.seed(0)
    torch.manual_seed(0)
    rows = [row for shape in SHAPES for row in measure(shape, a.rounds, a.device)]
    print(table(rows))
    gpu = torch.cuda.get_device_name() if a.device != "cpu" else None
    result = dict(name="bench-reinmax", summary="Forward and backward pass of the estimators, and what they keep",
                  date=datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
                  command=shlex.join(["python", "benchmarks/bench_reinmax.py", "--device", a.device, "--rounds",
                                      str(a.rounds), "--threads", str(a.threads)]),
                  versions=dict(python=platform.python_version(), torch=torch.__version__, altbp=altbp.__version__),
                  hardware=dict(device=a.device, cores=os.cpu_count(), threads=a.threads, gpu=gpu), rows=rows)
    Path(a.out).write_text(json.dumps(result, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
