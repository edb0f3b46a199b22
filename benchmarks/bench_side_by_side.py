"""Step times of every rule of altbp.side_by_side beside backpropagation's on the same network.

A step is the rule's gradients on a batch of 64 and SGD with momentum. On the network with a discrete layer the reference is
straight-through. Bytes are those kept until the backward pass.
"""
import torch

from altbp.side_by_side import CASES, OPTIMISERS, kept_bytes, ready
from common import Task, main

INPUTS = {"digits": {"square": (64,), "tanh": (64,), "pixel": (1, 8, 8), "choice": (64,)},
          "images": {"square": (196,), "tanh": (196,), "pixel": (3, 32, 32)}}


def stepper(setup, x, y):
    """A call that makes one step of SGD with momentum."""
    sgd = OPTIMISERS["sgd"](setup.parameters, lr=1e-4)
    if setup.follow:
        setup.follow(sgd)

    def step():
        sgd.zero_grad()
        setup.gradients(setup.model, x, y)
        sgd.step()

    return step


def measure(run):
    """Yield a task for each network and input size."""
    for data, shapes in INPUTS.items():
        for network, shape in shapes.items():
            x, y = torch.rand(64, *shape, device=run.device), torch.randint(10, (64,), device=run.device)
            setups = {rule: ready(rule, network, x, device=run.device) for rule in CASES[network]}
            task = Task({rule: stepper(setup, x, y) for rule, setup in setups.items()},
                        "st" if network == "choice" else "bp", run.rounds, run.device)
            for rule, row in task["rows"].items():
                row["saved_bytes"] = kept_bytes(setups[rule], x, y)["step"]
            yield f"{data}-{network}", task


if __name__ == "__main__":
    main(measure, __doc__, rounds=40)
