"""Time and memory of stochastic backpropagation, side by side with what else saves memory.

usage: python benchmarks/bench_stochastic_backprop.py [--rounds 15] [--out nbs/results/bench-stochastic-backprop.json]

One process and one thread. All candidates take turns in every round, in a new random order; reported are medians of the rounds'
ratios of CPU time to dense backpropagation. The first part times one MLP branch, the second a training step of whole networks of
timm, where every method is set to keep no more bytes than SBP at r = 1/2. With a GPU a third part measures peak allocation and
throughput under bfloat16 autocast; without one it is left out.
"""
import argparse
import copy
import datetime
import json
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
from torch import nn

import altbp
from altbp.stochastic_backprop import grid_mask, keep_set, sbp_apply
from altbp.stochastic_backprop_practice import (apply_sbp, bytes_per_example, checkpoint_blocks, drop_tokens, paper_plan,
                                                timm_network)
from altbp.training import seeded

BRANCHES = {"ViT-Tiny": (8, (14, 14), 192), "ConvNeXt-Tiny, stage 1": (4, (28, 28), 96)}  # batch, positions, channels
RATIOS = (0.75, 0.5, 0.25, 0.125)
NETWORKS = {"ViT-Tiny": 4, "ConvNeXt-Tiny": 2}  # batch


def medians(steps, rounds, clock=time.process_time):
    """Return ms of `dense`, and for every step the median over the rounds of its ratio to `dense`."""
    times = {name: [] for name in steps}
    order = list(steps)
    for name in order: steps[name]()
    for _ in range(rounds):
        random.shuffle(order)
        for name in order:
            start = clock()
            steps[name]()
            times[name].append(clock() - start)
    dense = times["dense"]
    return 1e3 * statistics.median(dense), {k: statistics.median(a / b for a, b in zip(t, dense)) for k, t in times.items()}


def branch(batch, size, channels, rounds):
    """Time forward and backward of LN, Linear, GELU, Linear under keep ratios."""
    fn = nn.Sequential(nn.LayerNorm(channels), nn.Linear(channels, 4 * channels), nn.GELU(), nn.Linear(4 * channels, channels))
    x = torch.randn(batch, size[0] * size[1], channels, requires_grad=True)
    g, steps = torch.randn_like(x), {"dense": lambda: fn(x).backward(g)}
    for r in RATIOS:
        ks = keep_set(grid_mask(size, r, start=0))
        steps[r] = lambda ks=ks: sbp_apply(fn, x, ks).backward(g)
    ms, ratios = medians(steps, rounds)
    return {"dense_ms": ms, "ratios": {str(r): ratios[r] for r in RATIOS}}


def fewest(apply, options, size, budget):
    """Return the first of the options whose bytes fit the budget, in the given order, and its bytes."""
    for o in options:
        handle = apply(o)
        kept = size()
        handle.remove()
        if kept <= budget: return o, kept
    raise RuntimeError(f"no option keeps {budget} bytes")


def contenders(net, batch):
    """Return name -> (setting, bytes per image, function of a model that applies it, images)."""
    model = seeded(partial(timm_network, net), 0)
    x = torch.randn(2, 3, 224, 224)
    size = lambda: bytes_per_example(model, x, list(model.parameters()))
    plan = list(paper_plan(model))
    blocks = [n for n in plan if not n.endswith("downsample")]
    rows = {"dense": ("", size(), None, batch)}
    modes = {"SBP": {}, "SBP, recompute": dict(impl="recompute")} | ({"SBP, qkv": dict(mode="qkv")} if net.startswith("ViT") else {})
    for name, options in modes.items():
        with apply_sbp(model, **options): rows[name] = ("r = 0.5", size(), partial(apply_sbp, **options), batch)
    dense, budget = rows["dense"][1], rows["SBP"][1]
    some = lambda k: lambda model: checkpoint_blocks(model, dict.fromkeys(blocks[:k], "block"))
    k, kept = fewest(lambda k: some(k)(model), range(1, len(blocks) + 1), size, budget)
    rows["checkpointing"] = (f"{k} blocks", kept, some(k), batch)
    for name, at in (("PatchDropout", 0), ("token deletion", len(plan) // 2)) if net.startswith("ViT") else ():
        r, kept = fewest(lambda r: drop_tokens(model, r, at), [i / 20 for i in range(19, 0, -1)], size, budget)
        rows[name] = (f"r = {r:g}, block {at}", kept, partial(drop_tokens, keep_ratio=r, at=at), batch)
    small = max(1, int(batch * budget / dense))
    rows["smaller batch"] = (f"{small} of {batch} images", dense * small / batch, None, small)
    return model, rows


def step(model, x):
    """Make one training step's forward and backward pass."""
    F.cross_entropy(model(x), torch.arange(len(x))).backward()
    model.zero_grad(set_to_none=True)


def network(net, batch, rounds):
    """Time training steps at equal memory, per image."""
    model, rows = contenders(net, batch)
    x, steps = torch.randn(batch, 3, 224, 224), {}
    for name, (_, _, apply, images) in rows.items():
        own = copy.deepcopy(model)
        if apply: apply(own)
        steps[name] = partial(step, own, x[:images])
    ms, ratios = medians(steps, rounds)
    return {"dense_ms": ms, "batch": batch, "rows": [
        {"name": n, "setting": s, "bytes": b, "memory": b / rows["dense"][1], "time": ratios[n] * batch / images}
        for n, (s, b, _, images) in rows.items()]}


def gpu(net, batch=64):
    """Return peak allocation and images a second of dense and stochastic steps under bfloat16 autocast."""
    model, x, out = seeded(partial(timm_network, net), 0).cuda(), torch.randn(batch, 3, 224, 224, device="cuda"), {}
    def run():
        with torch.autocast("cuda", torch.bfloat16): loss = F.cross_entropy(model(x), torch.arange(batch, device="cuda"))
        loss.backward()
    for name, apply in (("dense", None), ("SBP", lambda: apply_sbp(model)), ("checkpointing", lambda: checkpoint_blocks(model))):
        handle = apply() if apply else None
        for _ in range(3): run()
        torch.cuda.reset_peak_memory_stats()
        torch.cuda.synchronize()
        start = time.perf_counter()
        for _ in range(10): run()
        torch.cuda.synchronize()
        out[name] = {"images_per_second": 10 * batch / (time.perf_counter() - start), "peak_bytes": torch.cuda.max_memory_allocated()}
        if handle: handle.remove()
    return out


def main():
    """Measure, print, and write the file."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--out", default=str(ROOT / "nbs/results/bench-stochastic-backprop.json"))
    a = parser.parse_args()
    torch.set_num_threads(1)
    random.seed(0)
    torch.manual_seed(0)
    result = dict(name="bench-stochastic-backprop", summary="SBP against what else saves memory",
                  date=datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
                  command=shlex.join(["python", "benchmarks/bench_stochastic_backprop.py", "--rounds", str(a.rounds)]),
                  versions=dict(python=platform.python_version(), torch=torch.__version__, altbp=altbp.__version__),
                  hardware=dict(cores=os.cpu_count(), threads=1, gpu=torch.cuda.get_device_name() if torch.cuda.is_available() else None),
                  branches={k: branch(*v, a.rounds) for k, v in BRANCHES.items()},
                  networks={k: network(k, v, a.rounds) for k, v in NETWORKS.items()})
    if torch.cuda.is_available(): result["gpu"] = {k: gpu(k) for k in NETWORKS}
    for k, v in result["branches"].items(): print(k, f"{v['dense_ms']:.1f} ms", {r: round(t, 3) for r, t in v["ratios"].items()})
    for k, v in result["networks"].items():
        print(f"{k}: dense {v['dense_ms']:.0f} ms")
        for r in v["rows"]: print(f"  {r['name']:15s} {r['setting']:20s} memory {r['memory']:.3f}  time {r['time']:.3f}")
    if "gpu" not in result: print("no GPU: peak allocation and throughput were not measured")
    Path(a.out).write_text(json.dumps(result, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
