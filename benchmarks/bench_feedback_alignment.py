"""Step times of the rules of altbp.feedback_alignment beside plain backpropagation's and BioTorch's.

A step is forward pass, backward pass and SGD with momentum. BioTorch (github.com/jsalbert/biotorch) is in no package index.
"""
import contextlib
import io
import warnings

import torch
import torch.nn.functional as F
from torch import nn

from altbp.feedback_alignment import convert, kolen_pollack
from common import Peer, Task, main

LIMITS = {"dfa": 0.92, "fa": 1.10, "usf": 1.12, "frsf": 1.12, "brsf": 1.35}  # on the MLP with batches of 128
RULES = ("fa", "dfa", "usf", "frsf", "brsf", "kp")
BUILDS = 25  # equal nets in other places of memory differ by a few percent
CLOSE = ("fa",)  # do the same products as BioTorch's: these meet alone, four times as often
PEERS = [Peer("BioTorch", "biotorch.module.biomodule")]


def mlp():
    return nn.Sequential(nn.Linear(784, 1000), nn.ReLU(), nn.Linear(1000, 1000), nn.ReLU(), nn.Linear(1000, 10))


def lenet():
    return nn.Sequential(nn.Conv2d(1, 6, 5), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(6, 16, 5), nn.ReLU(),
                         nn.MaxPool2d(2), nn.Flatten(), nn.Linear(400, 120), nn.ReLU(), nn.Linear(120, 84), nn.ReLU(),
                         nn.Linear(84, 10))


TASKS = {"mlp-784-1000-1000-10-batch-128": (mlp, (128, 784)), "mlp-784-1000-1000-10-batch-16": (mlp, (16, 784)),
         "lenet-32x32-batch-64": (lenet, (64, 1, 32, 32))}


def stepper(model, x, y, rule="", more=()):
    """A call that makes one step of SGD with momentum."""
    sgd = torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9)
    if rule == "kp":
        kolen_pollack(model, sgd)

    def step():
        sgd.zero_grad()
        F.cross_entropy(model(x, *more), y).backward()
        sgd.step()

    return step


def biotorch_stepper(biotorch, model, x, y, rule):
    """The same step with BioTorch's layers, which print what they replace."""
    with contextlib.redirect_stdout(io.StringIO()):
        theirs = biotorch.BioModule(model, mode=rule, output_dim=10 if rule == "dfa" else None).to(x.device)
    return stepper(theirs, x, y, more=(y, F.cross_entropy) if rule == "dfa" else ())


def steppers(make, shape, device, biotorch=None):
    """What makes every rule's step, all on the same batch."""
    x, y = torch.randn(shape, device=device), torch.randint(10, shape[:1], device=device)
    net = lambda: make().to(device)
    steps = {"bp": lambda: stepper(net(), x, y)}
    for rule in RULES:
        steps[rule] = lambda rule=rule: stepper(convert(net(), rule, generator=0, example=x), x, y, rule)
        if biotorch and rule != "kp":
            steps[f"{rule} (BioTorch)"] = lambda rule=rule: biotorch_stepper(biotorch, net(), x, y, rule)
    return steps


def measure(run):
    warnings.simplefilter("ignore")  # BioTorch's
    for name, (make, shape) in list(TASKS.items())[1 if run.quick else 0 : 2 if run.quick else None]:
        steps = steppers(make, shape, run.device, run.peers["BioTorch"])
        builds = min(BUILDS, run.rounds)
        task = Task(steps, "bp", run.rounds, run.device, builds=builds)
        for rule in RULES if run.limits else ():
            if rule in LIMITS and name.endswith("batch-128"):
                task.limit(f"{rule} over backpropagation, {name}", task.ratios(rule, "bp"), "<=", LIMITS[rule])
            if rule not in CLOSE and f"{rule} (BioTorch)" in task.times:
                task.limit(f"{rule} over BioTorch's, {name}", task.ratios(rule, f"{rule} (BioTorch)"), "<=", 1.0)
        yield name, task
        for rule in CLOSE if run.limits and run.peers["BioTorch"] else ():
            theirs = f"{rule} (BioTorch)"
            task = Task({k: steps[k] for k in (rule, theirs)}, theirs, 4 * run.rounds, run.device, builds=4 * builds)
            task.limit(f"{rule} over BioTorch's, {name}", task.ratios(rule, theirs), "<=", 1.0)
            yield f"{name}, {rule} and BioTorch's", task


if __name__ == "__main__":
    main(measure, __doc__, rounds=400, peers=PEERS)
