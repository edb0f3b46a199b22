"""Stochastic backpropagation: against the masked-gradient definition, formulas written out here, and enumeration."""
import copy
import itertools
import math
import pickle
import warnings
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as some
from torch import nn

from altbp import stochastic_backprop as S
from altbp.backprop import saved_bytes

F64 = torch.float64


def gen(seed=0):
    return torch.Generator().manual_seed(seed)


def normal(*shape, seed=0, dtype=F64):
    return torch.randn(*shape, generator=gen(seed), dtype=F64).to(dtype)


def rel(a, b):
    return float((a.detach() - b.detach()).norm() / b.detach().norm())


def mlp(C=6, dtype=F64, bias=True):
    net = nn.Sequential(nn.LayerNorm(C), nn.Linear(C, 2 * C, bias), nn.GELU(), nn.Linear(2 * C, C, bias)).to(dtype)
    for i, p in enumerate(net.parameters()):
        p.data = normal(*p.shape, seed=i, dtype=dtype)
    return net


def grads(y, inputs, g):
    return torch.autograd.grad(y, inputs, g)


def masked(mask, n_prefix=0):
    """The mask as a column of numbers, prefix included."""
    return torch.cat([torch.ones(n_prefix, dtype=F64), mask.flatten().to(F64)])[:, None]


# Masks ----------------------------------------------------------------------------------------------------------------

@settings(max_examples=60, deadline=None)
@given(some.integers(1, 12), some.integers(8, 12), some.sampled_from([1, 1 / 2, 1 / 3, 1 / 4, 1 / 8, 2 / 3, 3 / 4, 7 / 8]),
       some.integers(0, 10**6))
def test_grid_is_a_congruence(H, W, r, seed):
    s = 1 if r == 1 else round(1 / min(r, 1 - r))
    mask = S.grid_mask((H, W), r, generator=gen(seed))
    t = int(torch.randint(s, (), generator=gen(seed)))
    want = [[((i + j) % s == t) == (r <= 0.5 or r == 1) for j in range(W)] for i in range(H)]
    assert mask.tolist() == want and mask.dtype == torch.bool


def test_published_counts():
    counts = lambda size, r, s: sorted(int(S.grid_mask(size, r, start=t).sum()) for t in range(s))
    assert counts((14, 14), 0.25, 4) == [48, 49, 49, 50] and counts((14, 14), 0.75, 4) == [146, 147, 147, 148]
    assert counts((7, 7), 0.5, 2) == [24, 25] and counts((14, 14), 0.5, 2) == [98, 98]


@pytest.mark.parametrize("lattice", ["diagonal", "spread", (1, 2), (3, 1)])
@pytest.mark.parametrize("r", [0.2, 0.125, 0.8])
def test_each_position_is_kept_equally_often_over_the_phases(lattice, r):
    s = round(1 / min(r, 1 - r))
    count = sum(S.grid_mask((9, 10), r, start=t, lattice=lattice).double() for t in range(s))
    assert (count / s == S.keep_probability("grid", (9, 10), r)).all()


def test_spread_lattice_by_brute_force():
    for s in range(2, 20):
        def shortest(b):
            return min(i * i + j * j for i in range(-s, s + 1) for j in range(-s, s + 1)
                       if (i, j) != (0, 0) and (i + b * j) % s == 0)
        a, b = S.spread_lattice(s)
        assert a == 1 and shortest(b) == max(map(shortest, range(1, s + 1)))
    assert S.spread_lattice(8) == (1, 3) and S.spread_lattice(5) == (1, 2)


def test_no_grid_is_empty_and_huge_periods_are_refused_at_once():
    for call in (lambda: S.grid_mask(1, 0.75, start=0), lambda: S.grid_mask((5, 1), 0.75, start=0, lattice=(0, 1)),
                 lambda: S.grid_mask((8, 8), 1e-7, lattice="spread")):
        with pytest.raises(ValueError, match="without a kept position"):
            call()
    for N in (2, 3, 5):
        for t in range(4):
            assert S.grid_mask(N, 0.75, start=t).any()


def test_grid_on_a_sequence_and_other_shapes():
    assert S.grid_mask(7, 0.5, start=1).tolist() == [False, True] * 3 + [False]
    assert S.grid_mask((2, 3, 4), 0.5).shape == (2, 3, 4)
    assert S.grid_mask(torch.Size([4, 4]), 0.5, lattice="spread").shape == (4, 4)


@pytest.mark.parametrize("r", [0.1, 0.5, 0.62, 0.9, 1.0, 1e-9])
def test_random_keeps_the_same_number(r):
    for seed in range(5):
        assert S.random_mask((5, 7), r, generator=gen(seed)).sum() == max(1, round(35 * r))


def test_random_reaches_all_subsets_evenly():
    draws = [tuple(S.random_mask(5, 0.4, generator=g).tolist()) for g in [gen(3)] for _ in range(4000)]
    subsets = [tuple(i in c for i in range(5)) for c in itertools.combinations(range(5), 2)]
    for s in subsets:  # binomial: mean 400, deviation 19
        assert abs(draws.count(s) - 400) < 5 * 19


def test_bernoulli_is_never_empty_and_its_probability_is_exact():
    g = gen(1)
    draws = torch.stack([S.bernoulli_mask(4, 0.3, generator=g) for _ in range(6000)])
    assert draws.any(1).all()
    pi = S.keep_probability("bernoulli", 4, 0.3)
    masks = torch.tensor(list(itertools.product([0, 1], repeat=4)), dtype=F64)[1:]
    p = 0.3 ** masks.sum(1) * 0.7 ** (4 - masks.sum(1))
    assert abs(pi - float((p[:, None] * masks).sum(0)[0] / p.sum())) < 1e-15
    assert (draws.double().mean(0) - pi).abs().max() < 5 * math.sqrt(pi * (1 - pi) / 6000)


def test_masks_leave_the_global_generator_alone_when_given_one():
    torch.manual_seed(0)
    state = torch.get_rng_state()
    for sampler in S.SAMPLERS.values():
        a, b = (sampler((6, 6), 0.5, generator=gen(5)) for _ in range(2))
        assert torch.equal(a, b)
    source = S.MaskSource(0.5)
    source.refresh()
    source.draw((4, 4))
    assert torch.equal(state, torch.get_rng_state())


def test_upsample():
    mask = S.random_mask((3, 2), 0.5, generator=gen())
    big = S.upsample_mask(mask, (6, 8))
    assert all(big[i, j] == mask[i // 2, j // 4] for i in range(6) for j in range(8))
    assert torch.equal(S.upsample_mask(mask, (3, 2)), mask)
    for small, size in [(mask, (7, 8)), (mask, (6,)), (mask, (2, 2)), (mask[:0], (6, 8))]:
        with pytest.raises(ValueError, match="size"):
            S.upsample_mask(small, size)


def test_keep_set():
    mask = torch.tensor([[True, False], [False, True]])
    ks = S.keep_set(mask, n_prefix=2, prob=0.25)
    assert ks.keep.tolist() == [0, 1, 2, 5] and ks.drop.tolist() == [3, 4]
    assert ks.prob.tolist() == [1, 1, 0.25, 0.25] and ks.prob.dtype == F64
    values = torch.arange(6)
    assert torch.equal(torch.cat([values[ks.keep], values[ks.drop]])[ks.inverse], values)
    assert S.keep_set(mask).prob.tolist() == [0.5, 0.5]
    each = torch.tensor([[0.1, 0.2], [0.3, 0.4]], dtype=F64)
    assert torch.allclose(S.keep_set(mask, prob=each).prob, torch.tensor([0.1, 0.4], dtype=F64))
    assert S.keep_set(torch.zeros(3, dtype=torch.bool), n_prefix=1).keep.tolist() == [0]
    assert isinstance(ks.to("cpu"), S.KeepSet)
    assert not S.keep_set(mask, prob=each.requires_grad_()).prob.requires_grad


# The operations ---------------------------------------------------------------------------------------------------------

@settings(max_examples=25, deadline=None)
@given(some.integers(0, 3), some.integers(1, 9), some.booleans(), some.sampled_from(["split", "recompute", "hook"]),
       some.integers(0, 10**6))
def test_apply_is_the_masked_output_gradient(B, N, rescale, impl, seed):
    net, x, g = mlp(), normal(B, N, 6, seed=seed).requires_grad_(), normal(B, N, 6, seed=seed + 1)
    mask = S.random_mask(N, 0.5, generator=gen(seed))
    ks = S.keep_set(mask, prob=0.4)
    y = S.sbp_apply(net, x, ks, rescale=rescale, impl=impl)
    plain = net(x)
    m = masked(mask) / (0.4 if rescale else 1)
    assert torch.allclose(y, plain, atol=1e-13)
    ours, want = grads(y, [x, *net.parameters()], g), grads(plain, [x, *net.parameters()], g * m)
    for a, b in zip(ours, want):
        assert torch.allclose(a, b, atol=1e-11)
    assert (ours[0][:, ~mask] == 0).all()


def test_dense_limits_are_bitwise():
    net, x, g = mlp(dtype=torch.float32), normal(2, 16, 6, dtype=torch.float32).requires_grad_(), normal(2, 16, 6).float()
    full = S.keep_set(torch.ones(16, dtype=torch.bool))
    half = S.keep_set(S.grid_mask((4, 4), 0.5, start=0))
    plain = net(x)
    want = grads(plain, [x, *net.parameters()], g)
    for rescale in (False, True):
        y = S.sbp_apply(net, x, full, rescale=rescale)
        assert torch.equal(y, plain)
        for a, b in zip(grads(y, [x, *net.parameters()], g), want):
            assert torch.equal(a, b)
    with torch.no_grad():
        assert torch.equal(S.sbp_apply(net, x, half), plain)
    assert torch.equal(S.sbp_apply(net, x, half, impl="hook"), plain)
    S.sbp_apply(net, x, half, impl="hook").add_(1).sum().backward()  # the result is not a view


def test_results_may_be_written_into_also_when_everything_is_kept():
    net, x, q = mlp(), normal(2, 16, 6).requires_grad_(), normal(2, 3, 16, 4).requires_grad_()
    full = S.keep_set(torch.ones(16, dtype=torch.bool), prob=0.5)
    for impl in S.IMPLEMENTATIONS:
        dx, = grads(S.sbp_apply(net, x, full, rescale=True, impl=impl).add_(1).sum(), [x], None)
        assert torch.allclose(dx, 2 * grads(net(x).sum(), [x], None)[0], atol=1e-11)
    S.sbp_attention(q, q, q, full, rescale=True).add_(1).sum().backward()
    S.sbp_linear(x, net[1].weight, None, full, rescale=True).add_(1).sum().backward()


@pytest.mark.parametrize("layout", ["nhwc", "nchw", "permuted"])
@pytest.mark.parametrize("impl", S.IMPLEMENTATIONS)
def test_pair_of_dimensions(layout, impl):
    mask = S.grid_mask((3, 4), 1 / 3, start=1)
    ks = S.keep_set(mask)
    if layout == "nhwc":
        net, dim, x = mlp(), (1, 2), normal(2, 3, 4, 6)
        m = mask[None, :, :, None]
    elif layout == "permuted":
        net, dim, x = mlp(), (1, 2), normal(2, 6, 3, 4).permute(0, 2, 3, 1)
        m = mask[None, :, :, None]
    else:
        net = nn.Sequential(nn.Conv2d(6, 12, 1), nn.GELU(), nn.Conv2d(12, 5, 1)).double()
        dim, x, m = (-2, -1), normal(2, 6, 3, 4), mask
    x = x.detach().requires_grad_()
    y, plain = S.sbp_apply(net, x, ks, dim=dim, impl=impl), net(x)
    g = normal(*plain.shape, seed=3)
    assert torch.allclose(y, plain, atol=1e-13)
    for a, b in zip(grads(y, [x, *net.parameters()], g), grads(plain, [x, *net.parameters()], g * m)):
        assert torch.allclose(a, b, atol=1e-12)


@pytest.mark.parametrize("rescale", [False, True])
@pytest.mark.parametrize("bias", [False, True])
def test_linear_formula(bias, rescale):
    x, W, b = normal(2, 3, 9, 4).requires_grad_(), normal(5, 4, seed=1).requires_grad_(), normal(5, seed=2).requires_grad_()
    mask, g = S.random_mask(9, 0.5, generator=gen()), normal(2, 3, 9, 5, seed=3)
    y = S.sbp_linear(x, W, b if bias else None, S.keep_set(mask, prob=0.3), rescale=rescale)
    assert torch.equal(y, F.linear(x, W, b if bias else None))
    m = masked(mask) / (0.3 if rescale else 1)
    want = [(m * g) @ W, torch.einsum("abno,abni->oi", m * g, x), (m * g).sum((0, 1, 2))]
    for a, e in zip(grads(y, [x, W] + [b] * bias, g), want):
        assert torch.allclose(a, e, atol=1e-13)


def test_linear_computes_and_stores_only_what_is_asked_for():
    ks = S.keep_set(S.random_mask(9, 0.5, generator=gen()))
    make = lambda *shape, on: normal(*shape).requires_grad_(on)
    for x_on, W_on, b_on in itertools.product((False, True), repeat=3):
        x, W, b = make(2, 9, 4, on=x_on), make(5, 4, on=W_on), make(5, on=b_on)
        y = S.sbp_linear(x, W, b, ks)
        assert y.requires_grad == (x_on or W_on or b_on)
        bytes_ = saved_bytes(lambda: S.sbp_linear(x, W, b, ks), exclude=[W])
        assert bytes_ == (ks.keep.nbytes if y.requires_grad else 0) + (2 * len(ks.keep) * 4 * 8 if W_on else 0)
        if y.requires_grad:
            y.sum().backward()
            assert [t.grad is not None for t in (x, W, b)] == [x_on, W_on, b_on]


def test_linear_with_complex_numbers():
    x, W, b, g = (torch.complex(normal(*n, seed=i), normal(*n, seed=i + 9)) for i, n in enumerate([(9, 4), (5, 4), (5,), (9, 5)]))
    mask, leaves = S.random_mask(9, 0.5, generator=gen()), [t.requires_grad_() for t in (x, W, b)]
    ours, want = S.sbp_linear(x, W, b, S.keep_set(mask)), F.linear(x, W, b)
    for a, e in zip(grads(ours, leaves, g), grads(want, leaves, g * masked(mask))):
        assert torch.allclose(a, e, atol=1e-13)


def attention(q, k, v, scale=None):
    return (q @ k.mT * (q.shape[-1] ** -0.5 if scale is None else scale)).softmax(-1) @ v


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("rescale", [False, True])
@pytest.mark.parametrize("mode", S.MODES)
def test_attention_modes(mode, rescale, fused):
    if rescale and mode in ("qkv", "query_detach_kv"):
        with pytest.raises(ValueError, match="rescale"):
            S.sbp_attention(*[normal(1, 2, 4, 3)] * 3, S.keep_set(S.random_mask(4, 0.5)), mode=mode, rescale=True)
        return
    q, k, v = (normal(2, 3, 7, 4, seed=i).requires_grad_() for i in range(3))
    g = normal(2, 3, 7, 4, seed=4)
    mask = S.random_mask(3 if mode == "head" else 7, 0.5, generator=gen())
    ks = S.keep_set(mask, prob=0.3)
    y = S.sbp_attention(q, k, v, ks, mode=mode, rescale=rescale, fused=fused)
    m = masked(mask) / (0.3 if rescale else 1)
    if mode == "qkv":
        sub = attention(q[..., mask, :], k[..., mask, :], v[..., mask, :])
        want = attention(q, k, v).detach().clone()
        want[..., mask, :] = sub.detach()
        expected = grads(sub, [q, k, v], g[..., mask, :])
        assert not torch.allclose(want, attention(q, k, v), atol=1e-3)
    else:
        want = attention(q, k, v)
        expected = list(grads(want, [q, k, v], g * (m[:, None] if mode == "head" else m)))
        if mode == "query_detach_kv":
            expected[1:] = [t * m for t in expected[1:]]
    assert torch.allclose(y, want, atol=1e-13)
    for a, b in zip(grads(y, [q, k, v], g), expected):
        assert torch.allclose(a, b, atol=1e-12)


def test_attention_scale_and_dense():
    q, k, v = (normal(2, 3, 7, 4, seed=i).requires_grad_() for i in range(3))
    full = S.keep_set(torch.ones(7, dtype=torch.bool))
    assert torch.equal(S.sbp_attention(q, k, v, full, fused=False), attention(q, k, v))
    ks = S.keep_set(S.random_mask(7, 0.5, generator=gen()))
    for fused in (False, True):
        assert torch.allclose(S.sbp_attention(q, k, v, ks, scale=0.2, fused=fused), attention(q, k, v, 0.2), atol=1e-13)
        with torch.no_grad():
            assert torch.allclose(S.sbp_attention(q, k, v, ks, mode="qkv", fused=fused), attention(q, k, v), atol=1e-13)


def test_no_head_kept_is_a_zero_gradient():
    none = S.KeepSet(torch.zeros(0, dtype=torch.long), torch.arange(3), torch.arange(3), torch.zeros(0, dtype=F64))
    q, k, v = (normal(2, 3, 7, 4, seed=i).requires_grad_() for i in range(3))
    for fused in (False, True):
        y = S.sbp_attention(q, k, v, none, mode="head", fused=fused)
        assert torch.allclose(y, attention(q, k, v), atol=1e-13)
        assert all((t == 0).all() for t in grads(y, [q, k, v], torch.ones_like(y)))


@pytest.mark.parametrize("options", [dict(padding=1), dict(stride=2, padding=1), dict(padding=1, groups=3),
                                     dict(padding=2, dilation=2)])
@pytest.mark.parametrize("mode", S.CONV_MODES)
@pytest.mark.parametrize("rescale", [False, True])
def test_conv_forms(mode, options, rescale):
    groups = options.get("groups", 1)
    x, W = normal(2, 3, 6, 6).requires_grad_(), normal(6, 3 // groups, 3, 3, seed=1).requires_grad_()
    b = normal(6, seed=2).requires_grad_()
    y = F.conv2d(x, W, b, **options)
    g = normal(*y.shape, seed=3)
    mask = S.grid_mask(y.shape[-2:] if mode == "output" else (6, 6), 0.5, start=0)
    ks = S.keep_set(mask, prob=0.3)
    if mode == "both" and (rescale or "stride" in options):
        with pytest.raises(ValueError, match="rescale" if rescale else "ks"):
            S.sbp_conv2d(x, W, b, ks, mode=mode, rescale=rescale, **options)
        return
    ours = S.sbp_conv2d(x, W, b, ks, mode=mode, rescale=rescale, **options)
    assert torch.equal(ours, y)
    w = mask / (0.3 if rescale else 1)
    g_out, x_in = (g if mode == "input" else g * w), (x if mode == "output" else x * w).detach()
    dx, db = grads(y, [x, b], g_out)
    dW, = grads(F.conv2d(x_in, W, b, **options), [W], g_out)
    for a, e in zip(grads(ours, [x, W, b], g), (dx, dW, db)):
        assert torch.allclose(a, e, atol=1e-12)


def test_conv_taps_that_never_learn():
    H = 8
    x, W = normal(1, 1, H, H), normal(1, 1, 3, 3, seed=1).requires_grad_()
    seen = torch.zeros(3, 3)
    for t in range(2):
        y = S.sbp_conv2d(x, W, None, S.keep_set(S.grid_mask((H, H), 0.5, start=t)), mode="both", padding=1)
        seen += (grads(y, [W], normal(1, 1, H, H, seed=2))[0][0, 0] != 0)
    assert seen.tolist() == [[2, 0, 2], [0, 2, 0], [2, 0, 2]]


# Expectations -------------------------------------------------------------------------------------------------------------

def test_unbiased_with_independent_masks_and_weights():
    """Two residual branches, attention between them: all pairs of masks, every parameter."""
    N, C, a, b = 4, 6, mlp(), mlp(C=6)
    Wq, Wk, Wv = (normal(C, C, seed=9 + i) / 3 for i in range(3))
    leaves = [t.requires_grad_() for t in (Wq, Wk, Wv, normal(2, N + 1, C, seed=20))] + [*a.parameters(), *b.parameters()]
    target = normal(2, C, seed=21)

    def loss(k1, k2, k3, rescale):
        x = leaves[3]
        x = x + (a(x) if k1 is None else S.sbp_apply(a, x, k1, rescale=rescale)) / 3
        q, k, v = ((x @ W).unsqueeze(1) for W in leaves[:3])
        x = x + (attention(q, k, v) if k2 is None else S.sbp_attention(q, k, v, k2, rescale=rescale)).squeeze(1)
        x = x + (b(x) if k3 is None else S.sbp_apply(b, x, k3, rescale=rescale)) / 3
        return (x[:, 0].tanh() * target).sum() + x.pow(2).mean()

    exact = grads(loss(None, None, None, False), leaves, None)
    sets = [S.keep_set(torch.tensor([i in c for i in range(N)]), n_prefix=1) for c in itertools.combinations(range(N), 2)]
    for rescale, want in ((True, True), (False, False)):
        mean = [torch.zeros_like(e) for e in exact]
        for ks in itertools.product(sets, repeat=3):
            for m, e in zip(mean, grads(loss(*ks, rescale), leaves, None)):
                m += e / len(sets) ** 3
        errors = [rel(m, e) for m, e in zip(mean, exact)]
        assert (max(errors) < 1e-12) is want
    shared = [torch.zeros_like(e) for e in exact]
    for ks in sets:
        for m, e in zip(shared, grads(loss(ks, ks, ks, True), leaves, None)):
            m += e / len(sets)
    assert max(rel(m, e) for m, e in zip(shared, exact)) > 1e-3


# Modules and sources --------------------------------------------------------------------------------------------------------

def small(source, **options):
    return nn.Sequential(S.SBP(mlp(), source, size=(4, 4), n_prefix=1, **options),
                         S.SBP(mlp(), source, size=(4, 4), n_prefix=1, **options))


def test_module_trains_on_kept_positions_and_evaluates_densely():
    source = S.MaskSource(0.5, seed=4)
    net, x = small(source), normal(2, 17, 6).requires_grad_()
    with pytest.raises(RuntimeError, match="attach"):
        net(x)
    source.attach(net)
    y = net(x)
    dense = net[1].fn(net[0].fn(x))
    assert torch.allclose(y, dense, atol=1e-12)
    mask, = source.masks.values()
    assert mask.shape == (4, 4)
    dx, = grads(y, [x], torch.ones_like(y))
    assert (dx[:, 1:][:, ~mask.flatten()] == 0).all() and (dx[:, 0] != 0).any()
    state = source.state_dict()["generator"]
    assert torch.equal(net.eval()(x), dense)
    assert torch.equal(source.state_dict()["generator"], state), "evaluation draws nothing"
    dense_source = S.MaskSource(1.0)
    plain = S.SBP(mlp(), dense_source)
    assert torch.equal(plain(x), plain.fn(x))


def test_shared_masks_agree_across_resolutions_and_independent_ones_differ():
    source = S.MaskSource(0.25, base=(4, 4), seed=1)
    source.refresh()
    coarse, fine = source.draw((4, 4)), source.draw((8, 8))
    mask = source.masks[None, (4, 4)]
    assert torch.equal(torch.zeros(64, dtype=torch.bool).index_fill(0, fine.keep, True).reshape(8, 8),
                       S.upsample_mask(mask, (8, 8)))
    assert source.draw((4, 4)) is coarse and (fine.prob == 0.25).all()
    source.refresh()
    own = S.MaskSource(0.5, mask="random", shared=False)
    own.refresh()
    a, b = own.draw(30, key="a"), own.draw(30, key="b")
    assert not torch.equal(a.keep, b.keep) and own.draw(30, key="a") is a
    assert not torch.equal(own.draw(30).keep, own.draw(30).keep)


def test_source_resumes_copies_and_pickles():
    source = S.MaskSource(0.5, mask="random", seed=7)
    net, x = small(source), normal(2, 17, 6)
    source.attach(net)
    net(x)
    state = copy.deepcopy(source.state_dict())
    copied, pickled = copy.deepcopy(net), pickle.loads(pickle.dumps(net))

    def next_masks(model):
        out = []
        for _ in range(3):
            model(x)
            out.append(next(iter(model[0].source.masks.values())))
        return torch.stack(out)

    want = next_masks(net)
    assert copied[0].source is not source and copied[0].source is copied[1].source
    assert torch.equal(next_masks(copied), want) and torch.equal(next_masks(pickled), want)
    source.load_state_dict(state)
    assert torch.equal(next_masks(net), want)
    assert list(net.state_dict()) == [f"{i}.fn.{n}" for i in range(2) for n in mlp().state_dict()]


def test_ranks_stay_apart_through_copies_and_checkpoints(monkeypatch):
    def masks(source):
        out = []
        for _ in range(3):
            source.refresh()
            out.append(source.draw(30).keep)
        return torch.cat(out)

    on = lambda rank: monkeypatch.setattr(S, "_rank", lambda: rank)
    fresh = lambda **options: S.MaskSource(0.5, mask="random", seed=3, **options)
    on(0)
    template, used = fresh(), fresh()
    data, state = pickle.dumps(template), used.state_dict()
    first = masks(fresh())
    on(1)  # what was made before the processes parted
    second = masks(fresh())
    assert not torch.equal(first, second)
    assert torch.equal(masks(pickle.loads(data)), second) and torch.equal(masks(copy.deepcopy(template)), second)
    other = fresh()
    other.load_state_dict(state)
    resumed = masks(other)
    assert not torch.equal(resumed, first)
    other.load_state_dict(state)
    assert torch.equal(masks(other), resumed)
    on(0)
    used.load_state_dict(state)
    assert torch.equal(masks(used), first), "its own rank goes on"
    given = fresh(generator=gen(5))
    state = given.state_dict()
    first = masks(given)
    on(1)
    given.load_state_dict(state)
    assert torch.equal(masks(given), first), "a generator passed in stays the same on all ranks"


def test_checkpointed_block_sees_its_mask_again():
    from torch.utils.checkpoint import checkpoint
    for shared in (True, False):
        source = S.MaskSource(0.5, mask="random", shared=shared)
        net, x = small(source), normal(2, 17, 6).requires_grad_()
        source.refresh()
        plain = grads(net(x), [x], torch.ones(2, 17, 6, dtype=F64))[0]
        again = grads(checkpoint(net, x, use_reentrant=False), [x], torch.ones(2, 17, 6, dtype=F64))[0]
        assert torch.allclose(plain, again, atol=1e-12)


def test_removing_the_handle_stops_refreshing():
    source = S.MaskSource(0.5, mask="random")
    net = small(source)
    handle = source.attach(net)
    net(normal(2, 17, 6))
    first = source.masks
    handle.remove()
    net(normal(2, 17, 6))
    assert source.masks is first


# What a user may throw at it --------------------------------------------------------------------------------------------------

def test_saved_bytes():
    B, N, C = 4, 16, 8
    net, x = mlp(C, torch.float32), normal(B, N, C, dtype=torch.float32).requires_grad_()
    ks = S.keep_set(S.grid_mask((4, 4), 0.5, start=0))
    n, index = 8, ks.keep.nbytes + ks.inverse.nbytes
    measure = lambda impl: saved_bytes(lambda: S.sbp_apply(net, x, ks, impl=impl), exclude=[*net.parameters(), x])
    half = B * n * (C + C + 2 * C + 2 * C) * 4 + 2 * B * n * 4  # LN's input and output, GELU's input and output, statistics
    assert measure("split") - index == half
    dense = saved_bytes(lambda: net(x), exclude=[*net.parameters(), x])
    assert dense == 2 * half - 2 * B * n * C * 4  # x itself is the caller's
    assert measure("recompute") <= B * n * C * 4 + index
    W, b = net[1].weight, net[1].bias
    assert saved_bytes(lambda: S.sbp_linear(x, W, b, ks), exclude=[W, b]) == B * n * C * 4 + ks.keep.nbytes


def test_merge_saves_no_values():
    ks = S.keep_set(S.grid_mask((4, 4), 0.5, start=0))
    kept = normal(2, 8, 5).requires_grad_()
    bytes_ = saved_bytes(lambda: S._merge(kept, normal(2, 8, 5), ks, 1))
    assert bytes_ <= ks.inverse.nbytes


def test_autocast():
    net, x = mlp(dtype=torch.float32), normal(3, 16, 6, dtype=torch.float32).requires_grad_()
    ks = S.keep_set(S.grid_mask((4, 4), 0.5, start=0))
    g = normal(3, 16, 6, seed=3).to(torch.bfloat16)

    def run(f):
        with torch.autocast("cpu", torch.bfloat16):
            y = f()
        return y, grads(y, [x, *net.parameters()], g)

    want_y, want = run(lambda: S.sbp_apply(net, x, ks, impl="hook"))
    assert want_y.dtype == torch.bfloat16
    for impl in ("split", "recompute"):
        y, got = run(lambda: S.sbp_apply(net, x, ks, impl=impl))
        assert y.dtype == torch.bfloat16 and rel(y, want_y) < 0.02
        for a, b in zip(got, want):
            assert a.dtype == b.dtype and rel(a, b) < 0.03
    W, b = net[1].weight, net[1].bias
    with torch.autocast("cpu", torch.bfloat16):
        y, plain = S.sbp_linear(x, W, b, ks, rescale=True), F.linear(x, W, b)
        z = S.sbp_conv2d(x[None].transpose(1, 3), W[:, :, None, None], b, S.keep_set(torch.ones(16, 3, dtype=torch.bool)))
        wide = S.sbp_linear(x.double(), W.double(), b.double(), ks), F.linear(x.double(), W.double(), b.double())
    assert torch.equal(y, plain) and z.dtype == torch.bfloat16
    assert wide[0].dtype == F64 and torch.equal(*wide), "autocast leaves float64 alone"
    assert all(t.isfinite().all() and t.dtype == torch.float32 for t in grads(y.sum() + z.sum(), [x, W, b], None))


def test_meta_device():
    ks, net, x = S.keep_set(S.grid_mask((4, 4), 0.5)).to("meta"), mlp().to("meta"), normal(2, 16, 6).to("meta").requires_grad_()
    assert S.sbp_apply(net, x, ks).shape == x.shape and S.sbp_linear(x, net[1].weight, None, ks).shape == (2, 16, 12)
    assert S.sbp_attention(*[x[:, None]] * 3, ks).shape == (2, 1, 16, 6)
    image, kernel = torch.zeros(1, 1, 4, 4, device="meta"), torch.zeros(1, 1, 3, 3, device="meta")
    assert S.sbp_conv2d(image, kernel, None, ks, padding=1).shape == image.shape


def test_half_precision_and_empty_batch():
    ks = S.keep_set(S.grid_mask((4, 4), 0.5, start=0), prob=0.5)
    net = mlp(dtype=torch.bfloat16)
    for B in (0, 2):
        x = normal(B, 16, 6, dtype=torch.bfloat16).requires_grad_()
        for impl in S.IMPLEMENTATIONS:
            y = S.sbp_apply(net, x, ks, rescale=True, impl=impl)
            assert y.shape == x.shape and grads(y, [x], torch.ones_like(y))[0].dtype == torch.bfloat16
        q = x.reshape(B, 16, 2, 3).transpose(1, 2)
        for fused in (False, True):
            assert S.sbp_attention(q, q, q, ks, rescale=True, fused=fused).shape == q.shape


def test_func_transforms():
    W, b = normal(5, 4), normal(5, seed=1)
    ks = S.keep_set(S.random_mask(9, 0.5, generator=gen()), prob=0.3)
    xs = normal(3, 2, 9, 4, seed=2)

    def one(W, x, f):
        return f(W, x).tanh().sum()

    by_linear = lambda W, x: S.sbp_linear(x, W, b, ks, rescale=True)
    by_apply = lambda W, x: S.sbp_apply(lambda t: F.linear(t, W, b), x, ks, rescale=True)
    by_hook = lambda W, x: S.sbp_apply(lambda t: F.linear(t, W, b), x, ks, rescale=True, impl="hook")
    want = [torch.func.grad(one)(W, x, by_hook) for x in xs]
    for f in (by_linear, by_apply):
        assert torch.allclose(torch.func.vmap(torch.func.grad(one), (None, 0, None))(W, xs, f), torch.stack(want), atol=1e-13)


def test_gradient_of_the_gradient_is_that_of_the_masked_loss():
    """Differentiating Σ over kept rows twice: split and hook agree."""
    W = normal(4, 4).requires_grad_()
    ks = S.keep_set(S.random_mask(6, 0.5, generator=gen()), prob=0.4)
    x, out = normal(2, 6, 4, seed=1), []
    for f in (lambda: S.sbp_apply(lambda t: (t @ W).sin(), x, ks, rescale=True),
              lambda: S.sbp_apply(lambda t: (t @ W).sin(), x, ks, rescale=True, impl="hook"),
              lambda: S.sbp_linear(x, W.mT, None, ks, rescale=True).sin()):
        first, = torch.autograd.grad(f().pow(2).sum(), W, create_graph=True)
        out.append(torch.autograd.grad(first.pow(2).sum(), W)[0])
    assert all(t.isfinite().all() for t in out)
    assert rel(out[0], out[1]) < 1e-12


def test_compile():
    torch.compiler.reset()
    net, x = mlp(dtype=torch.float32), normal(2, 16, 6, dtype=torch.float32).requires_grad_()
    ks = S.keep_set(S.grid_mask((4, 4), 0.5, start=0), prob=0.5)
    q = x.reshape(2, 16, 2, 3).transpose(1, 2)

    def f(x, q, ks):
        y = S.sbp_apply(net, x, ks, rescale=True) + S.sbp_linear(x, net[1].weight, None, ks)[..., :6]
        return y.sum() + S.sbp_attention(q, q, q, ks, rescale=True).pow(2).sum()

    run = torch.compile(f, fullgraph=True, backend="aot_eager")
    for start in (0, 1):
        ks = S.keep_set(S.grid_mask((4, 4), 0.5, start=start), prob=0.5)
        want = grads(f(x, q, ks), [x, *net.parameters()], None)
        for a, b in zip(grads(run(x, q, ks), [x, *net.parameters()], None), want):
            assert torch.allclose(a, b, rtol=1e-4, atol=1e-5)
    torch.compiler.reset()


def test_compiled_module_with_a_source():
    torch.compiler.reset()
    source = S.MaskSource(0.5, mask="random", seed=3)
    net, x = small(source), normal(2, 17, 6).requires_grad_()
    source.attach(net)
    run = torch.compile(net, backend="eager")
    seen = set()
    for _ in range(4):
        dx, = grads(run(x), [x], torch.ones(2, 17, 6, dtype=F64))
        mask, = source.masks.values()
        assert torch.equal((dx[0, 1:] != 0).any(-1), mask.flatten())
        seen.add(tuple(mask.flatten().tolist()))
    assert len(seen) > 1, "a new mask every forward pass"
    torch.compiler.reset()


def _worker(rank, file, out):
    dist.init_process_group("gloo", init_method=f"file://{file}", rank=rank, world_size=2, timeout=timedelta(seconds=60))
    source = S.MaskSource(0.5, mask="random", seed=5)
    same = S.MaskSource(0.5, mask="random", generator=gen(5))
    net = small(source)
    source.attach(net)
    ddp = nn.parallel.DistributedDataParallel(net)
    ddp(normal(2, 17, 6, seed=rank)).pow(2).sum().backward()
    same.refresh()
    torch.save((source.masks[None, (4, 4)], same.draw(16).keep, [p.grad for p in net.parameters()]), f"{out}.{rank}")
    dist.barrier()  # none leaves while another waits for it
    dist.destroy_process_group()


def test_ranks_draw_their_own_masks_and_agree_on_gradients(tmp_path):
    mp.spawn(_worker, (str(tmp_path / "rendezvous"), str(tmp_path / "out")), nprocs=2)
    (m0, k0, g0), (m1, k1, g1) = (torch.load(tmp_path / f"out.{rank}") for rank in (0, 1))
    assert not torch.equal(m0, m1) and torch.equal(k0, k1)
    assert all(torch.equal(a, b) for a, b in zip(g0, g1))


BAD_RATIOS = [(0, ValueError), (-0.5, ValueError), (1.5, ValueError), (math.nan, ValueError), (math.inf, ValueError),
              ("half", TypeError), (None, TypeError), (True, TypeError)]


@pytest.mark.parametrize("ratio, error", BAD_RATIOS)
def test_keep_ratio_errors(ratio, error):
    for make in (*(lambda r, f=f: f((4, 4), r) for f in S.SAMPLERS.values()), S.MaskSource,
                 lambda r: S.keep_probability("grid", 4, r)):
        with pytest.raises(error, match="keep_ratio"):
            make(ratio)


class Elsewhere(torch.Generator):
    device = torch.device("cuda")


def test_mask_errors():
    for call, error, word in [
        (lambda: S.grid_mask((14, 14), 0.4), ValueError, "keep_ratio.*0.5"),
        (lambda: S.grid_mask((14, 14), 0.6), ValueError, "keep_ratio"),
        (lambda: S.grid_mask((2, 2), 0.125), ValueError, "keep_ratio"),
        (lambda: S.grid_mask((8, 8), 0.5, start=2), ValueError, "start"),
        (lambda: S.grid_mask((8, 8), 0.5, lattice=(2, 2)), ValueError, "lattice"),
        (lambda: S.grid_mask((8, 8), 0.5, lattice=(1,)), ValueError, "lattice"),
        (lambda: S.grid_mask((8, 8), 0.5, lattice="hexagonal"), ValueError, "lattice"),
        (lambda: S.grid_mask((2, 2, 2), 0.5, lattice="spread"), ValueError, "lattice"),
        (lambda: S.grid_mask((0, 8), 0.5), ValueError, "size"),
        (lambda: S.random_mask(2.5, 0.5), TypeError, "size"),
        (lambda: S.bernoulli_mask(3, 1e-9), ValueError, "keep_ratio"),
        (lambda: S.spread_lattice(0), ValueError, "s:"),
        (lambda: S.keep_probability("stripes", 4, 0.5), ValueError, "mask"),
        (lambda: S.MaskSource(0.5, mask="stripes"), ValueError, "mask"),
        (lambda: S.MaskSource(0.5, mask="random", lattice="spread"), TypeError, "lattice"),
        (lambda: S.MaskSource(0.5, shared=False, base=(4, 4)), ValueError, "base: .*shared"),
        (lambda: S.MaskSource(0.5, generator=3), TypeError, "generator"),
        (lambda: S.MaskSource(0.5, generator=Elsewhere()), ValueError, "generator.*cuda"),
        (lambda: S.grid_mask((8, 8), 0.5, lattice=None), TypeError, "lattice"),
        (lambda: S.grid_mask((8, 8), 5e-324), ValueError, "keep_ratio"),
        (lambda: S.upsample_mask([True], 2), TypeError, "mask"),
        (lambda: S.keep_set([True]), TypeError, "mask"),
        (lambda: S.keep_set(torch.ones(4)), ValueError, "dtype"),
        (lambda: S.keep_set(torch.zeros(4, dtype=torch.bool)), ValueError, "none"),
        (lambda: S.keep_set(torch.ones(4, dtype=torch.bool), prob=0.0), ValueError, "prob"),
        (lambda: S.keep_set(torch.ones(4, dtype=torch.bool), prob=math.nan), ValueError, "prob"),
        (lambda: S.keep_set(torch.ones(4, dtype=torch.bool), prob=torch.ones(3)), ValueError, "prob"),
        (lambda: S.keep_set(torch.ones(4, dtype=torch.bool), n_prefix=-1), ValueError, "n_prefix"),
    ]:
        with pytest.raises(error, match=word):
            call()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        assert S.grid_mask((14, 14), 0.4, strict=False, start=0).sum() == 98
    assert "0.5" in str(caught[0].message)


def test_operation_errors():
    ks, x = S.keep_set(S.random_mask(9, 0.5)), normal(2, 9, 6)
    q = normal(2, 3, 9, 4)
    pool = lambda t: t.mean(-2, keepdim=True)
    for call, error, word in [
        (lambda: S.sbp_apply(mlp(), normal(2, 8, 6), ks), ValueError, "ks.*9.*8"),
        (lambda: S.sbp_apply(mlp(), x, [0, 1]), TypeError, "ks"),
        (lambda: S.sbp_apply(mlp(), x, ks, impl="magic"), ValueError, "impl"),
        (lambda: S.sbp_apply(mlp(), x, ks, dim=3), ValueError, "dim"),
        (lambda: S.sbp_apply(mlp(), x, ks, dim=(0, 2)), ValueError, "dim"),
        (lambda: S.sbp_apply(pool, x, ks), ValueError, "position-wise"),
        (lambda: S.sbp_apply(pool, x, ks, impl="hook"), ValueError, "fn"),
        (lambda: S.sbp_apply(lambda t: (t, t), x, ks), ValueError, "tuple"),
        (lambda: S.sbp_apply(nn.Sequential(nn.BatchNorm1d(9)), x, ks), TypeError, "BatchNorm1d"),
        (lambda: S.sbp_apply(nn.Conv1d(6, 6, 3, padding=1), x.mT, ks, dim=-1), TypeError, "Conv1d"),
        (lambda: S.SBP(nn.Sequential(nn.GroupNorm(3, 6)), S.MaskSource(0.5)), TypeError, "GroupNorm"),
        (lambda: S.SBP(nn.MultiheadAttention(6, 2), S.MaskSource(0.5)), TypeError, "MultiheadAttention"),
        (lambda: S.sbp_linear(normal(2, 8, 6), normal(5, 6), None, ks), ValueError, "ks"),
        (lambda: S.sbp_linear(normal(6), normal(5, 6), None, ks), ValueError, "dim"),
        (lambda: S.sbp_apply(mlp(), x.numpy(), ks), TypeError, "x: expected a tensor"),
        (lambda: S.sbp_apply(mlp(), x, ks, dim="last"), TypeError, "dim"),
        (lambda: S.sbp_conv2d(normal(1, 1, 3, 3), normal(1, 1, 3, 3), None, ks, padding="same"), TypeError, "padding"),
        (lambda: S.SBP(mlp(), None), TypeError, "source"),
        (lambda: S.SBP(mlp(), S.MaskSource(0.5), impl="magic"), ValueError, "impl"),
        (lambda: S.SBP(nn.Sequential(S.SBP(mlp(), S.MaskSource(0.5))), S.MaskSource(0.5)), TypeError, "SBP inside"),
        (lambda: S.SBP(lambda t: t, S.MaskSource(0.5)), TypeError, "fn"),
        (lambda: S.SBP(mlp(), S.MaskSource(0.5), n_prefix=-1), ValueError, "n_prefix"),
        (lambda: S.SBP(mlp(), S.MaskSource(0.5), dim=(1, 2), n_prefix=1), ValueError, "n_prefix"),
        (lambda: S.SBP(mlp(), S.MaskSource(0.5), size="ab"), TypeError, "size"),
        (lambda: S.SBP(nn.AvgPool1d(3, 1, 1), S.MaskSource(0.5)), TypeError, "AvgPool1d"),
        (lambda: S.sbp_apply(nn.GRU(6, 6), x.float(), ks), TypeError, "GRU"),
        (lambda: S.sbp_apply(lambda t: t.repeat(1, 1, 2, 1), normal(2, 3, 3, 6), ks, dim=(1, 2)), RuntimeError, "unflatten"),
        (lambda: S.sbp_conv2d(normal(1, 3, 3), normal(1, 1, 3, 3), None, ks, padding=1), ValueError, "x: expected"),
        (lambda: S.sbp_attention(q, q, q, ks, mode="keys"), ValueError, "mode"),
        (lambda: S.sbp_attention(q, q[..., 1:, :], q, ks), ValueError, "q, k, v"),
        (lambda: S.sbp_attention(q, q, q, ks, mode="head"), ValueError, "ks.*9.*3"),
        (lambda: S.sbp_conv2d(normal(1, 1, 4, 4), normal(1, 1, 3, 3), None, ks), ValueError, "ks"),
        (lambda: S.sbp_conv2d(normal(1, 1, 3, 3), normal(1, 1, 3, 3), None, ks, mode="taps"), ValueError, "mode"),
    ]:
        with pytest.raises(error, match=word):
            call()
    norm = nn.BatchNorm1d(6).double()
    y = S.sbp_apply(lambda t: norm(t.mT).mT, x, ks, impl="hook")  # hook takes any fn
    assert y.shape == x.shape


def test_a_keep_ratio_is_checked_when_it_is_set():
    source = S.MaskSource(0.5)
    with pytest.raises(ValueError, match="keep_ratio: expected a number in"): source.keep_ratio = 5
    assert source.keep_ratio == 0.5
    source.keep_ratio = 0.25
    source.refresh()
    assert len(source.draw(16).keep) == 4
