"""Step times of the rules of altbp.feedback_alignment as ratios to plain backpropagation.

One process and one thread; all rules take turns step by step, and each ratio is the median over these rounds of
a rule's CPU time divided by plain backpropagation's in the same round. With a checkout of BioTorch
(github.com/jsalbert/biotorch) its layers take their turns in the same rounds.

    python benchmarks/bench_feedback_alignment.py [--rounds 60] [--biotorch FOLDER] [--out FILE]
"""
import argparse
import contextlib
import io
import json
import platform
import statistics
import sys
import time
import warnings
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

from altbp.feedback_alignment import convert, kolen_pollack
from interleave import interleaved

TARGETS = {"dfa": 0.92, "fa": 1.10, "usf": 1.12, "frsf": 1.12, "brsf": 1.35}  # on the MLP with batches of 128
RULES = ("fa", "dfa", "usf", "frsf", "brsf", "kp")


def mlp():
    return nn.Sequential(nn.Linear(784, 1000), nn.ReLU(), nn.Linear(1000, 1000), nn.ReLU(), nn.Linear(1000, 10))


def lenet():
    return nn.Sequential(nn.Conv2d(1, 6, 5), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(6, 16, 5), nn.ReLU(),
                         nn.MaxPool2d(2), nn.Flatten(), nn.Linear(400, 120), nn.ReLU(), nn.Linear(120, 84), nn.ReLU(),
                         nn.Linear(84, 10))


TASKS = {"mlp-784-1000-1000-10-batch-128": (mlp, (128, 784)), "mlp-784-1000-1000-10-batch-16": (mlp, (16, 784)),
         "lenet-32x32-batch-64": (lenet, (64, 1, 32, 32))}


def stepper(model, x, y, rule="", args=lambda y: ()):
    """A call that makes one step of SGD with momentum."""
    sgd = torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9)
    if rule == "kp":
        kolen_pollack(model, sgd)

    def step():
        sgd.zero_grad()
        F.cross_entropy(model(x, *args(y)), y).backward()
        sgd.step()

    return step


def steppers(make, shape, biotorch):
    """Every rule's step on the same batch, plain backpropagation first."""
    x, y = torch.randn(shape), torch.randint(10, shape[:1])
    steps = {"bp": stepper(make(), x, y)}
    for rule in RULES:
        steps[rule] = stepper(convert(make(), rule, generator=0, example=x), x, y, rule)
        if biotorch and rule != "kp":
            with contextlib.redirect_stdout(io.StringIO()):
                theirs = biotorch(make(), mode=rule, output_dim=10 if rule == "dfa" else None)
            args = (lambda y: (y, F.cross_entropy)) if rule == "dfa" else (lambda y: ())
            steps[f"{rule} (BioTorch)"] = stepper(theirs, x, y, args=args)
    return steps


def measure(steps, rounds):
    """Median CPU time of plain backpropagation in ms, and the median ratio to it of every other step."""
    times = interleaved(steps, rounds, warm_up=5)
    plain = times.pop("bp")
    return 1e3 * statistics.median(plain), {k: statistics.median(a / b for a, b in zip(t, plain)) for k, t in times.items()}


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rounds", type=int, default=60)
    parser.add_argument("--biotorch", type=Path, help="a checkout of BioTorch")
    parser.add_argument("--out", type=Path,
                        default=Path(__file__).resolve().parent.parent / "nbs/results/bench-feedback-alignment.json")
    options = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    biotorch = None
    if options.biotorch:
        sys.path.insert(0, str(options.biotorch))
        from biotorch.module.biomodule import BioModule as biotorch
        warnings.simplefilter("ignore")
    tasks = {}
    for name, (make, shape) in TASKS.items():
        ms, ratios = measure(steppers(make, shape, biotorch), options.rounds)
        tasks[name] = {"bp_ms": ms, "ratios": ratios}
        print(f"{name}: plain backpropagation {ms:.2f} ms")
        for rule, ratio in ratios.items():
            target = TARGETS.get(rule) if "batch-128" in name else None
            print(f"  {rule:18s} {ratio:.2f}" + (f"  (target {target})" if target else ""))
    result = {"format": 1, "name": "bench-feedback-alignment", "date": time.strftime("%Y-%m-%d"), "threads": 1,
              "rounds": options.rounds, "torch": torch.__version__, "machine": platform.machine(),
              "targets": TARGETS, "tasks": tasks}
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
