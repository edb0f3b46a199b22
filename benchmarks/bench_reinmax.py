"""Time and memory of the estimators of altbp.reinmax and its family beside PyTorch's and the package `reinmax`.

A call is the forward and the backward pass of the estimator alone. Gumbel-Rao takes its turn in every tenth round only.
"""
import math
from functools import partial

import torch
import torch.nn.functional as F

from altbp.backprop import saved_bytes
from altbp.reinmax import reinmax, st
from altbp.reinmax_family import gapped_st, gumbel_rao, st_gumbel_softmax
from common import Peer, Task, main, middle

SHAPES = [(64, 128, 2), (100, 4, 8), (100, 30, 10), (512, 128, 2), (64, 32, 1024), (4096, 64)]
LIMITS = {(64, 128, 2): 1.3, (100, 4, 8): 1.3}  # the package's time over ours; elsewhere 1
PEERS = [Peer("reinmax", "reinmax")]


def gumbel_rao_by_autograd(logits, tau=0.5, k=100):
    """Gumbel-Rao as it is usually written: autograd keeps all k relaxed samples."""
    pi = logits.softmax(-1)
    index = torch.multinomial(pi.detach().reshape(-1, pi.shape[-1]), 1).reshape(*pi.shape[:-1], 1)
    noise = torch.empty(*pi.shape[:-1], k, pi.shape[-1], device=pi.device).exponential_().clamp_min(1e-30)
    won = index[..., None, :].expand(*index.shape[:-1], k, 1)
    first = noise.gather(-1, won)
    z = -(noise / pi.detach()[..., None, :] + first).log()
    z = z.scatter(-1, won, -first.log())
    wide = logits[..., None, :]
    soft = ((z - wide.detach() + wide) / tau).softmax(-1).mean(-2)
    return F.one_hot(index[..., 0], pi.shape[-1]) - soft.detach() + soft


def st_by_hand(logits):
    """Straight-through in three lines of plain PyTorch."""
    pi = logits.softmax(-1)
    index = torch.multinomial(pi.detach().reshape(-1, pi.shape[-1]), 1).reshape(pi.shape[:-1])
    return F.one_hot(index, pi.shape[-1]) - pi.detach() + pi


def samplers(shape, package=None):
    """Return name -> sampler for a shape."""
    out = {"st": st, "reinmax": reinmax, "reinmax tau=1.3": partial(reinmax, tau=1.3),
           "stgs": partial(st_gumbel_softmax, tau=0.5), "gst": gapped_st,
           "st, plain PyTorch": st_by_hand, "stgs, torch": partial(F.gumbel_softmax, tau=0.5, hard=True)}
    if math.prod(shape) <= 65536:
        out["gr k=100"] = partial(gumbel_rao, tau=0.5, k=100)
        out["gr k=100, autograd"] = gumbel_rao_by_autograd
    if package:
        out["reinmax package"] = lambda x: package.reinmax(x, 1.0)[0]
        out["reinmax package tau=1.3"] = lambda x: package.reinmax(x, 1.3)[0]
    return out


def judge(task, what, least):
    """Hold time and memory at τ = 1 against the package's."""
    rows = task["rows"]
    task.limit(f"the package's time over ours, {what}", task.ratios("reinmax package", "reinmax"), ">=", least)
    task.limit(f"our kept bytes over the package's, {what}",
               rows["reinmax"]["saved_bytes"] / rows["reinmax package"]["saved_bytes"], "<=", 1)


def measure(run):
    for shape in SHAPES[1:2] if run.quick else SHAPES:
        generator = torch.Generator().manual_seed(0)
        logits, g = (torch.randn(shape, generator=generator).to(run.device) for _ in range(2))
        logits.requires_grad_()
        draws = samplers(shape, run.peers["reinmax"])
        calls = {k: lambda f=f: torch.autograd.grad(f(logits), logits, g) for k, f in draws.items()}
        every = {name: 10 for name in calls if name.startswith("gr")}
        task = Task(calls, "st", run.rounds, run.device, every=every, shape=list(shape))
        for name, f in draws.items():
            task["rows"][name]["saved_bytes"] = saved_bytes(lambda: f(logits), exclude=[logits])
            task["rows"][name]["to_reinmax"] = middle(task.ratios(name, "reinmax"))[0]
        name = "×".join(map(str, shape))
        if run.limits and "reinmax package" in calls:
            judge(task, name, LIMITS.get(shape, 1.0))
        yield name, task


if __name__ == "__main__":
    main(measure, __doc__, rounds=60, peers=PEERS)
