"""Step times of the engines of altbp.convergence beside ordinary two-layer nets of torch's layers.

n = 50 examples of d = 150 numbers. Peers in the same rounds: `autograd`, nn.Linear, MSE, backward pass and SGD; `fa function`,
feedback alignment as usually written, an autograd.Function with its own backward pass.
"""
import numpy as np
import torch
from torch import nn

from altbp.convergence import train, two_layer
from common import Task, main

N, D = 50, 150
ETA = {"identity": 1e-3 / 25, "relu": 1e-2 / 25, "tanh": 1e-1 / 25}
PSI = {"identity": lambda z: z, "relu": torch.relu, "tanh": torch.tanh}
CASES = [("relu", 200, "float32", "gram"), ("relu", 3200, "float32", "gram"), ("tanh", 3200, "float32", "gram"),
         ("relu", 3200, "float64", "gram"), ("tanh", 3200, "float64", "gram"), ("relu", 3200, "float32", "full"),
         ("identity", 3200, "float32", "reduced"), ("identity", 12800, "float32", "reduced")]
STEPS = 50  # of every call; fifty times as many of the reduced engine, whose steps are short
SECONDS = 20  # for the largest network and all steps of the paper: p = 12,800, 40,000 steps


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
    first, last = nn.Linear(X.shape[1], len(net.b), bias=False), nn.Linear(len(net.b), 1, bias=False)
    first, last, scale = first.to(X), last.to(X), len(net.b) ** -0.5
    with torch.no_grad():
        first.weight.copy_(net.W)
        last.weight.copy_(net.beta[None])
    sgd = torch.optim.SGD([*first.parameters(), *last.parameters()], lr=ETA[net.activation] * len(X) / 2)
    B, target = net.b[None].clone(), y[:, None]

    def run(steps=STEPS):
        for _ in range(steps):
            h = PSI[net.activation](first(X))
            out = (last(h) if rule == "bp" else Feedback.apply(h, last.weight, B)) * scale
            sgd.zero_grad()
            nn.functional.mse_loss(out, target).backward()
            sgd.step()
        return first.weight

    return run


def problem(activation, p, dtype, device="cpu", n=N, d=D):
    """A net, inputs and targets."""
    gen = torch.Generator().manual_seed(0)
    draw = lambda: two_layer(d, p, activation, dtype, gen)
    net, X, teacher = draw(), torch.randn(n, d, dtype=dtype, generator=gen), draw()
    y = teacher(X)
    net.W, net.beta, net.b = (t.to(device) for t in (net.W, net.beta, net.b))
    return net, X.to(device), y.to(device)


def engines(activation, p, dtype, device, engine):
    """The engine and its peers, which make the same steps."""
    net, X, y = problem(activation, p, dtype, device)
    go = lambda steps=STEPS: train(net, X, y, ETA[activation], steps, engine=engine).net.W
    peers = {"autograd": peer(net, X, y, "bp"), "fa function": peer(net, X, y, "fa")}
    error = (peer(net, X, y, "fa")(20) - go(20)).abs().max().item()
    assert error < (1e-4 if dtype == torch.float32 else 1e-11), f"the engine and its peer part by {error}"
    return {"engine": lambda: go(50 * STEPS if engine == "reduced" else STEPS), **peers}


def longest(rounds):
    """The paper's largest network, for as long as its authors trained it."""
    net, X, y = problem("identity", 12800, torch.float32)
    go = lambda: train(net, X, y, ETA["identity"], 40_000, 25 * 0.3, engine="reduced")
    task = Task({"reduced engine": go}, "reduced engine", min(rounds, 3))
    task.limit("reduced engine, p = 12,800, 40,000 steps: seconds", task.times["reduced engine"], "<=", SECONDS)
    return task


def kernels(rounds):
    """Why the engines compute tanh by the logistic function, and the reduced engine's products with NumPy."""
    z, matrix, vector = torch.randn(N, 3200), torch.randn(2 * N, N, dtype=torch.float64), torch.randn(N, dtype=torch.float64)
    a, b = matrix.numpy(), vector.numpy()
    often = lambda call: lambda: [call() for _ in range(100)]
    both = [("tanh of 50 × 3200 numbers", "torch.tanh", lambda: torch.tanh(z),
             "by the logistic function", lambda: (2 * z).sigmoid_().mul_(2).sub_(1)),
            ("matrix of 100 × 50 times vector", "torch", lambda: matrix @ vector, "NumPy", lambda: np.matmul(a, b))]
    for what, name, call, other, instead in both:
        yield what, Task({name: often(call), other: often(instead)}, name, rounds, per={name: 100, other: 100})


def measure(run):
    for activation, p, kind, engine in CASES[:1] if run.quick else CASES:
        if run.device != "cpu" and engine == "reduced":
            continue  # it works with NumPy
        calls = engines(activation, p, getattr(torch, kind), run.device, engine)
        per = dict.fromkeys(calls, STEPS) | ({"engine": 50 * STEPS} if engine == "reduced" else {})
        task = Task(calls, "engine", run.rounds, run.device, per=per,
                    activation=activation, p=p, dtype=kind, engine=engine)
        if engine == "gram" and p == 3200 and run.limits:
            task.limit(f"autograd over the Gram engine, {activation}, p = {p}, {kind}",
                       task.ratios("autograd", "engine"), ">=", 4)
        yield f"{engine} engine, {activation}, p = {p}, {kind}", task
    if run.device == "cpu":
        if not run.quick:
            yield "the longest run of the paper", longest(run.rounds)
        yield from kernels(run.rounds)


if __name__ == "__main__":
    main(measure, __doc__, rounds=9)
