"""Time and memory of stochastic backpropagation beside what else saves memory.

First one MLP branch by keep ratio; then training steps of whole networks of timm, where every method is set to keep no more
bytes than SBP at r = 1/2; then checkpointing and token dropping beside timm's own. With a GPU also its peak allocation and
times per image under bfloat16 autocast.
"""
import copy
from functools import partial

import torch
import torch.nn.functional as F
from torch import nn

from altbp.backprop import saved_bytes
from altbp.stochastic_backprop import grid_mask, keep_set, sbp_apply
from altbp.stochastic_backprop_costs import SHAPES, bytes_per_example, cifar_network, timm_network
from altbp.stochastic_backprop_practice import apply_sbp, checkpoint_blocks, drop_tokens, paper_plan
from altbp.training import seeded
from common import Peer, Task, main

BRANCHES = {"ViT-Tiny": (8, (14, 14), 192), "ConvNeXt-Tiny, stage 1": (4, (28, 28), 96)}  # batch, positions, channels
RATIOS = {str(r): r for r in (0.75, 0.5, 0.25, 0.125)}
LIMIT = 0.85  # of a branch at r = 1/2
NETWORKS = {"ViT-Tiny": 4, "ConvNeXt-Tiny": 2}  # batch
SMALL = {"vit": 4, "convnext": 2}  # of `cifar_network`, to try the script
PEERS = [Peer("timm", "timm")]


def branch(batch, size, channels, rounds, device, ratios=RATIOS, **about):
    """Forward and backward pass of LN, Linear, GELU, Linear under keep ratios, with the count of multiplications."""
    fn = nn.Sequential(nn.LayerNorm(channels), nn.Linear(channels, 4 * channels), nn.GELU(),
                       nn.Linear(4 * channels, channels)).to(device)
    x = torch.randn(batch, size[0] * size[1], channels, device=device, requires_grad=True)
    g, forwards = torch.randn_like(x), {"dense": lambda: fn(x)}
    for name, r in ratios.items():
        forwards[name] = lambda ks=keep_set(grid_mask(size, r, start=0)).to(device): sbp_apply(fn, x, ks)
    task = Task({k: lambda f=f: f().backward(g) for k, f in forwards.items()}, "dense", rounds, device, **about)
    for name, forward in forwards.items():
        r = ratios.get(name, 1.0)
        task["rows"][name] |= dict(saved_bytes=saved_bytes(forward, exclude=fn.parameters()), arithmetic=(1 + 2 * r) / 3)
    return task


def fewest(apply, options, size, budget):
    """Return the first of the options whose bytes fit the budget, in the given order, and its bytes."""
    for o in options:
        with apply(o):
            kept = size()
        if kept <= budget:
            return o, kept
    raise RuntimeError(f"no option keeps {budget} bytes")


def contenders(model, x):
    """Return name -> (setting, bytes per image, function of a model that applies it or None, images), at equal memory."""
    size = lambda: bytes_per_example(model, x[:2], list(model.parameters()))
    blocks = [n for n in paper_plan(model) if not n.endswith("downsample")]
    vit = hasattr(model, "cls_token")
    rows = {"dense": ("", size(), None, len(x))}
    for name, options in {"SBP": {}, "SBP, recompute": dict(impl="recompute"), "SBP, qkv": dict(mode="qkv")}.items():
        if vit or "qkv" not in name:
            with apply_sbp(model, **options):
                rows[name] = ("r = 0.5", size(), partial(apply_sbp, **options), len(x))
    dense, budget = rows["dense"][1], rows["SBP"][1]
    some = lambda k: lambda model: checkpoint_blocks(model, dict.fromkeys(blocks[:k], "block"))
    k, kept = fewest(lambda k: some(k)(model), range(1, len(blocks) + 1), size, budget)
    rows["checkpointing"] = (f"{k} blocks", kept, some(k), len(x))
    for name, at in (("PatchDropout", 0), ("token deletion", len(blocks) // 2)) if vit else ():
        r, kept = fewest(lambda r: drop_tokens(model, r, at), [i / 20 for i in range(19, 0, -1)], size, budget)
        rows[name] = (f"r = {r:g}, block {at}", kept, partial(drop_tokens, keep_ratio=r, at=at), len(x))
    small = max(1, int(len(x) * budget / dense))
    rows["smaller batch"] = (f"{small} of {len(x)} images", dense * small / len(x), None, small)
    return rows


def step(model, x, dtype=None):
    """Make one training step's forward and backward pass."""
    with torch.autocast(x.device.type, dtype or torch.bfloat16, enabled=dtype is not None):
        loss = F.cross_entropy(model(x), torch.arange(len(x), device=x.device) % 10)
    loss.backward()
    model.zero_grad(set_to_none=True)


def applied(model, apply):
    """Return a copy of the model with a method applied."""
    model = copy.deepcopy(model)
    if apply:
        apply(model)
    return model


def equal_memory(model, x, rounds):
    """Training steps at equal memory, per image."""
    rows = contenders(model, x)
    steps = {name: partial(step, applied(model, apply), x[:images]) for name, (_, _, apply, images) in rows.items()}
    task = Task(steps, "dense", rounds, per={name: row[3] for name, row in rows.items()}, batch=len(x))
    for name, (setting, kept, _, _) in rows.items():
        task["rows"][name] |= dict(setting=setting, saved_bytes=kept, memory=kept / rows["dense"][1])
    return task


def beside_timm(timm, x, rounds):
    """All blocks checkpointed, and half of the patches dropped: by timm and by altbp."""
    make = lambda **options: seeded(partial(timm.create_model, SHAPES["ViT-Tiny"], **options), 0).train()
    models = {"dense": make(), "timm's checkpointing": make(), "our checkpointing": make(),
              "timm's PatchDropout": make(patch_drop_rate=0.5), "our PatchDropout": make()}
    models["timm's checkpointing"].set_grad_checkpointing()
    checkpoint_blocks(models["our checkpointing"], {"blocks.*": "block"})
    drop_tokens(models["our PatchDropout"], 0.5)
    task = Task({k: partial(step, m, x) for k, m in models.items()}, "dense", rounds, per=dict.fromkeys(models, len(x)))
    for name, m in models.items():
        task["rows"][name]["saved_bytes"] = bytes_per_example(m, x[:2], list(m.parameters()))
    return task


def under_autocast(model, x, rounds, device):
    """Training steps under bfloat16 autocast, per image; on a GPU with their peak allocation."""
    methods = {"dense": None, "SBP": apply_sbp, "SBP, recompute": partial(apply_sbp, impl="recompute"),
               "checkpointing": checkpoint_blocks}
    if hasattr(model, "cls_token"):
        methods |= {"SBP, qkv": partial(apply_sbp, mode="qkv"), "PatchDropout": drop_tokens}
    steps = {name: partial(step, applied(model, apply), x, torch.bfloat16) for name, apply in methods.items()}
    return Task(steps, "dense", rounds, device, per=dict.fromkeys(steps, len(x)), batch=len(x))


def measure(run):
    for name, (batch, size, channels) in list(BRANCHES.items())[: 1 if run.quick else None]:
        task = branch(batch, size, channels, run.rounds, run.device)
        if run.limits:
            task.limit(f"branch at r = 1/2 over dense, {name}", task.ratios("0.5", "dense"), "<=", LIMIT)
        yield f"MLP branch, {name}", task
    make, networks, side = (cifar_network, SMALL, 32) if run.quick else (timm_network, NETWORKS, 224)
    if not run.quick and run.peers["timm"] is None:
        return
    for name, batch in networks.items():
        model = seeded(partial(make, name), 0, run.device).train()
        if run.device == "cpu":
            yield f"equal memory, {name}", equal_memory(model, torch.randn(batch, 3, side, side), run.rounds)
        if run.device != "cpu" or run.quick:
            x = torch.randn(batch if run.quick else 64, 3, side, side, device=run.device)
            yield f"bfloat16, {name}", under_autocast(model, x, run.rounds, run.device)
    if run.device == "cpu" and run.peers["timm"] and not run.quick:
        yield "beside timm, ViT-Tiny", beside_timm(run.peers["timm"], torch.randn(4, 3, 224, 224), run.rounds)


if __name__ == "__main__":
    main(measure, __doc__, rounds=9, peers=PEERS)
