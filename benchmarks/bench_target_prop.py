"""Step times of the rules of altbp.target_prop as ratios to backpropagation.

One process and one thread; all steps take turns, round by round, and each ratio is the median over these rounds of
a step's CPU time divided by backpropagation's in the same round. The network is the paper's: 784 units in the
input, four hidden layers and the output, batches of 60. `rule` steps write the gradients, `step` ones add the
orthogonality penalty and Adam. Autograd's own step shows that the reference is a fair one.

    python benchmarks/bench_target_prop.py [--rounds 15] [--out FILE]
"""
import argparse
import json
import platform
import statistics
import time
import warnings
from pathlib import Path

import torch
from torch import nn

from altbp.target_prop import InvertibleMLP, assign_gradients, convert
from interleave import interleaved

SECONDS = {"float64": {"gait difference": 0.09, "gait difference, penalty, Adam": 0.35},
           "float32": {"gait difference": 0.05, "gait difference, penalty, Adam": 0.17}}
STEPS = {"bp": dict(rule="bp"), "gait difference": {}, "gait limit": dict(form="limit"), "gait central": dict(form="central"),
         "gait literal": dict(form="literal"), "gait adaptive": dict(form="adaptive"), "itp": dict(rule="itp")}


def steppers(dtype):
    """Every step on a network and batch of its own kind, backpropagation first."""
    x, y = torch.rand(60, 784).to(dtype), torch.randint(10, (60,))
    steps = {}

    def add(name, penalty=0.0, **options):
        model = InvertibleMLP.square(784, 4, 10, generator=torch.Generator().manual_seed(0), dtype=dtype)
        adam = torch.optim.Adam(model.parameters(), lr=1e-4)

        def step():
            model.zero_grad()
            assign_gradients(model, x, y, penalty=penalty, **options)
            if penalty:
                adam.step()

        steps[name] = step

    for name, options in STEPS.items():
        add(name, **options)
    add("bp, penalty, Adam", 0.1, rule="bp")
    add("gait difference, penalty, Adam", 0.1)
    add("gait difference, penalty on all layers, Adam", 0.1, penalise_from=1)
    torch_net = nn.Sequential(*[m for _ in range(5) for m in (nn.Linear(784, 784), nn.LeakyReLU(0.1))]).to(dtype)
    for name, net in (("autograd", torch_net), ("autograd, inverse feedback", convert(torch_net, skip=["0"]))):
        with torch.no_grad():
            for layer in net[::2]:
                nn.init.orthogonal_(layer.weight)

        def step(net=net):
            net.zero_grad()
            target = nn.functional.one_hot(y, 10).to(dtype)
            (((net(x)[:, :10] - target) ** 2).sum(1).mean() / 2).backward()

        steps[name] = step
    return steps


def measure(steps, rounds):
    """Median CPU time in ms of every step, and the median of its ratios to backpropagation."""
    times = interleaved(steps, rounds)
    return {name: {"ms": 1e3 * statistics.median(t), "min_ms": 1e3 * min(t),
                   "ratio": statistics.median(a / b for a, b in zip(t, times["bp"]))} for name, t in times.items()}


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--out", type=Path,
                        default=Path(__file__).resolve().parent.parent / "nbs/results/bench-target-prop.json")
    options = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    warnings.simplefilter("ignore")  # the literal form announces its rounding noise
    results = {}
    for dtype in (torch.float64, torch.float32):
        name = str(dtype).removeprefix("torch.")
        results[name] = measure(steppers(dtype), options.rounds)
        print(name)
        for step, m in results[name].items():
            target = SECONDS[name].get(step)
            print(f"  {step:45s} {m['ms']:7.1f} ms  {m['ratio']:5.2f}" + (f"  (target {1e3 * target:.0f} ms)" if target else ""))
    result = {"format": 1, "name": "bench-target-prop", "date": time.strftime("%Y-%m-%d"), "threads": 1,
              "rounds": options.rounds, "torch": torch.__version__, "machine": platform.machine(),
              "network": "784 × (4 + 1), batch 60", "target_seconds": SECONDS, "steps": results}
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
