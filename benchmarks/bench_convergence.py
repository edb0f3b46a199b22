"""Step times of the two-layer engines beside plain autograd nets, in one process, interleaved, one thread.

Times are CPU times of that thread, so that a machine shared with others tells the same.

Writes nbs/results/bench-convergence.json and prints a table of ratios: the peer's time by the engine's, medians of
paired runs. Peers: `autograd`, an ordinary two-layer net (nn.Linear, MSE, backward, SGD) trained by backpropagation;
`fa function`, feedback alignment as usually written, an autograd.Function with its own backward.
"""
import argparse
import datetime
import json
import platform
import statistics
import time
from pathlib import Path

import torch
from torch import nn

from altbp.convergence import train, two_layer
from altbp.data import atomic

N, D = 50, 150
ETA = {"identity": 1e-3 / 25, "relu": 1e-2 / 25, "tanh": 1e-1 / 25}
PSI = {"identity": lambda z: z, "relu": torch.relu, "tanh": torch.tanh}


class Feedback(torch.autograd.Function):
    """A linear layer whose input gradient goes through fixed weights."""

    @staticmethod
    def forward(ctx, h, weight, feedback):
        ctx.save_for_backward(h, feedback)
        return h @ weight.T

    @staticmethod
    def backward(ctx, g):
        h, feedback = ctx.saved_tensors
        return g @ feedback, g.T @ h, None


def peer(net, X, y, rule):
    """Return a function that makes `steps` steps with torch's layers, autograd and optimiser."""
    first, last = nn.Linear(D, len(net.b), bias=False), nn.Linear(len(net.b), 1, bias=False)
    first, last, scale = first.to(X.dtype), last.to(X.dtype), len(net.b) ** -0.5
    with torch.no_grad():
        first.weight.copy_(net.W)
        last.weight.copy_(net.beta[None])
    sgd = torch.optim.SGD([*first.parameters(), *last.parameters()], lr=ETA[net.activation] * N / 2)
    B, target = net.b[None].clone(), y[:, None]

    def run(steps):
        for _ in range(steps):
            h = PSI[net.activation](first(X))
            out = (last(h) if rule == "bp" else Feedback.apply(h, last.weight, B)) * scale
            sgd.zero_grad()
            nn.functional.mse_loss(out, target).backward()
            sgd.step()
        return first.weight, last.weight[0]
    return run


def seconds(f, steps):
    start = time.process_time()
    f(steps)
    return (time.process_time() - start) / steps


def case(activation, p, dtype, engine, steps, rounds):
    """Return medians in milliseconds, and median ratios of paired runs."""
    gen = torch.Generator().manual_seed(0)
    net = two_layer(D, p, activation, dtype, gen)
    X = torch.randn(N, D, dtype=dtype, generator=gen)
    y = two_layer(D, p, activation, dtype, gen)(X)
    go = lambda k: train(net, X, y, ETA[activation], k, engine=engine)
    agree = (peer(net, X, y, "fa")(20)[0] - go(20).net.W).abs().max().item()  # the same dynamics
    assert agree < (1e-4 if dtype == torch.float32 else 1e-11), agree
    peers = {"autograd": peer(net, X, y, "bp"), "fa function": peer(net, X, y, "fa")}
    for f in (go, *peers.values()):
        f(5)
    mine = 50 * steps if engine == "reduced" else steps
    rows = [dict(engine=seconds(go, mine), **{k: seconds(f, steps) for k, f in peers.items()}) for _ in range(rounds)]
    median = {k: 1e3 * statistics.median(r[k] for r in rows) for k in rows[0]}
    ratio = {k: statistics.median(r[k] / r["engine"] for r in rows) for k in peers}
    return dict(activation=activation, p=p, dtype=str(dtype).split(".")[1], engine=engine, ms=median, ratio=ratio)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--out", default=str(Path(__file__).parent.parent / "nbs/results/bench-convergence.json"))
    a = parser.parse_args()
    torch.set_num_threads(1)
    print(f"{'net':>10} {'p':>6} {'dtype':>8} {'engine':>8} {'ms/step':>9} {'autograd':>9} {'fa function':>12}")
    cases = [("relu", 200, torch.float32, "gram"), ("relu", 3200, torch.float32, "gram"),
             ("tanh", 3200, torch.float32, "gram"), ("relu", 3200, torch.float64, "gram"),
             ("tanh", 3200, torch.float64, "gram"), ("relu", 3200, torch.float32, "full"),
             ("identity", 3200, torch.float32, "reduced"),
             ("identity", 12800, torch.float32, "reduced")]
    rows = []
    for activation, p, dtype, engine in cases:
        r = case(activation, p, dtype, engine, a.steps, a.rounds)
        rows.append(r)
        print(f"{activation:>10} {p:>6} {r['dtype']:>8} {engine:>8} {r['ms']['engine']:>9.3f} "
              f"{r['ratio']['autograd']:>8.1f}x {r['ratio']['fa function']:>11.1f}x", flush=True)
    record = dict(n=N, d=D, rounds=a.rounds, steps=a.steps, threads=1, torch=torch.__version__,
                  machine=platform.machine(), date=datetime.date.today().isoformat(), rows=rows)
    with atomic(a.out) as temp:
        temp.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
