"""Step times of the rules of altbp.target_prop beside backpropagation's.

The network is the paper's: 784 units in the input, four hidden layers and the output, batches of 60. Steps write the
gradients; those with a penalty add the orthogonality penalty's and make a step of Adam. Autograd's own step shows that
the reference is a fair one. The limits in milliseconds are a quarter and a fifth of what the authors' own script took elsewhere.
"""
import warnings

import torch
from torch import nn

from altbp.target_prop import InvertibleMLP, assign_gradients, convert
from common import Task, main

LIMITS = {"float64": {"gait difference": 90, "gait difference, penalty, Adam": 350},
          "float32": {"gait difference": 50, "gait difference, penalty, Adam": 170}}  # milliseconds
STEPS = {"bp": dict(rule="bp"), "gait difference": {}, "gait limit": dict(form="limit"), "gait central": dict(form="central"),
         "gait literal": dict(form="literal"), "gait adaptive": dict(form="adaptive"), "itp": dict(rule="itp"),
         "bp, penalty, Adam": dict(rule="bp", penalty=0.1), "gait difference, penalty, Adam": dict(penalty=0.1),
         "gait difference, penalty on all layers, Adam": dict(penalty=0.1, penalise_from=1)}


def stepper(x, y, options, hidden=4):
    """A call that writes the gradients of one of the rules."""
    model = InvertibleMLP.square(x.shape[1], hidden, 10, generator=torch.Generator().manual_seed(0), dtype=x.dtype).to(x.device)
    adam = torch.optim.Adam(model.parameters(), lr=1e-4)

    def step():
        model.zero_grad()
        assign_gradients(model, x, y, **options)
        if "penalty" in options:
            adam.step()

    return step


def autograd_stepper(net, x, y):
    """The same loss through a network of torch's layers."""
    with torch.no_grad():
        for layer in net[::2]:
            nn.init.orthogonal_(layer.weight)
    target = nn.functional.one_hot(y, 10).to(x.dtype)

    def step():
        net.zero_grad()
        (((net(x)[:, :10] - target) ** 2).sum(1).mean() / 2).backward()

    return step


def steppers(dtype, device, width=784):
    """Every step on a network of its own and the same batch."""
    x, y = torch.rand(60, width, device=device).to(dtype), torch.randint(10, (60,), device=device)
    steps = {name: stepper(x, y, options) for name, options in STEPS.items()}
    net = nn.Sequential(*[m for _ in range(5) for m in (nn.Linear(width, width), nn.LeakyReLU(0.1))]).to(device, dtype)
    steps["autograd"] = autograd_stepper(net, x, y)
    steps["autograd, inverse feedback"] = autograd_stepper(convert(net, skip=["0"]), x, y)
    return steps


def measure(run):
    warnings.simplefilter("ignore")  # the literal form announces its rounding noise
    for name, limits in LIMITS.items():
        calls = steppers(getattr(torch, name), run.device, 64 if run.quick else 784)
        task = Task(calls, "bp", run.rounds, run.device)
        for step, bound in limits.items() if run.limits else ():
            task.limit(f"{step}, {name}: milliseconds", [1e3 * t for t in task.times[step]], "<=", bound)
        yield name, task


if __name__ == "__main__":
    main(measure, __doc__, rounds=15)
