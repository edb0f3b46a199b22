"""altbp.parallel_backprop and altbp.readouts against independent oracles."""
import copy
import csv
import importlib.util
import math
import pickle
import warnings

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from altbp.parallel_backprop import (
    SharedFeatureExplainer, combine_maps, feature_maps, feature_norms, gaussian_smooth, neuron_similarity,
    parallel_backprop, select_pair, select_reference, select_stimuli, shared_weights)
from altbp.readouts import (
    FactorizedReadout, GaussianReadout, Latent, LatentExtractor, PooledReadout, contrastive_neuron, critical_r,
    fit_readout, half_threshold, load_recordings, pearson, reliability, spearman_brown)
from altbp.zoo import library

D = torch.float64


def net(seed=0, c=8, dtype=D, norm=True):
    """A small convolutional net with inplace ReLUs and running statistics that are not trivial."""
    torch.manual_seed(seed)
    layers = []
    for i, o in ((2, 5), (5, 6), (6, c)):
        layers += [nn.Conv2d(i, o, 3, 2 if o != 6 else 1, 1), nn.BatchNorm2d(o) if norm else nn.Identity(), nn.ReLU(inplace=True)]
    for m in layers:
        if isinstance(m, nn.BatchNorm2d):
            m.running_mean.uniform_(-0.2, 0.2)
            m.running_var.uniform_(0.5, 1.5)
    return nn.Sequential(*layers).eval().to(dtype)


def pair(seed=0, c=8, size=12, dtype=D, batch=()):
    g = torch.Generator().manual_seed(seed)
    x = [torch.rand(*batch, 2, size, size, generator=g, dtype=D).to(dtype) for _ in range(2)]
    return *x, torch.randn(c, generator=g, dtype=D).to(dtype)


def blur(maps, sigma):
    """A separable Gaussian by convolution, one plane at a time."""
    reach = math.ceil(3 * sigma)
    k = torch.exp(-torch.arange(-reach, reach + 1, dtype=maps.dtype) ** 2 / (2 * sigma**2))
    k = k / k.sum()
    flat = maps.reshape(-1, 1, *maps.shape[-2:])
    flat = F.conv2d(flat, k.reshape(1, 1, -1, 1), padding=(reach, 0))
    return F.conv2d(flat, k.reshape(1, 1, 1, -1), padding=(0, reach)).reshape(maps.shape)


def literal(latent, x_out, x_in, w, sigma, smooth="before", exc=False, reduce="signed"):
    """The paper's recipe, feature by feature, with autograd."""
    a, b = (latent(x[None])[0].detach() for x in (x_out, x_in))
    beta = a * w * b * w / ((a * w).norm() * (b * w).norm())
    beta = torch.where(w > 0, beta, torch.zeros_like(beta)) if exc else beta
    maps = []
    for x in (x_out, x_in):
        total = torch.zeros_like(x)
        for i in range(len(w)):
            leaf = x.clone().requires_grad_()
            row, = torch.autograd.grad(latent(leaf[None])[0, i], leaf)
            row = blur(row, sigma) if smooth == "before" else row
            if row.norm() > 0:
                total = total + beta[i] * row / row.norm()
        total = {"signed": total, "abs": total.abs(), "l2": total.pow(2).sum(0).sqrt()}[reduce]
        maps.append(blur(total, sigma) if smooth == "after" else total)
    return *maps, beta


# Similarity and weights ---------------------------------------------------------------------------------------------

def test_weights_sum_to_the_similarity_on_1000_draws():
    g = torch.Generator().manual_seed(0)
    a, b, w = (torch.randn(1000, 50, generator=g, dtype=D) for _ in range(3))
    beta = shared_weights(a, b, w)
    oracle = F.cosine_similarity(a * w, b * w, dim=1)
    assert (beta.sum(1) - oracle).abs().max() < 1e-14
    for i in range(0, 1000, 97):
        assert abs(neuron_similarity(a[i:i + 1], b[i:i + 1], w[i]) - oracle[i]) < 1e-14
    assert (shared_weights(a.abs(), b.abs(), w) >= 0).all()


def test_excitatory_weights_drop_inhibition_and_keep_the_norms():
    a, b, w = (torch.rand(20, dtype=D) + 0.1 for _ in range(3))
    w[::3] *= -1
    beta, exc = shared_weights(a, b, w), shared_weights(a, b, w, sign="exc")
    assert (exc[w < 0] == 0).all() and torch.equal(exc[w > 0], beta[w > 0])
    assert abs(neuron_similarity(a[None], b[None], w, sign="exc") - exc.sum()) < 1e-14


@given(st.floats(1e-30, 1e30), st.floats(1e-30, 1e30), st.floats(-1e30, 1e30).filter(lambda r: abs(r) > 1e-30))
@settings(max_examples=30, deadline=None)
def test_scale_does_not_matter(p, q, r):
    a, b, w = (torch.rand(7, generator=torch.Generator().manual_seed(k), dtype=D) + 0.1 for k in range(3))
    assert (shared_weights(p * a, q * b, r * w) - shared_weights(a, b, w)).abs().max() < 1e-14


def test_nothing_active_gives_zero_not_nan():
    a, w = torch.rand(5), torch.rand(5)
    for args in ((0 * a, a, w), (a, 0 * a, w), (a, a, 0 * w)):
        assert torch.equal(shared_weights(*args), torch.zeros(5))
        assert neuron_similarity(args[0][None], args[1][None], args[2]) == 0


def test_select_reference_by_brute_force():
    g = torch.Generator().manual_seed(1)
    A, B, w = torch.rand(6, 9, generator=g), torch.rand(11, 9, generator=g), torch.randn(9, generator=g)
    s = torch.stack([F.cosine_similarity((a * w)[None], B * w) for a in A])
    index, value = select_reference(A, B, w)
    assert torch.equal(index, s.argmax(1)) and torch.allclose(value, s.max(1)[0])
    mask = torch.rand(6, 11, generator=g) > 0.5
    index, value = select_reference(A, B, w, candidates=mask, topk=3)
    assert index.shape == (6, 3) and mask.gather(1, index).all()
    assert torch.allclose(value[:, 0], s.masked_fill(~mask, -9).max(1)[0])
    with pytest.raises(ValueError, match="topk"):
        select_reference(A, B, w, candidates=torch.zeros(11, dtype=torch.bool))


def test_select_pair_and_stimuli_by_brute_force():
    g = torch.Generator().manual_seed(2)
    A, B, w = torch.rand(12, 9, generator=g), torch.rand(30, 9, generator=g), torch.randn(9, generator=g)
    y, z = torch.rand(12, generator=g), torch.rand(30, generator=g)
    best = max((F.cosine_similarity(A[i] * w, B[j] * w, dim=0).item(), i, j)
               for i in sorted(range(12), key=lambda i: -y[i])[:5] for j in sorted(range(30), key=lambda j: -z[j])[:15])
    i, j, s = select_pair(A, y, B, z, w)
    assert (i, j) == best[1:] and abs(s - best[0]) < 1e-6
    found = select_stimuli(w, B, z, A)
    assert found["top"] == (A @ w).argmax() and found["bottom"] == (A @ w).argmin()
    assert found["similar"] == F.cosine_similarity(A * w, (B[z.argmax()] * w)[None]).argmax()


# Maps ---------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("smooth, reduce, exc", [("before", "signed", False), ("before", "l2", True),
                                                 ("after", "l2", False), ("after", "abs", True)])
@pytest.mark.parametrize("dtype, tol", [(torch.float32, 1e-6), (D, 1e-14)])
def test_the_literal_recipe(smooth, reduce, exc, dtype, tol):
    latent, (x, z, w) = Latent(net(dtype=dtype)), pair(dtype=dtype)
    maps = parallel_backprop(latent, x, z, w, sigma=1.3, smooth=smooth, reduce=reduce, sign="exc" if exc else "paper")
    out, in_, beta = literal(latent, x, z, w, 1.3, smooth, exc, reduce)
    for ours, theirs in ((maps.map_out, out), (maps.map_in, in_), (maps.beta, beta)):
        assert ours.dtype == dtype and (ours - theirs).abs().max() < tol
    rows = feature_maps(latent, x[None])
    again = combine_maps(rows, beta[None], sigma=1.3, smooth=smooth, reduce=reduce)[0]
    assert (again - out).abs().max() < tol


def test_rows_are_the_jacobian():
    latent, (x, _, _) = Latent(net()), pair(batch=(3,))
    J = torch.autograd.functional.jacobian(lambda x: latent(x).sum(0), x).transpose(0, 1)
    for chunk in (None, 1, 3):
        assert (feature_maps(latent, x, chunk_size=chunk) - J).abs().max() < 1e-14
    index = torch.tensor([[0, 3], [7, 7], [2, 1]])
    assert (feature_maps(latent, x, index) - J[torch.arange(3)[:, None], index]).abs().max() < 1e-14


class Odd(nn.Module):
    """Batch norms and convolutions called in unusual ways."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(4)
        self.weight = nn.Parameter(torch.randn(6, 2, 3, 2, dtype=D))
        self.grouped = nn.Conv2d(6, 6, 3, groups=3, padding="same", padding_mode="circular", dtype=D)
        self.bare = nn.BatchNorm2d(6, affine=False, dtype=D)
        self.flat = nn.BatchNorm1d(6, dtype=D)
        for m in (self.bare, self.flat):
            m.running_mean.uniform_(-0.2, 0.2), m.running_var.uniform_(0.5, 1.5)

    def forward(self, x):
        h = F.conv2d(input=x, weight=self.weight, stride=(2, 1), padding=[1, 1], dilation=(1, 3)).relu()
        h = h + F.conv2d(x, self.weight[..., :1], torch.arange(6.0, dtype=D), padding="same")[:, :, ::2, :-1].sigmoid()
        h = F.batch_norm(h, None, None, training=True) if self.coupled else h
        h = self.grouped(self.bare(h)).sigmoid()
        return self.flat(h.mean((2, 3)))


@pytest.mark.parametrize("coupled", [False, True])
def test_rows_of_a_net_that_calls_its_layers_in_odd_ways(coupled):
    latent, (x, _, _) = Odd().eval(), pair(batch=(3,))
    latent.coupled = coupled
    strides = [p.stride() for p in latent.parameters()]
    x = x[:1] if coupled else x
    J = torch.autograd.functional.jacobian(latent, x)
    own = torch.stack([J[b, :, b] for b in range(len(x))])
    assert (feature_maps(latent, x) - own).abs().max() < 1e-13
    assert strides == [p.stride() for p in latent.parameters()]
    assert all(p.grad is None for p in latent.parameters())


def test_half_precision_images_keep_their_type():
    latent = Latent(net(dtype=torch.bfloat16))
    x = pair(dtype=torch.bfloat16, batch=(2,))[0]
    rows = feature_maps(latent, x)
    assert rows.dtype == torch.bfloat16 and rows.isfinite().all()


def test_bound_on_50_nets():
    options = [dict(smooth=s, backbone=b) for s in ("before", "after") for b in ("grad", "ig", "smoothgrad", "guided", "cam")]
    for seed in range(50):
        latent, (x, z, w) = Latent(net(seed, norm=seed % 2)), pair(seed)
        maps = parallel_backprop(latent, x, z, w, sigma=0.7, steps=3, reduce="l2", **options[seed % len(options)])
        assert abs(maps.s - maps.beta.sum()) < 1e-14 and maps.s <= 1 + 1e-14
        for m in (maps.map_out, maps.map_in):
            assert m.norm() <= maps.s + 1e-12
            assert torch.isfinite(m).all()


@pytest.mark.parametrize("dtype, tol", [(torch.float32, 1e-7), (D, 1e-12)])
@pytest.mark.parametrize("backbone", ["grad", "ig", "smoothgrad"])
@pytest.mark.parametrize("smooth", ["before", "after"])
def test_one_product_equals_the_literal_sum(dtype, tol, backbone, smooth):
    latent, (x, z, w) = Latent(net(dtype=dtype)), pair(dtype=dtype, batch=(2,))
    kind = dict(backbone=backbone, steps=4)
    norms = tuple(feature_norms(latent, i, sigma=1.0 if smooth == "before" else 0, **kind) for i in (x, z))
    a = parallel_backprop(latent, x, z, w, sigma=1.0, smooth=smooth, **kind)
    b = parallel_backprop(latent, x, z, w, sigma=1.0, smooth=smooth, norms=norms, **kind)
    assert (a.map_out - b.map_out).abs().max() < tol and (a.map_in - b.map_in).abs().max() < tol


def test_without_norms_it_is_one_backward_pass():
    latent, (x, z, w) = Latent(net()), pair()
    maps = parallel_backprop(latent, x, z, w, sigma=0, normalize=False)
    leaf = x.clone().requires_grad_()
    g, = torch.autograd.grad((latent(leaf[None])[0] * maps.beta).sum(), leaf)
    assert (maps.map_out - g).abs().max() < 1e-15


def test_topk_certificate_and_tol():
    latent, (x, z, w) = Latent(net(c=30)), pair(c=30)
    full = parallel_backprop(latent, x, z, w)
    for k in (1, 3, 8, 29, 99):
        part = parallel_backprop(latent, x, z, w, topk=k)
        left = full.beta.sort(descending=True)[0][k:].sum()
        assert abs(part.truncation - left) < 1e-14
        for a, b in ((part.map_out, full.map_out), (part.map_in, full.map_in)):
            assert (a - b).norm() <= part.truncation + 1e-14
    for tol in (0.0, 0.05, 0.5):
        part = parallel_backprop(latent, x, z, w, tol=tol)
        assert part.truncation <= tol * part.bound + 1e-14
    assert parallel_backprop(latent, x, z, w, tol=0.5).truncation > 0


def test_hutchinson_norms_are_unbiased_with_the_error_they_state():
    latent, (x, z, w) = Latent(net(norm=False)), pair(batch=(2,))
    for sigma in (0.0, 1.0):
        exact, zero = feature_norms(latent, x, sigma=sigma, with_error=True)
        n, error = feature_norms(latent, x, sigma=sigma, method="hutchinson", n_probe=4000, chunk_size=500, with_error=True)
        alive = exact > 0
        assert torch.equal(n == 0, ~alive) and not zero.any()
        assert ((n / exact - 1)[alive] / error[alive]).abs().max() < 4.5
        assert (error[alive] * math.sqrt(2 * 4000) - 1).abs().max() < 0.15
    full = parallel_backprop(latent, x, z, w)
    rough = parallel_backprop(latent, x, z, w, norms="hutchinson", n_probe=100)
    far = torch.stack([(a - b).flatten(1).norm(dim=1) for a, b in
                       ((full.map_out, rough.map_out), (full.map_in, rough.map_in))], 1)
    assert (far > 0).all() and (far < 3 * rough.norm_error).all()


def test_randomness_comes_from_the_generator_alone():
    latent, (x, z, w) = Latent(net()), pair()
    state = torch.get_rng_state()
    for kind in (dict(norms="hutchinson", n_probe=5), dict(backbone="smoothgrad", steps=3)):
        runs = [parallel_backprop(latent, x, z, w, generator=g, **kind).map_out
                for g in (None, None, torch.Generator().manual_seed(0), torch.Generator().manual_seed(1))]
        assert torch.equal(runs[0], runs[1]) and torch.equal(runs[0], runs[2]) and not torch.equal(runs[0], runs[3])
    assert torch.equal(state, torch.get_rng_state())


def test_integrated_gradients_against_captum():
    pytest.importorskip("captum")
    ig = library("captum.attr").IntegratedGradients
    latent, (x, _, w) = Latent(net(dtype=torch.float32)), pair(dtype=torch.float32, batch=(2,))
    theirs = ig(lambda x: latent(x) @ w, multiply_by_inputs=False).attribute(x, n_steps=16, method="riemann_right")
    rows = feature_maps(latent, x, backbone="ig", steps=16)
    ours = torch.einsum("k,bkchw->bchw", w, rows)
    assert (ours - theirs).abs().max() < 1e-6 * theirs.abs().max().clamp(min=1)


def test_guided_by_hand():
    torch.manual_seed(0)
    one, two = nn.Linear(8, 6).double(), nn.Linear(6, 3).double()
    class Two(nn.Module):
        def forward(self, x):
            return torch.relu(two(F.relu(one(x.flatten(1)), inplace=True)))
    x = torch.rand(2, 2, 2, 2, dtype=D)
    h = one(x.flatten(1)).relu()
    a = two(h).relu()
    want = torch.stack([((a[:, i:i + 1] > 0) * two.weight[i]).clamp(min=0) * (h > 0) @ one.weight for i in range(3)], 1)
    got = feature_maps(Two(), x, backbone="guided").flatten(2)
    assert (got - want).abs().max() < 1e-14


def test_guided_finds_a_relu_or_says_so():
    linear = nn.Sequential(nn.Flatten(), nn.Linear(8, 3)).double()
    with pytest.raises(ValueError, match="guided"):
        feature_maps(linear, torch.rand(1, 2, 2, 2, dtype=D), backbone="guided")


def test_cam_is_the_upsampled_activation():
    model, (x, z, w) = net(), pair()
    maps = parallel_backprop(Latent(model), x, z, w, backbone="cam", sigma=0, reduce="l2")
    up = F.interpolate(model(x[None]), (12, 12), mode="bilinear")[0]
    unit = up / up.flatten(1).norm(dim=1).clamp(min=1e-300)[:, None, None]
    assert (maps.map_out - (maps.beta[:, None, None] * unit).sum(0).abs()).abs().max() < 1e-14


def test_a_callable_backbone_gets_unit_norm():
    latent, (x, z, w) = Latent(net()), pair()
    grey = lambda latent, x, index: 5 * x.mean(1, keepdim=True)[:, None].expand(-1, index.shape[1], -1, -1, -1)
    maps = parallel_backprop(latent, x, z, w, backbone=grey, sigma=0)
    assert abs(maps.map_out.norm() - maps.s) < 1e-13  # all maps coincide: equality in the bound


def test_batches_singles_sizes_and_weights_per_pair():
    latent, (x, z, w) = Latent(net()), pair(batch=(3,))
    W = torch.stack([w, -2 * w, w.flip(0)])
    z = F.interpolate(z, (16, 10))
    many = parallel_backprop(latent, x, z, W)
    assert many.map_in.shape == z.shape and many.s.shape == (3,) and many.norm_error.shape == (3, 2)
    for i in range(3):
        one = parallel_backprop(latent, x[i], z[i], W[i])
        assert one.s.shape == () and one.map_in.shape == z.shape[1:]
        for a, b in ((one.map_out, many[i].map_out), (one.map_in, many[i].map_in), (one.beta, many[i].beta)):
            assert (a - b).abs().max() < 1e-14
    back = parallel_backprop(latent, z[0], x[0], W[0])
    assert (back.map_in - many[0].map_out).abs().max() < 1e-14
    with pytest.raises(TypeError, match="batch"):
        one[0]


def test_permuting_features_changes_nothing():
    latent, (x, z, w) = Latent(net()), pair()
    p = torch.randperm(8, generator=torch.Generator().manual_seed(0))
    a, b = parallel_backprop(latent, x, z, w), parallel_backprop(lambda x: latent(x)[:, p], x, z, w[p])
    assert (a.map_out - b.map_out).abs().max() < 1e-14


def test_dead_features_give_zero_not_nan():
    model, (x, z, w) = net(norm=False), pair()
    with torch.no_grad():
        model[6].weight[::2], model[6].bias[::2] = 0, -1.0
    latent = Latent(model)
    norms = feature_norms(latent, x[None])
    assert (norms[0, ::2] == 0).all()
    for kind in (dict(), dict(norms="hutchinson"), dict(backbone="cam"), dict(backbone="ig"), dict(smooth="after", reduce="l2"),
                 dict(norms=(norms, norms)), dict(topk=2)):
        maps = parallel_backprop(latent, x, z, w, **kind)
        assert torch.isfinite(maps.map_out).all() and maps.map_out.norm() > 0
    with torch.no_grad():
        model[6].weight.zero_()
        model[6].bias.fill_(-1)
    for kind in (dict(), dict(norms="hutchinson"), dict(backbone="cam"), dict(tol=0.1)):
        maps = parallel_backprop(latent, x, z, w, **kind)
        assert maps.s == 0 and not maps.map_out.any() and not maps.map_in.any() and not maps.norm_error.any()


def test_tiny_gradients_are_not_dead():
    latent, (x, z, w) = Latent(net(dtype=torch.float32)), pair(dtype=torch.float32)
    a, b = parallel_backprop(latent, x, z, w), parallel_backprop(lambda x: 1e-28 * latent(x), x, z, w)
    assert (a.map_out - b.map_out).abs().max() < 1e-6


def test_negative_latents_warn_and_bound():
    latent, (x, z, w) = Latent(net()[:-1]), pair(3)
    with pytest.warns(UserWarning, match="bounds the maps"):
        maps = parallel_backprop(latent, x, z, w)
    assert maps.bound > maps.s and abs(maps.bound - maps.beta.abs().sum()) < 1e-14
    assert maps.map_out.norm() <= maps.bound <= 1 + 1e-14
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        parallel_backprop(Latent(net()), x, z, w)


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("kind", [dict(), dict(norms="hutchinson", n_probe=3), dict(backbone="guided"), dict(backbone="ig", steps=2)])
def test_callers_without_gradients(context, kind):
    latent, (x, z, w) = Latent(net()), pair()
    want = parallel_backprop(latent, x, z, w, **kind).map_out
    with context():
        got = parallel_backprop(latent, x.clone(), z.clone(), w.clone(), **kind).map_out
    assert (got - want).abs().max() < 1e-14 and not got.requires_grad


def test_smoothing_is_a_symmetric_contraction():
    n = 9
    for sigma in (0.3, 1.5, 20.0):
        S = torch.stack([gaussian_smooth(e.reshape(n, n), sigma).flatten() for e in torch.eye(n * n, dtype=D)])
        assert (S - S.T).abs().max() < 1e-15 and torch.linalg.matrix_norm(S, 2) <= 1 + 1e-14
    maps = torch.randn(2, 3, 7, 11, dtype=D)
    assert (gaussian_smooth(maps, 1.2) - blur(maps, 1.2)).abs().max() < 1e-14
    assert gaussian_smooth(maps, 0) is maps


LATENT = Latent(net())
X, Z, W = pair()


@pytest.mark.parametrize("change, error, words", [
    (dict(w=W[:5]), ValueError, "w has 5"), (dict(w=torch.rand(1, 1, 8)), ValueError, "w: expected"),
    (dict(w=W * float("nan")), ValueError, "w: has entries"), (dict(x_out=X * float("inf")), ValueError, "x_out"),
    (dict(x_in=(9 * Z).long()), TypeError, "x_in"), (dict(x_out=X[0]), ValueError, "x_out: expected"),
    (dict(x_in=Z.expand(2, -1, -1, -1)), ValueError, "x_in"), (dict(sigma=-1), ValueError, "sigma"), (dict(sigma=float("nan")), ValueError, "sigma"),
    (dict(backbone="lrp"), ValueError, "backbone"), (dict(smooth="never"), ValueError, "smooth"),
    (dict(sign="inh"), ValueError, "sign"), (dict(reduce="max"), ValueError, "reduce"), (dict(norms="lucky"), ValueError, "method"),
    (dict(topk=0), ValueError, "topk"), (dict(tol=1.5), ValueError, "tol"), (dict(tol=0.1, topk=2), ValueError, "one of them"),
    (dict(n_probe=1), ValueError, "n_probe"), (dict(steps=0), ValueError, "steps"), (dict(chunk_size=0), ValueError, "chunk_size"),
    (dict(norms="hutchinson", backbone="cam"), ValueError, "norms"), (dict(norms=W), ValueError, "two tensors"),
    (dict(backbone=lambda latent, x, index: x), ValueError, "backbone: expected maps"), (dict(norms=(W[:3], W[:3])), ValueError, "norms"),
    (dict(latent=lambda x: x), ValueError, "latent: expected"), (dict(latent=lambda x: LATENT(x).detach()), ValueError, "autograd"),
    (dict(latent=lambda x: LATENT(x), backbone="cam"), ValueError, "latent.maps"),
    (dict(latent=Latent(net().train())), RuntimeError, "model.eval"),
    (dict(latent=nn.Sequential(nn.Dropout(), Latent(net()))), RuntimeError, "Dropout"),
])
def test_errors_name_what_is_wrong(change, error, words):
    args = dict(latent=LATENT, x_out=X, x_in=Z, w=W) | change
    with pytest.raises(error, match=words):
        parallel_backprop(args.pop("latent"), args.pop("x_out"), args.pop("x_in"), args.pop("w"), **args)


def test_more_errors():
    for call, words in ((lambda: neuron_similarity(X[0], X[0], W), "differ"), (lambda: neuron_similarity(W, W, W), "A1: expected 2"),
                        (lambda: feature_maps(LATENT, X), "x: expected"), (lambda: combine_maps(X[None, None], W[None]), "beta"),
                        (lambda: feature_norms(LATENT, X[None], method="magic"), "method"),
                        (lambda: feature_norms(LATENT, X[None], method="hutchinson", backbone="cam"), "backbone"),
                        (lambda: select_pair(X[0], W, X[0], W, W), "y_out"), (lambda: gaussian_smooth(X, -1), "sigma"), (lambda: feature_maps(LATENT, X[None], torch.tensor([8])), "index"),
                        (lambda: select_reference(X[0, :, :8], X[0, :, :8], W, candidates=torch.ones(12)), "candidates"),
                        (lambda: feature_maps(LATENT, X[None], torch.tensor(3)), "index"),
                        (lambda: feature_maps(LATENT, X[None], backbone="ig", steps=2.5), "steps: must be a whole"),
                        (lambda: reliability(torch.rand(4, 3, 2), splits=0), "splits"),
                        (lambda: shared_weights(W, W, W, sign="all"), "sign")):
        with pytest.raises(ValueError, match=words):
            call()
    for call, words in ((lambda: feature_maps(LATENT, X[None], [3]), "index"), (lambda: feature_maps(LATENT, X[None], W), "index"),
                        (lambda: SharedFeatureExplainer(LATENT, "maps", nn.Linear(8, 1)), "readout: a Linear has no .features"),
                        (lambda: fit_readout(PooledReadout(4), torch.ones(5, 4).long(), torch.rand(5)), "maps: torch.int64 is not floating")):
        with pytest.raises(TypeError, match=words):
            call()


@pytest.mark.parametrize("backbone", ["grad", "ig", "cam"])
def test_no_features_no_maps(backbone):
    rows = feature_maps(LATENT, X[None], torch.zeros(0, dtype=torch.long), backbone=backbone)
    assert rows.shape == (1, 0, 1 if backbone == "cam" else 2, 12, 12)


@pytest.mark.parametrize("call, error, words", [
    (lambda: parallel_backprop(LATENT, X[None][:0], Z[None][:0], W), ValueError, "none of them 0"),
    (lambda: parallel_backprop(LATENT, X[None].numpy(), Z[None], W), TypeError, "x_out: expected a floating"),
    (lambda: parallel_backprop(LATENT, X, Z, W.tolist()), TypeError, "w: expected a tensor"),
    (lambda: parallel_backprop(LATENT, X, Z, W, topk=2.5), ValueError, "topk"),
    (lambda: feature_maps(LATENT, X[None], torch.zeros(3, 2, dtype=torch.long)), ValueError, "index"),
    (lambda: select_reference(torch.rand(2, 8), torch.rand(0, 8), W), ValueError, "topk"),
    (lambda: select_pair(torch.rand(0, 8), torch.rand(0), torch.rand(3, 8), torch.rand(3), W), ValueError, "y_out"),
    (lambda: select_stimuli(W, torch.rand(0, 8), torch.rand(0), torch.rand(3, 8)), ValueError, "y_in"),
    (lambda: shared_weights(*3 * [torch.rand(0)]), ValueError, "features"),
    (lambda: SharedFeatureExplainer(net(), "8", PooledReadout(8).double()).explain(X, Z[None], neuron=3), ValueError, "neuron"),
    (lambda: SharedFeatureExplainer(net(), "8", PooledReadout(8).double()).explain(X, X[None]), ValueError, "images other than x"),
    (lambda: fit_readout(PooledReadout(8), torch.rand(0, 8), torch.rand(0)), ValueError, "y: expected"),
    (lambda: half_threshold(torch.arange(4), 0.1), TypeError, "z"),
    (lambda: pearson(torch.full((3, 1), math.nan), torch.rand(3, 1)), ValueError, "finite"),
    (lambda: contrastive_neuron(torch.full((3, 2), math.nan), torch.rand(3, 2)), ValueError, "finite")])
def test_empty_and_odd_input(call, error, words):
    with pytest.raises(error, match=words):
        call()


def test_attention_takes_probes():
    torch.manual_seed(0)
    layer = nn.MultiheadAttention(4, 2, batch_first=True).double().eval()
    class Tokens(nn.Module):
        def forward(self, x):
            t = x.flatten(2).mT
            q, k, v = (F.linear(t, p, b) for p, b in zip(layer.in_proj_weight.chunk(3), layer.in_proj_bias.chunk(3)))
            return F.scaled_dot_product_attention(q, k, v).relu().mean(1)
    x = torch.rand(1, 4, 3, 3, dtype=D)
    n, error = feature_norms(Tokens(), x, method="hutchinson", n_probe=500, with_error=True)
    exact = feature_norms(Tokens(), x)
    assert ((n - exact).abs() <= 4.5 * error * exact + 1e-12).all() and (exact > 0).any()


# Extractor and explainer ---------------------------------------------------------------------------------------------

class Faulty(nn.Module):
    """A net whose forward pass fails after its first part."""
    def __init__(self):
        super().__init__()
        self.body, self.unused, self.head = net(), nn.Identity(), nn.Identity()
        self.fail = True

    def forward(self, x):
        if self.fail:
            self.body[0](x)
            raise OSError("disk on fire")
        return self.head(self.body(x))


def untouched(model):
    hooks = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    return not any(getattr(m, h) for m in model.modules() for h in hooks) and all(p.grad is None for p in model.parameters())


def test_nothing_is_left_behind_even_after_an_exception():
    model, readout = Faulty().train(), PooledReadout(8).double()
    model.body[1].eval()
    modes = [m.training for m in model.modules()]
    explainer = SharedFeatureExplainer(model, "head", readout)
    pool = torch.rand(3, 2, 12, 12, dtype=D)
    for fail, kind in ((True, {}), (False, {}), (False, dict(norms="hutchinson", n_probe=2)), (False, dict(backbone="guided")), (False, dict(backbone="lrp"))):
        model.fail = fail
        if fail or kind.get("backbone") == "lrp":
            with pytest.raises((OSError, ValueError)):
                explainer.explain(pool[0], pool, **kind)
        else:
            explainer.explain(pool[0], pool, **kind)
        assert untouched(model) and untouched(readout) and [m.training for m in model.modules()] == modes
    with pytest.raises(RuntimeError, match="did not reach"):
        LatentExtractor(model, "unused")(pool)
    with explainer.extractor:  # a context within a context
        explainer.explain(pool[0], pool)
        assert not any(m.training for m in model.modules())
    assert [m.training for m in model.modules()] == modes
    assert untouched(model)


def test_extractor_stops_at_the_layer_and_survives_copies():
    model = net()
    latent = LatentExtractor(model, "5", preprocess=torch.sqrt)
    x = torch.rand(2, 2, 12, 12, dtype=D)
    want = model[:6](x.sqrt())
    for e in (latent, copy.deepcopy(latent), pickle.loads(pickle.dumps(latent)), LatentExtractor(model, model[5], torch.sqrt)):
        assert torch.equal(e(x), want)
    other = LatentExtractor(net(1), "5")
    other.load_state_dict(latent.state_dict())
    assert torch.equal(other(x.sqrt()), want)
    assert "layer='5'" in repr(latent)


def test_extractor_errors_and_token_outputs():
    model = nn.Sequential(nn.Flatten(2), nn.Linear(9, 4))
    x = torch.rand(5, 6, 3, 3)  # 6 tokens
    with pytest.raises(ValueError, match="pass output="):
        LatentExtractor(model, "1")(x)
    maps = LatentExtractor(model, "1", output=lambda t: t.mT.unflatten(2, (2, 3)))(x)
    assert maps.shape == (5, 4, 2, 3)
    with pytest.raises(ValueError, match="near it"):
        LatentExtractor(model, "layer4.1")
    with pytest.raises(ValueError, match="not a part"):
        LatentExtractor(model, nn.ReLU())
    lstm = nn.Sequential(nn.Flatten(2), nn.LSTM(9, 4))
    with pytest.raises(TypeError, match="tuple"):
        LatentExtractor(lstm, "1")(x)


def test_explainer_finds_the_reference_and_never_itself():
    model, readout = net(), PooledReadout(8, 3).double()
    torch.manual_seed(0)
    nn.init.normal_(readout.weight)
    pool = torch.rand(9, 2, 12, 12, dtype=D)
    explainer = SharedFeatureExplainer(model, "8", readout)
    A, w = model(pool).mean((2, 3)), readout.weight[2].detach()
    s = neuron_similarity(A, A, w).fill_diagonal_(-1)
    one = explainer.explain(pool[4], pool, neuron=2, sigma=1.0)
    assert one.reference == s[4].argmax() and abs(one.s - s[4].max()) < 1e-14
    assert torch.equal(one.x_in, pool[one.reference]) and one.map_out.shape == (12, 12)
    same = parallel_backprop(Latent(model), pool[4], pool[one.reference], w, sigma=1.0, smooth="after", reduce="l2")
    assert (same.map_in - one.map_in).abs().max() < 1e-14
    for few, k, words in ((pool[4:5], 1, "pool has 0 images other than x"), (pool, 9, "references: 9")):
        with pytest.raises(ValueError, match=words):
            explainer.explain(pool[4], few, neuron=2, references=k)
    many = explainer.explain(pool[:2], pool, neuron=2, references=2, backbone="cam")
    assert torch.equal(many.reference, torch.cat([s[i].topk(2)[1] for i in (0, 1)]))
    import matplotlib
    matplotlib.use("agg")
    axes = one.plot()
    assert "s = " in axes[0].get_title()
    with pytest.raises(TypeError, match="pick one"):
        many.plot()
    matplotlib.pyplot.close("all")


def test_a_torchvision_net_with_a_gaussian_readout():
    if importlib.util.find_spec("torchvision") is None:
        pytest.skip("torchvision is not installed")
    torch.manual_seed(0)
    model = library("torchvision.models").resnet18(weights=None)
    readout = GaussianReadout(128, 2)
    x = torch.rand(3, 3, 48, 64)
    explainer = SharedFeatureExplainer(model, "layer2.1", readout)
    maps = explainer.explain(x[0], x, topk=5)
    assert maps.map_out.shape == (48, 64) and maps.map_out.norm() <= maps.s + 1e-5 and model.training and untouched(model)
    probed = explainer.explain(x[0], x, topk=5, norms="hutchinson", n_probe=20)
    assert (probed.map_out - maps.map_out).norm() < 4 * probed.norm_error[0]


# Readouts ------------------------------------------------------------------------------------------------------------

def test_gaussian_readout_reads_between_pixels():
    maps = torch.tensor([[[[0.0, 1.0], [2.0, 4.0]]]])
    readout = GaussianReadout(1, 5)
    with torch.no_grad():
        readout.mu.copy_(torch.tensor([[-1, -1], [1, -1], [-1, 1], [0, 0], [3, 3]]))  # (x, y); outside: clamped
        readout.weight.fill_(1)
    assert torch.allclose(readout(maps)[0], torch.tensor([0.0, 1.0, 2.0, 1.75, 4.0]))
    assert torch.equal(readout.features(maps, 2), torch.tensor([[2.0]]))
    big = torch.rand(3, 1, 5, 7, generator=torch.Generator().manual_seed(0))
    oracle = F.grid_sample(big, readout.mu.detach().clamp(-1, 1).expand(3, -1, -1)[:, :, None], align_corners=True)
    assert torch.allclose(readout(big), oracle[:, 0, :, 0], atol=1e-6)
    g = [torch.Generator().manual_seed(0) for _ in range(2)]
    many = maps.expand(50, -1, -1, -1)
    drawn = readout(many, g[0])
    assert torch.equal(drawn, readout(many, g[1])) and drawn[:, 3].std() > 0.1 and not torch.equal(drawn, readout(many))


def test_pooled_and_factorized_readouts():
    torch.manual_seed(0)
    maps = torch.rand(4, 3, 5, 6)
    pooled, factor = PooledReadout(3, 2), FactorizedReadout(3, (5, 6), 2)
    nn.init.normal_(pooled.weight)
    with torch.no_grad():
        factor.weight.copy_(pooled.weight)
    want = maps.mean((2, 3)) @ pooled.weight.T
    assert torch.allclose(pooled(maps), want) and torch.allclose(factor(maps), want, atol=1e-6)
    assert torch.allclose(pooled(maps.mean((2, 3))), want)
    assert torch.allclose(pooled.features(maps, 1), maps.mean((2, 3)))
    nn.init.normal_(factor.mask)
    by_hand = torch.stack([(maps * factor.mask[k].abs()).sum((2, 3)) @ factor.weight[k] for k in range(2)], 1)
    assert torch.allclose(factor(maps), by_hand, atol=1e-5)
    assert (factor.features(maps, 1) >= 0).all()
    for call, words in ((lambda: pooled(maps[:, :2]), "maps"), (lambda: factor(maps[..., :4]), "mask"), (lambda: pooled.features(maps, 2), "neuron"),
                        (lambda: GaussianReadout(3)(maps[0]), "maps"), (lambda: PooledReadout(0), "in_features"), (lambda: GaussianReadout(3, sigma=-1), "sigma")):
        with pytest.raises(ValueError, match=words):
            call()


@given(st.floats(-4, 4), st.floats(0, 6))
@settings(max_examples=200, deadline=None)
def test_half_threshold_against_a_grid(z, lam):
    v = half_threshold(torch.tensor(z, dtype=D), lam).item()
    grid = np.concatenate([np.linspace(-4.2, 4.2, 80001), [0.0]])
    cost = lambda v: (v - z) ** 2 + lam * np.sqrt(np.abs(v))
    assert cost(v) <= cost(grid).min() + 1e-12
    assert v * z >= 0 and abs(v) <= abs(z) + 1e-15


def test_half_threshold_shapes_and_errors():
    z = torch.linspace(-2, 2, 12).reshape(3, 4)
    lam = torch.tensor([[0.0], [0.5], [9.0]])
    out = half_threshold(z, lam)
    assert torch.allclose(out[0], z[0]) and not out[2].any() and out.dtype == z.dtype
    with pytest.raises(ValueError, match="lam"):
        half_threshold(z, -1.0)


def planted(n=300, c=40, seed=0, noise=0.1):
    g = torch.Generator().manual_seed(seed)
    A, w = torch.rand(n, c, generator=g, dtype=D), torch.zeros(2, c, dtype=D)
    w[0, :4], w[1, 10:13] = torch.tensor([2.0, -1.5, 1.0, 1.0]), torch.tensor([1.0, 1.0, -2.0])
    return A, A @ w.T + 0.7 + noise * torch.randn(n, 2, generator=g, dtype=D), w


def test_prox_recovers_a_sparse_neuron():
    A, y, w = planted()
    fit = fit_readout(PooledReadout(40, 2).double(), A, y, optimizer="prox", lam=0.01, val=planted(seed=0)[:2])
    assert torch.equal(fit.w != 0, w != 0) and fit.nnz.tolist() == [4, 3]
    assert (fit.w - w).abs().max() < 0.15 and (fit.r_train > 0.98).all() and torch.equal(fit.r_val, fit.r_train)
    # a fixed point of the half-threshold step, with another step length
    gram, b = torch.cov(A.T, correction=0), (A - A.mean(0)).T @ (y - y.mean(0)) / len(A)
    L = 3 * torch.linalg.eigvalsh(gram)[-1]
    again = half_threshold(fit.w.T - 2 * (gram @ fit.w.T - b) / L, 2 * 0.01 / L)
    assert (again - fit.w.T).abs().max() < 1e-6


def test_prox_against_closed_forms():
    A, y, _ = planted()
    Ac, yc = A - A.mean(0), y - y.mean(0)
    for penalty, lam in ((None, 0.0), ("l2", 0.05)):
        w = torch.linalg.solve(Ac.T @ Ac / len(A) + lam * torch.eye(40, dtype=D), Ac.T @ yc / len(A)).T
        fit = fit_readout(PooledReadout(40, 2).double(), A, y, optimizer="prox", penalty=penalty, lam=lam, epochs=8000)
        assert (fit.w - w).abs().max() < 1e-6
        assert (fit.bias - (y.mean(0) - w @ A.mean(0))).abs().max() < 1e-6
    linear = pytest.importorskip("sklearn.linear_model")
    fit = fit_readout(PooledReadout(40, 2).double(), A, y, optimizer="prox", penalty="l1", lam=0.02, epochs=20000)
    lasso = linear.Lasso(alpha=0.01, tol=1e-10).fit(A.numpy(), y[:, 0].numpy())
    assert np.abs(lasso.coef_ - fit.w[0].numpy()).max() < 1e-5


def test_adam_agrees_with_the_closed_form_and_leaves_no_gradients():
    A, y, _ = planted(c=15)
    readout = PooledReadout(15, 2).double()
    fit = fit_readout(readout, A, y, penalty="l2", lam=0.05, epochs=1500, lr=0.03)
    exact = fit_readout(PooledReadout(15, 2).double(), A, y, optimizer="prox", penalty="l2", lam=0.05, epochs=20000)
    assert (fit.w - exact.w).abs().max() < 1e-3
    assert all(p.grad is None for p in readout.parameters()) and len(fit.history["loss"]) == 1500


def test_early_stopping_keeps_the_best_epoch_of_every_neuron():
    A, y, _ = planted(60, noise=1.0)
    val = planted(60, seed=5, noise=1.0)[:2]
    fit = fit_readout(PooledReadout(40, 2).double(), A, y, val=val, penalty=None, lam=0, patience=50, epochs=4000, batch_size=20)
    curve = torch.stack(fit.history["val_loss"])
    assert len(curve) < 4000
    kept = ((val[0] @ fit.w.T + fit.bias - val[1]) ** 2).mean(0)
    assert (kept - curve.min(0)[0]).abs().max() < 1e-12
    assert curve.argmin(0).max() == len(curve) - 51


def test_fit_is_deterministic_and_says_what_is_wrong():
    A, y, _ = planted()
    runs = [fit_readout(PooledReadout(40, 2).double(), A, y, epochs=5, batch_size=32, seed=s).w for s in (0, 0, 1)]
    assert torch.equal(runs[0], runs[1]) and not torch.equal(runs[0], runs[2])
    for change, words in ((dict(y=y[:9]), "y: expected"), (dict(y=y * float("nan")), "y: has"), (dict(penalty="l0"), "penalty"), (dict(optimizer="sgd"), "optimizer"),
                          (dict(lam=-1), "lam"), (dict(epochs=0), "epochs"), (dict(patience=3), "patience"), (dict(lr=0), "lr"), (dict(batch_size=0), "batch_size"),
                          (dict(val=(A, y[:5])), "val"), (dict(maps=A[:, :3]), "maps")):
        args = dict(maps=A, y=y) | change
        with pytest.raises(ValueError, match=words):
            fit_readout(PooledReadout(40, 2).double(), args.pop("maps"), args.pop("y"), **args)


def test_gaussian_readout_recovers_a_planted_location():
    g = torch.Generator().manual_seed(0)
    maps = F.avg_pool2d(torch.rand(500, 6, 12, 12, generator=g), 5, 1)  # smooth, 8 × 8
    truth = GaussianReadout(6, 1)
    with torch.no_grad():
        truth.mu.copy_(torch.tensor([[0.35, -0.5]]))
        truth.weight.copy_(torch.tensor([[1.0, 0, 2.0, 0, 0, -1.0]]))
    readout = GaussianReadout(6, 1, generator=g)
    fit = fit_readout(readout, maps[:400], truth(maps[:400]).detach(), penalty=None, lam=0, lr=3e-2, epochs=600,
                      val=(maps[400:], truth(maps[400:]).detach()))
    assert (readout.mu - truth.mu).abs().max() < 0.05 and fit.r_val > 0.99


def test_contrastive_neuron():
    g = torch.Generator().manual_seed(0)
    A, B = torch.rand(60, 7, generator=g, dtype=D) + torch.eye(7, dtype=D)[2] * 3, torch.rand(90, 7, generator=g, dtype=D)
    for normalize in (False, True):
        C = A.T @ A / (60 if normalize else 1) - B.T @ B / (90 if normalize else 1)
        w = contrastive_neuron(A, B, normalize=normalize)
        values, vectors = np.linalg.eigh(C.numpy())
        assert abs(w @ C @ w - values[-1]) < 1e-9 and abs(w.norm() - 1) < 1e-12
        assert abs(abs(w @ torch.from_numpy(vectors[:, -1])) - 1) < 1e-9 and (A @ w).mean() > (B @ w).mean()
    assert contrastive_neuron(A, B, k=3).shape == (3, 7)
    for call, words in ((lambda: contrastive_neuron(A, B[:, :4]), "A_in"), (lambda: contrastive_neuron(A, B, k=8), "k")):
        with pytest.raises(ValueError, match=words):
            call()


# Statistics and recordings --------------------------------------------------------------------------------------------

def test_critical_r():
    stats = pytest.importorskip("scipy.stats")
    for n in (3, 4, 25, 75, 475, 10**6):
        for alpha in (0.05, 0.01):
            t = stats.t.ppf(1 - alpha / 2, n - 2)
            assert abs(critical_r(n, alpha) / (t / math.sqrt(n - 2 + t * t)) - 1) < 1e-8
    for bad in ((2, 0.05), (9, 0.0)):
        with pytest.raises(ValueError):
            critical_r(*bad)


def test_reliability_and_pearson():
    g = torch.Generator().manual_seed(0)
    signal = torch.randn(2000, 3, generator=g)
    noise = torch.tensor([0.5, 2.0, 0.0])
    trials = signal + noise * torch.randn(8, 2000, 3, generator=g)
    trials[..., 2] = 1.0  # a silent channel
    want = 1 / (1 + noise**2 / 8)
    got = reliability(trials)
    assert (got[:2] - want[:2]).abs().max() < 0.03 and got[2] == 0
    assert spearman_brown(0.5) == pytest.approx(2 / 3)
    a, b = torch.rand(50, 2, generator=g), torch.rand(50, 2, generator=g)
    assert pearson(a, b)[0].item() == pytest.approx(np.corrcoef(a[:, 0], b[:, 0])[0, 1], abs=1e-6)
    assert torch.full((7,), 0.1).mean() != 0.1 and pearson(torch.full((7,), 0.1), torch.full((7,), 0.3)) == 0
    with pytest.raises(ValueError, match="trials"):
        reliability(trials[:1])
    with pytest.raises(ValueError, match="shape"):
        pearson(a, b[:4])


def table(folder, rows=40):
    y = np.random.default_rng(0).normal(size=(rows, 2))
    names, inside = [f"im{i}.png" for i in range(rows)], np.arange(rows) < rows // 2
    with open(folder / "r.csv", "w", newline="") as f:
        out = csv.writer(f)
        out.writerow(["image", "u1", "in_category", "u2"])
        out.writerows([n, a, int(c), b] for n, (a, b), c in zip(names, y, inside))
    np.savez(folder / "r.npz", images=np.array(names), y=y, in_category=inside, channels=np.array(["u1", "u2"]))
    return y, inside


def test_recordings_from_csv_and_npz(tmp_path):
    y, inside = table(tmp_path)
    a, b = (load_recordings(tmp_path / f, fractions=(0.5, 0.25, 0.25), seed=3) for f in ("r.csv", "r.npz"))
    assert a.paths == b.paths and a.channels == b.channels == ["u1", "u2"] and torch.allclose(a.y, b.y)
    assert np.allclose(a.y, y, atol=1e-6) and torch.equal(a.train, b.train)
    assert sorted(torch.cat([a.train, a.val, a.test]).tolist()) == list(range(20)) and a.out.tolist() == list(range(20, 40))
    assert [len(i) for i in (a.train, a.val, a.test)] == [10, 5, 5]
    assert not torch.equal(a.train, load_recordings(tmp_path / "r.csv", fractions=(0.5, 0.25, 0.25), seed=4).train)
    report = a.report(a.y)
    assert torch.allclose(report["r_in"], torch.ones(2)) and report["critical_out"] == critical_r(20)
    image = pytest.importorskip("PIL.Image")
    image.new("L", (5, 4), 128).save(tmp_path / "im3.png")
    read = a.images(torch.tensor([3]), lambda im: torch.from_numpy(np.array(im)).permute(2, 0, 1) / 255)
    assert read.shape == (1, 3, 4, 5) and abs(read.mean() - 128 / 255) < 1e-6
    with pytest.raises(FileNotFoundError, match="im4.png"):
        a.images([4], lambda im: im)


@pytest.mark.parametrize("text, words", [
    ("image,u1\na,1\n", "in_category"), ("image,in_category,u1\na,maybe,1\n", "line 2"), ("image,in_category,u1\na,1,x\n", "line 2, u1: a response is 'x'"),
    ("image,in_category,u1\na,1\n", "line 2"), ("image,in_category,u1\na,1,nan\n", "no finite"), ("image,in_category,u1,u2\na,1,2,3\nb,0,,3\n", "line 3, u1: a response is ''"), ("image,in_category\na,1\n", "do not fit"), ("image,in_category,u1\na,0,1\n", "no image is in"), ("", "in_category")])
def test_recordings_say_what_is_wrong(tmp_path, text, words):
    (tmp_path / "bad.csv").write_text(text)
    with pytest.raises(ValueError, match=words):
        load_recordings(tmp_path / "bad.csv")


def test_recordings_check_their_arguments(tmp_path):
    table(tmp_path)
    np.savez(tmp_path / "bad.npz", images=np.array(["a"]))
    for name, kind, words in (("r.txt", {}, "csv or .npz"), ("r.csv", dict(fractions=(1, 1, 1)), "fractions"), ("bad.npz", {}, "no array")):
        with pytest.raises(ValueError, match=words):
            load_recordings(tmp_path / name, **kind)
    with pytest.raises(ValueError, match="too few"):
        recordings = load_recordings(tmp_path / "r.csv")
        recordings.report(recordings.y)
    with pytest.raises(ValueError, match="predicted: expected"):
        recordings.report(recordings.y[:9])


@pytest.mark.parametrize("flags", [["1", "0"], ["True", "False"], [1.0, math.nan], [2, 0]])
def test_a_category_that_is_not_yes_or_no_is_refused(tmp_path, flags):
    np.savez(tmp_path / "r.npz", images=["a", "b"], y=np.ones((2, 1)), in_category=np.array(flags))
    with pytest.raises(ValueError, match="in_category must be"):
        load_recordings(tmp_path / "r.npz")


def test_a_split_of_few_images_loses_none(tmp_path):
    (tmp_path / "r.csv").write_text("image,in_category,u1\na,1,1\nb,1,2\nc,1,3\n")
    r = load_recordings(tmp_path / "r.csv", fractions=(0, 0.5, 0.5))  # both halves round up
    assert sorted(torch.cat([r.train, r.val, r.test]).tolist()) == [0, 1, 2]


# Numbers at the edge --------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("scale", [1e-25, 1e20])
def test_pearson_of_any_scale(scale):
    a = torch.tensor([1.0, 2, 3])
    assert pearson(a * scale, a).item() == pytest.approx(1) and pearson(a, -a * scale).item() == pytest.approx(-1)
    with pytest.raises(ValueError, match="a: has no rows"): pearson(a[:0], a[:0])


def test_half_threshold_keeps_nan():
    found = half_threshold(torch.tensor([math.nan, 1.0, 0.01]), 0.1)
    assert math.isnan(found[0]) and found[1] > 0.9 and found[2] == 0
    with pytest.raises(ValueError, match="lam: must not be negative"): half_threshold(torch.ones(2), math.nan)


def test_reliability_lies_between_zero_and_one():
    x = torch.randn(1, 30, 4, generator=torch.Generator().manual_seed(0))
    assert reliability(torch.cat([x, -x])).tolist() == [0] * 4
    noise = reliability(torch.randn(6, 4, 200, generator=torch.Generator().manual_seed(1)))
    assert 0 <= noise.min() and noise.max() <= 1
    with pytest.raises(ValueError, match="r: must lie above -1"): spearman_brown(-1.0)


@pytest.mark.parametrize("pick", [
    lambda A, y: select_pair(A, y, A, torch.arange(3.0), torch.ones(3), top_out=1),
    lambda A, y: select_pair(A, torch.arange(3.0), A, y, torch.ones(3)),
    lambda A, y: select_stimuli(torch.ones(3), A, y, A)])
def test_a_missing_response_is_no_strong_driver(pick):
    with pytest.raises(ValueError, match="y_.*not finite"): pick(torch.eye(3), torch.tensor([math.nan, 1, 5]))


def test_a_validation_set_of_other_maps_leaves_the_readout_as_it_was():
    readout = PooledReadout(3)
    before = copy.deepcopy(readout.state_dict())
    with pytest.raises(ValueError, match="val: maps"):
        fit_readout(readout, torch.randn(5, 3, 4, 4), torch.randn(5), val=(torch.randn(5, 7, 4, 4), torch.randn(5)))
    assert all(torch.equal(v, before[k]) for k, v in readout.state_dict().items())
