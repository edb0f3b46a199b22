"""How the costs grow: with width, depth, batch, categories, keep ratio, width of a two-layer net, and number of features.

Beside every measured ratio stands the ratio of the operations (multiplications and additions), counted by torch or by hand: what
the method could cost if operations were all that took time. A curve is a list of tasks with the same `curve` and growing `x`.
"""
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import bench_convergence
import bench_parallel_backprop
import bench_stochastic_backprop
import bench_target_prop
from altbp.backprop import saved_bytes
from altbp.convergence import train
from altbp.feedback_alignment import convert
from altbp.reinmax import reinmax, st
from common import Peer, Task, main

PEERS = [Peer("reinmax", "reinmax")]


def flops(call):
    """Return the multiplications and additions of a call's products and convolutions."""
    with FlopCounterMode(display=False) as counter:
        call()
    return counter.get_total_flops()


def counted(calls, reference, run, counts=None, rounds=None, **about):
    """Time a point of a curve; put the ratio of operations beside the ratio of times."""
    counts = counts or {name: flops(call) for name, call in calls.items()}
    task = Task(calls, reference, rounds or run.rounds, run.device, **about)
    for name in calls:
        task["rows"][name]["arithmetic"] = counts[name] / counts[reference]
    return task


def rules(run, width, hidden, batch=128):
    """Gradients of a ReLU net by backpropagation, feedback alignment and direct feedback alignment."""
    x, y = torch.randn(batch, width, device=run.device), torch.randint(10, (batch,), device=run.device)

    def gradients(rule):
        net = nn.Sequential(*[m for _ in range(hidden) for m in (nn.Linear(width, width), nn.ReLU())], nn.Linear(width, 10))
        net = net.to(run.device) if rule == "bp" else convert(net.to(run.device), rule, generator=0, example=x)

        def call():
            net.zero_grad()
            F.cross_entropy(net(x), y).backward()

        return call

    return {rule: gradients(rule) for rule in ("bp", "fa", "dfa")}


def width_and_depth(run):
    for width in (64,) if run.quick else (128, 256, 512, 1024, 2048):
        yield counted(rules(run, width, 4), "bp", run, curve="width", x=width)
    for hidden in (2,) if run.quick else (1, 2, 4, 8, 16, 32):
        yield counted(rules(run, 64 if run.quick else 512, hidden), "bp", run, curve="hidden layers", x=hidden)


def batch(run, n=512, layers=5):
    """GAIT-prop factorises every matrix but the first, whatever the batch."""
    n = 64 if run.quick else n
    for B in (16,) if run.quick else (16, 32, 64, 128, 256, 512, 1024):
        x, y = torch.rand(B, n, device=run.device), torch.randint(10, (B,), device=run.device)
        calls = {name: bench_target_prop.stepper(x, y, bench_target_prop.STEPS[name]) for name in ("bp", "gait difference")}
        products, factors = (3 * layers - 1) * 2 * n**2 * B, (layers - 1) * 2 * n**3 / 3
        counts = {"bp": products, "gait difference": products + factors}
        yield counted(calls, "bp", run, counts, curve="batch", x=B, n=n)


def categories(run):
    """Estimators beside a softmax's own forward and backward pass, which none can do without."""
    package = run.peers["reinmax"]
    samplers = {"softmax": lambda x: x.softmax(-1), "st": st, "reinmax": reinmax, "reinmax tau=1.3": lambda x: reinmax(x, tau=1.3)}
    samplers |= {"reinmax package": lambda x: package.reinmax(x, 1.0)[0]} if package else {}
    for N in (2,) if run.quick else (2, 8, 32, 128, 512, 2048):
        logits, g = torch.randn(2, 2048, N, device=run.device).unbind()
        logits.requires_grad_()
        calls = {k: lambda f=f: torch.autograd.grad(f(logits), logits, g) for k, f in samplers.items()}
        task = Task(calls, "softmax", run.rounds, run.device, curve="categories", x=N, latents=len(logits))
        for name, f in samplers.items():
            task["rows"][name]["saved_bytes"] = saved_bytes(lambda: f(logits), exclude=[logits])
        yield task


def keep_ratio(run):
    for r in (0.5,) if run.quick else (0.0625, 0.125, 0.25, 0.5, 0.75, 0.875):
        yield bench_stochastic_backprop.branch(8, (14, 14), 192, run.rounds, run.device, {"SBP": r}, curve="keep ratio", x=r)


def engines(run, n=50, d=150):
    """Steps of the linear two-layer net; the reduced engine's are many, as each is short."""
    for p in (100,) if run.quick else (200, 800, 3200, 12800):
        net, X, y = bench_convergence.problem("identity", p, torch.float32, run.device)
        steps = {"autograd": 50, "full": 50, "gram": 50} | ({"reduced": 2500} if run.device == "cpu" else {})
        calls = {e: lambda e=e: train(net, X, y, 1e-3 / 25, steps[e], engine=e) for e in steps if e != "autograd"}
        calls["autograd"] = lambda plain=bench_convergence.peer(net, X, y, "bp"): plain(steps["autograd"])
        counts = {"autograd": 4 * n * p * d + 4 * n * p, "full": 6 * n * p * d + 6 * n * p,
                  "gram": 2 * n**2 * p + 4 * n * p, "reduced": 4 * n**2}
        yield counted(calls, "autograd", run, counts, per=steps, curve="p", x=p)


def features(run):
    """Maps of a pair of images. The way back to the image takes as many multiplications as the way there."""
    for c in (8,) if run.quick else (16, 64, 256):
        calls = bench_parallel_backprop.ways(c, run.device)
        calls = {k: calls[k] for k in ("loop", "all features", "norms known", "cam")}
        passes = {"loop": 2 * c + 1, "all features": c + 2, "norms known": 3, "cam": 2}  # of an image, there or back
        yield counted(calls, "loop", run, passes, run.rounds if c < 256 else -(-run.rounds // 3), curve="features", x=c)


def measure(run):
    for curve in (width_and_depth, batch, categories, keep_ratio, engines, features):
        for task in curve(run):
            yield f"{task['curve']} {task['x']}", task


if __name__ == "__main__":
    main(measure, __doc__, rounds=7, peers=PEERS)
