"""Time per pair of images of parallel backpropagation beside a loop over latent neurons, captum's, and torch.func's Jacobian.

The loop asks for one gradient per latent neuron and image, a forward and a backward pass each, as libraries of single-image
attributions do. All ways down to `norms known` compute the same two maps.
"""
import warnings

import torch
from torch import nn

from altbp.parallel_backprop import combine_maps, feature_norms, parallel_backprop, shared_weights
from altbp.readouts import Latent
from common import Peer, Task, main

LIMIT = 4  # times faster than the loop, at 42 px with 64 features
SIGMA = 2.0
PEERS = [Peer("captum", "captum.attr")]


def net(c, seed=0):
    """The encoder of the planted-parts benchmark, with random weights."""
    torch.manual_seed(seed)
    layers = []
    for i, o, k, stride in ((1, 16, 5, 2), (16, 32, 3, 1), (32, 64, 3, 2), (64, c, 3, 2)):
        layers += [nn.Conv2d(i, o, k, stride, k // 2), nn.BatchNorm2d(o), nn.ReLU()]
    return nn.Sequential(*layers).eval()


def captum_gradients(captum, model):
    """Return x ↦ rows by captum's NeuronGradient."""
    neuron = captum.NeuronGradient(model, model[-1])
    select = [lambda a, i=i: a[:, i].mean((1, 2)) for i in range(model[-3].out_channels)]
    return lambda x: torch.stack([neuron.attribute(x, neuron_selector=s)[0] for s in select])[None]


def loop_gradients(latent, c):
    """Return x ↦ rows by a forward and a backward pass per feature."""
    def rows(x):
        out = []
        for i in range(c):
            leaf = x.clone().requires_grad_()
            out.append(torch.autograd.grad(latent(leaf)[0, i], leaf)[0][0])
        return torch.stack(out)[None]
    return rows


def ways(c, device, captum=None, size=42):
    """Every way to explain one pair, as a call without arguments that returns two maps."""
    model = net(c).to(device)
    latent = Latent(model)
    g = torch.Generator().manual_seed(1)
    x, z = torch.rand(2, 1, size, size, generator=g).to(device)[:, None].unbind()
    w = torch.randn(c, generator=g).to(device)
    sparse = torch.where(torch.arange(c, device=device) % 8 == 0, w, torch.zeros((), device=device))
    norms = tuple(feature_norms(latent, i, sigma=SIGMA) for i in (x, z))
    jacobian = torch.func.jacrev(latent)

    def from_rows(rows):
        with torch.no_grad():
            beta = shared_weights(latent(x), latent(z), w)
        return [combine_maps(rows(i), beta, sigma=SIGMA) for i in (x, z)]

    def ours(w=w, **options):
        maps = parallel_backprop(latent, x, z, w, sigma=SIGMA, **options)
        return maps.map_out, maps.map_in

    out = {"loop": lambda: from_rows(loop_gradients(latent, c))}
    if captum:
        out["captum NeuronGradient"] = lambda: from_rows(captum_gradients(captum, model))
    return out | {"torch.func.jacrev": lambda: from_rows(lambda i: jacobian(i)[:, :, 0].detach()),
                  "all features": ours, "norms known": lambda: ours(norms=norms),
                  "one weight in eight": lambda: ours(sparse),
                  "hutchinson, 100 probes": lambda: ours(norms="hutchinson", n_probe=100),
                  "cam": lambda: ours(backbone="cam")}


def same_maps(calls):
    """Raise unless all ways down to `norms known` agree."""
    names = list(calls)
    want = calls["loop"]()
    for name in names[1 : names.index("norms known") + 1]:
        error = max((a - b).abs().max().item() for a, b in zip(want, calls[name]()))
        assert error < 1e-5, f"{name} differs from the loop by {error}"


def measure(run):
    warnings.simplefilter("ignore")  # captum's, on requires_grad
    for c in (8,) if run.quick else (64, 256):
        calls = ways(c, run.device, run.peers["captum"])
        same_maps(calls)
        task = Task(calls, "loop", run.rounds if c <= 64 else -(-run.rounds // 3), run.device)
        if run.limits and c == 64:
            task.limit("loop over all features, 42 px, 64 features", task.ratios("loop", "all features"), ">=", LIMIT)
        yield f"42px-c{c}", task


if __name__ == "__main__":
    main(measure, __doc__, rounds=31, peers=PEERS)
