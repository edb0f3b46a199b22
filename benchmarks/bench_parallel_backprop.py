"""Time per pair of parallel backpropagation against a loop over latent neurons.

One process and one thread; all ways take turns pair by pair, and each ratio is the median over these rounds of
the loop's CPU time divided by a way's in the same round. The loop asks for one gradient per latent neuron and
image, a forward and a backward pass each, as libraries of single-image attributions do. With captum installed,
its NeuronGradient takes its turns in the same rounds. All ways but the last three compute the same two maps.

    python benchmarks/bench_parallel_backprop.py [--rounds 15] [--out FILE]
"""
import argparse
import json
import platform
import statistics
import time
from pathlib import Path

import torch
from torch import nn

from altbp.parallel_backprop import combine_maps, feature_norms, parallel_backprop, shared_weights
from altbp.readouts import Latent
from altbp.zoo import library
from interleave import interleaved

TARGET = 4.0  # times faster than the loop, at 42 px with 64 features
SIGMA = 2.0


def net(c, seed=0):
    """The encoder of the planted-parts benchmark, with random weights."""
    torch.manual_seed(seed)
    layers = []
    for i, o, k, stride in ((1, 16, 5, 2), (16, 32, 3, 1), (32, 64, 3, 2), (64, c, 3, 2)):
        layers += [nn.Conv2d(i, o, k, stride, k // 2), nn.BatchNorm2d(o), nn.ReLU()]
    return nn.Sequential(*layers).eval()


def captum_gradients(model):
    """Return x ↦ rows by captum's NeuronGradient, or None where captum is missing."""
    try:
        neuron = library("captum.attr").NeuronGradient(model, model[-1])
    except ImportError:
        return None
    c = model[-3].out_channels
    select = [lambda a, i=i: a[:, i].mean((1, 2)) for i in range(c)]
    return lambda x: torch.stack([neuron.attribute(x, neuron_selector=s)[0] for s in select])[None]


def loop_gradients(latent, c):
    """Return x ↦ rows by a forward and a backward pass per feature."""
    def rows(x):
        out = []
        for i in range(c):
            leaf = x.clone().requires_grad_()
            out.append(torch.autograd.grad(latent(leaf)[0, i], leaf)[0][0])
        return torch.stack(out)[None]
    return rows


def ways(c):
    """Every way to explain one pair, as a call without arguments."""
    model = net(c)
    latent = Latent(model)
    g = torch.Generator().manual_seed(1)
    x, z = torch.rand(2, 1, 42, 42, generator=g)[:, None].unbind()
    w = torch.randn(c, generator=g)
    sparse = torch.where(torch.arange(c) % 8 == 0, w, torch.zeros(()))
    norms = tuple(feature_norms(latent, i, sigma=SIGMA) for i in (x, z))

    def from_rows(rows):
        with torch.no_grad():
            beta = shared_weights(latent(x), latent(z), w)
        return [combine_maps(rows(i), beta, sigma=SIGMA) for i in (x, z)]

    def ours(w=w, **options):
        maps = parallel_backprop(latent, x, z, w, sigma=SIGMA, **options)
        return maps.map_out, maps.map_in

    out = {"loop": lambda: from_rows(loop_gradients(latent, c))}
    captum = captum_gradients(model)
    if captum:
        out["captum NeuronGradient"] = lambda: from_rows(captum)
    out |= {"all features": ours, "norms known": lambda: ours(norms=norms),
            "one weight in eight": lambda: ours(sparse), "hutchinson, 100 probes": lambda: ours(norms="hutchinson", n_probe=100),
            "cam": lambda: ours(backbone="cam")}
    return out


def measure(calls, rounds):
    """Median CPU time of the loop in ms, and median ratios of the loop's time to the others'."""
    times = interleaved(calls, rounds)
    loop = times.pop("loop")
    return 1e3 * statistics.median(loop), {k: statistics.median(a / b for a, b in zip(loop, t)) for k, t in times.items()}


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--out", type=Path,
                        default=Path(__file__).resolve().parent.parent / "nbs/results/bench-parallel-backprop.json")
    options = parser.parse_args()
    torch.set_num_threads(1)
    tasks = {}
    for c in (64, 256):
        calls = ways(c)
        want = calls["loop"]()
        for name in [n for n in ("captum NeuronGradient", "all features", "norms known") if n in calls]:
            error = max((a - b).abs().max().item() for a, b in zip(want, calls[name]()))
            assert error < 1e-6, f"{name} differs from the loop by {error}"
        ms, ratios = measure(calls, options.rounds if c == 64 else max(3, options.rounds // 3))
        tasks[f"42px-c{c}"] = {"loop_ms": ms, "faster": ratios}
        print(f"42 px, {c} features: the loop takes {ms:.0f} ms a pair")
        for name, ratio in ratios.items():
            target = TARGET if c == 64 and name == "all features" else None
            print(f"  {name:24s} {ratio:6.2f} times faster" + (f"  (target {target})" if target else ""))
    result = {"format": 1, "name": "bench-parallel-backprop", "date": time.strftime("%Y-%m-%d"), "threads": 1,
              "rounds": options.rounds, "torch": torch.__version__, "machine": platform.machine(),
              "target": TARGET, "tasks": tasks}
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
