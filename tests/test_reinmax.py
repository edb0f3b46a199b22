"""ReinMax and its family: against formulas written out here, enumeration, and everything a user may throw at them."""
from datetime import timedelta
import copy
import io
import itertools
import math
import warnings

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from hypothesis import given, settings
from hypothesis import strategies as some

from altbp import reinmax as R
from altbp import reinmax_family as F

F64 = torch.float64
ONE_HOT = {  # name -> estimator that takes logits, sample, dim, generator
    "st": R.st, "st hot": lambda x, **k: R.st(x, 1.3, **k),
    "reinmax": R.reinmax, "reinmax hot": lambda x, **k: R.reinmax(x, 1.3, **k),
    "darn": R.darn, "beta": lambda x, **k: R.beta_st(x, 0.3, **k),
    "gumbel_rao": lambda x, **k: F.gumbel_rao(x, 0.5, k=3, **k),
    "gumbel_rao many": lambda x, **k: F.gumbel_rao(x, 0.5, k=40, chunk=16, **k),
    "gapped": F.gapped_st, "gapped p": lambda x, **k: F.gapped_st(x, gap="p", **k),
    "uniform": F.reinmax_uniform_baseline,
}
ALL = {**ONE_HOT, "stgs": lambda x, **k: F.st_gumbel_softmax(x, 0.7, **k)}


def gen(seed=0):
    return torch.Generator().manual_seed(seed)


def normal(*shape, seed=0, dtype=F64):
    return torch.randn(*shape, generator=gen(seed), dtype=F64).to(dtype)


def rel(a, b):
    return float((a - b).norm() / b.norm())


def J(q):
    return torch.diag(q) - torch.outer(q, q)


def matrix(name, theta, D, tau=1.0, beta=0.5):
    """The estimators' matrices, from their definitions."""
    pi, hot = theta.softmax(0), (theta / tau).softmax(0)
    S = torch.outer(D - pi, D - pi)
    return {"st": J(hot) / tau, "reinmax": 2 * J((D + hot) / 2) - J(pi) / 2, "darn": S,
            "beta": (1 - beta) * J(pi) + beta * S}[name]


def gradient(estimator, theta, D, g, **kwargs):
    x = theta.clone().requires_grad_()
    return torch.autograd.grad(estimator(x, sample=D, **kwargs), x, g)[0]


def joint(x):
    """A strongly bent function of two latents with three categories."""
    return torch.sin(2 * x.flatten(-2) @ normal(6, 6, seed=5)).sum(-1)


# The formulas ------------------------------------------------------------------------------------------------------

@settings(max_examples=25, deadline=None)
@given(some.integers(1, 7), some.integers(0, 10**6), some.sampled_from([0.5, 1.0, 1.3, 4.0]), some.floats(-1, 2))
def test_backward_is_the_matrix(n, seed, tau, beta):
    theta, g, D = 2 * normal(n, seed=seed), normal(n, seed=seed + 1), torch.eye(n, dtype=F64)[seed % n]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for name, f in (("st", R.st), ("reinmax", R.reinmax)):
            assert torch.allclose(gradient(f, theta, D, g, tau=tau), matrix(name, theta, D, tau) @ g, atol=1e-14)
    assert torch.allclose(gradient(R.darn, theta, D, g), matrix("darn", theta, D) @ g, atol=1e-14)
    assert torch.allclose(gradient(R.beta_st, theta, D, g, beta=beta), matrix("beta", theta, D, 1, beta) @ g, atol=1e-13)


def test_tau_one_agrees_with_the_general_path():
    theta, g, D = normal(4, 5), normal(4, 5, seed=1), R.reinmax(normal(4, 5), generator=gen())
    fast = gradient(R.reinmax, theta, D, g)
    assert torch.allclose(fast, gradient(R.reinmax, theta, D, g, tau=torch.tensor(1.0, dtype=F64)), atol=1e-15)


@pytest.mark.parametrize("name", ["st", "reinmax", "darn", "beta_st"])
def test_estimator_matrix(name):
    theta = normal(3, 4)
    D = R.reinmax(theta, generator=gen())
    M = R.estimator_matrix(name, theta, D, beta=0.5)
    for k in range(3):
        assert torch.allclose(M[k], matrix({"beta_st": "beta"}.get(name, name), theta[k], D[k]), atol=1e-15)
        if name != "beta_st":
            assert torch.allclose(R.backward_matrix(getattr(R, name), theta[k], sample=D[k]), M[k], atol=1e-15)
    with pytest.raises(ValueError, match="name"):
        R.estimator_matrix("magic", theta, D)


def test_mean_is_euler_and_heun_for_one_latent():
    theta, pi = normal(4), normal(4).softmax(0)
    W, v = normal(4, 4, seed=1), normal(4, seed=2)
    f = lambda x: torch.tanh(2 * x @ W.T + 0.3) @ v
    x = torch.eye(4, dtype=F64, requires_grad=True)
    g = torch.autograd.grad(f(x).sum(), x)[0]
    euler = heun = 0
    for i, j in itertools.product(range(4), repeat=2):
        e = torch.eye(4, dtype=F64)
        euler = euler + pi[j] * J(pi)[:, i] * (g[j] @ (e[i] - e[j]))
        heun = heun + pi[j] * J(pi)[:, i] * ((g[i] + g[j]) @ (e[i] - e[j])) / 2
    assert rel(R.expected_gradient(R.st, f, theta), euler) < 1e-12
    assert rel(R.expected_gradient(R.reinmax, f, theta), heun) < 1e-12


def test_mean_for_several_latents_is_the_conditional_heun():
    theta, e = normal(2, 3, seed=4), torch.eye(3, dtype=F64)
    pi, want = theta.softmax(-1), torch.zeros(2, 3, dtype=F64)
    g = torch.func.grad(joint)
    for a, b in itertools.product(range(3), repeat=2):
        for l, m in ((0, a), (1, b)):
            D = torch.stack([e[a], e[b]])
            want[l] += pi[0, a] * pi[1, b] * matrix("reinmax", theta[l], e[m]) @ g(D)[l]
    assert rel(R.expected_gradient(R.reinmax, joint, theta), want) < 1e-12


def test_exact_gradient_against_finite_differences():
    theta, d = normal(2, 3, seed=4), normal(2, 3, seed=6)

    def loss(x):
        p = x.softmax(-1)
        e = torch.eye(3, dtype=F64)
        return sum(p[0, a] * p[1, b] * joint(torch.stack([e[a], e[b]])) for a in range(3) for b in range(3))

    slope = (loss(theta + 1e-5 * d) - loss(theta - 1e-5 * d)) / 2e-5
    assert abs((R.exact_gradient(joint, theta) * d).sum() - slope) < 1e-8
    assert abs(R.expectation(joint, theta) - loss(theta)) < 1e-14


def test_expectation_trains_the_function_too_and_takes_batches():
    theta, w = normal(7, 2, 3), normal(6, seed=1).requires_grad_()
    values = R.expectation(lambda x: (x.flatten(-2) @ w).tanh(), theta)
    assert values.shape == (7,)
    values.sum().backward()
    assert w.grad.abs().sum() > 0
    f = lambda x: (x.flatten(-2) @ w.detach()).tanh()
    one_by_one = torch.stack([R.exact_gradient(f, t) for t in theta])
    assert torch.allclose(R.exact_gradient(f, theta), one_by_one, atol=1e-14)
    with pytest.raises(ValueError, match="max_states"):
        R.exact_gradient(f, normal(9, 3))
    with pytest.raises(ValueError, match="f:"):
        R.expectation(lambda x: x, theta)


def test_exactness_classes():
    theta, A, c = normal(5), normal(5, 5, seed=1), normal(5, seed=2)
    quadratic, cubic = (lambda x: (x @ A * x).sum(-1) + x @ c), (lambda x: (x @ A).pow(3).sum(-1))
    error = lambda e, f, **k: rel(R.expected_gradient(e, f, theta, **k), R.exact_gradient(f, theta))
    assert max(error(e, lambda x: x @ c) for e in (R.st, R.reinmax, R.darn)) < 1e-12
    assert error(R.reinmax, quadratic) < 1e-12 and error(F.reinmax_uniform_baseline, quadratic) < 1e-12
    assert min(error(R.st, quadratic), error(R.darn, quadratic), error(R.reinmax, cubic)) > 1e-3
    assert error(R.reinmax, lambda x: x @ c, tau=1.3) > 1e-3


# Noise and samples --------------------------------------------------------------------------------------------------

def test_draws_follow_the_softmax_and_the_generator():
    theta = torch.tensor([1.0, -math.inf, 0.0, -2.0], dtype=F64).expand(200_000, 4)
    for name, f in ALL.items():
        if name in ("gumbel_rao many", "gumbel_rao", "gapped p"): continue
        D = f(theta, generator=gen(3))
        pi = theta[0].softmax(0)
        z = (D.mean(0) - pi).abs() / (pi * (1 - pi) / len(D)).sqrt().clamp_min(1e-12)
        assert z.max() < 4.5, name
        assert torch.equal(D, f(theta, generator=gen(3))), name
        assert not torch.equal(D, f(theta, generator=gen(4))), name


def test_improbable_categories_are_drawn_but_impossible_ones_are_not():
    tiny = torch.tensor([0.0, -12.0]).expand(1_000_000, 2)  # p = 6.1e-6
    assert 1 <= R.reinmax(tiny, generator=gen())[:, 1].sum() <= 20
    edge = torch.tensor([-math.inf, 0.0, -math.inf]).expand(100_000, 3)
    assert (R.reinmax(edge, generator=gen()) == torch.tensor([0.0, 1.0, 0.0])).all()


@pytest.mark.parametrize("k, n", [(3, 5), (64, 5), (7, 2)])
def test_gumbel_rao_backward_is_the_mean_over_its_draws(k, n):
    theta, D = normal(n), torch.eye(n, dtype=F64)[1]
    s = F._conditional(theta.softmax(0)[None], torch.tensor([[1]]), k, 0.5, gen(2))[0]
    want = torch.stack([J(q) for q in s]).mean(0) / 0.5
    got = R.backward_matrix(F.gumbel_rao, theta, sample=D, tau=0.5, k=k, generator=gen(2))
    assert torch.allclose(got, want, atol=1e-13)
    assert (s.argmax(-1) == 1).all()


def test_gumbel_rao_chunks_have_the_same_law():
    theta, D = normal(3), torch.eye(3, dtype=F64)[0]
    a = R.backward_matrix(F.gumbel_rao, theta, sample=D, tau=0.5, k=100_000, generator=gen(2))
    b = R.backward_matrix(F.gumbel_rao, theta, sample=D, tau=0.5, k=100_000, chunk=7001, generator=gen(5))
    assert rel(a, b) < 0.02


def test_cold_gumbel_rao_is_reinmax():
    theta = normal(4)
    for D in torch.eye(4, dtype=F64):
        cold = R.backward_matrix(F.gumbel_rao, theta, sample=D, tau=0.01, k=400_000, generator=gen(1))
        assert rel(cold, matrix("reinmax", theta, D)) < 0.05


def test_cold_gumbel_softmax_has_no_nan():
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        x = (50 * normal(1000, 6)).to(dtype).requires_grad_()
        y = F.st_gumbel_softmax(x, 1e-4, generator=gen())
        y.float().pow(2).sum().backward()
        assert y.isfinite().all() and x.grad.isfinite().all()
    soft = F.st_gumbel_softmax(normal(50, 6), 0.5, hard=False, generator=gen())
    assert torch.allclose(soft.sum(-1), torch.ones(50, dtype=F64)) and soft.max() < 1


def test_gapped_st_puts_the_winner_on_top():
    x, D = torch.tensor([0.0, 2.0, 1.9, -5.0], dtype=F64), torch.tensor([1.0, 0, 0, 0], dtype=F64)
    shifted = torch.tensor([2.0, 1.0, 1.0, -5.0], dtype=F64)
    assert torch.allclose(R.backward_matrix(F.gapped_st, x, sample=D), J(shifted.softmax(0)), atol=1e-14)


def pairs_of(theta):
    states = R.one_hot_states(*theta.shape)
    p = (states * theta.log_softmax(-1)).sum((-1, -2)).exp()
    a, b = torch.cartesian_prod(torch.arange(len(p)), torch.arange(len(p))).T
    return torch.stack([states[a], states[b]]), p[a] * p[b]


def mean_over_pairs(theta, surrogate):
    pairs, weight = pairs_of(theta)
    x = theta.expand(len(weight), *theta.shape).clone().requires_grad_()
    return torch.autograd.grad((weight * surrogate(pairs, x)).sum(), x)[0].sum(0)


def test_two_sample_estimators_by_enumeration():
    theta = normal(2, 3, seed=4)
    exact, heun = R.exact_gradient(joint, theta), R.expected_gradient(R.reinmax, joint, theta)
    on = lambda make: lambda D, x: (lambda s: F.debiased_surrogate(joint(s), s, x))(make(D, x))
    loo = lambda D, x: F.reinmax_loo(x, 2, sample=D)
    plain = lambda D, x: R.reinmax(x.expand(2, *x.shape), sample=D)
    assert rel(heun, exact) > 0.5
    assert rel(mean_over_pairs(theta, lambda D, x: joint(loo(D, x)).mean(0)), heun) < 1e-12
    assert rel(mean_over_pairs(theta, on(loo)), exact) < 1e-12
    assert rel(mean_over_pairs(theta, on(plain)), exact) < 1e-12
    assert rel(mean_over_pairs(theta, lambda D, x: F.rloo_surrogate(joint(D), D, x)), exact) < 1e-12
    assert rel(mean_over_pairs(theta, lambda D, x: F.reinforce_surrogate(joint(D), D, x, 3.0)), exact) < 1e-12


@pytest.mark.parametrize("method", ["reinforce", "rloo", "debiased"])
def test_multi_sample_is_unbiased_with_three_samples(method):
    theta = normal(2, 3, seed=4)
    report = F.gradient_report(joint, theta, {"m": lambda f, x: F.multi_sample(f, x, 3, method, gen(1))}, n=40_000)["m"]
    assert report["raw_bias"] < 3 * report["std"] / 200


def test_path_sampler_is_unbiased():
    theta, g = normal(2, 3, seed=4), gen(1)
    report = F.gradient_report(joint, theta, {"p": lambda f, x: F.path_surrogate(f, x, k=2, generator=g)}, n=40_000)["p"]
    assert report["raw_bias"] < 3 * report["std"] / 200


def test_surrogates_keep_the_value_and_the_decoder_gradient():
    theta, w = normal(4, 2, 3).requires_grad_(), normal(6, seed=1).requires_grad_()
    f = lambda D: (D.flatten(-2) @ w).tanh()
    for method in ("reinforce", "rloo", "reinmax", "reinmax_loo", "debiased"):
        out = F.multi_sample(f, theta, 3, method, gen(7))
        D = R.reinmax(theta.detach().expand(3, 4, 2, 3), generator=gen(7))
        assert out.shape == (4,) and torch.allclose(out, f(D).mean(0))
        got = torch.autograd.grad(out.sum(), (w, theta))
        assert torch.allclose(got[0], torch.autograd.grad(f(D).mean(0).sum(), w)[0])
        assert got[1].abs().sum() > 0


def test_masked_logits_in_surrogates():
    theta = normal(2, 3, seed=4).index_fill(1, torch.tensor([1]), -math.inf)
    for method in ("reinforce", "rloo", "reinmax", "reinmax_loo", "debiased"):
        x = theta.clone().requires_grad_()
        F.multi_sample(joint, x, 4, method, gen(1)).backward()
        assert x.grad.isfinite().all() and (x.grad[:, 1] == 0).all()
    small = theta[:, [0, 2]]
    embed = lambda D: joint(torch.stack([D[..., 0], torch.zeros_like(D[..., 0]), D[..., 1]], -1))
    assert torch.allclose(R.exact_gradient(joint, theta)[:, [0, 2]], R.exact_gradient(embed, small), atol=1e-14)
    assert torch.allclose(R.expected_gradient(R.reinmax, joint, theta)[:, [0, 2]],
                          R.expected_gradient(R.reinmax, embed, small), atol=1e-14)


def test_report_takes_the_noise_out_of_the_bias():
    theta, c = normal(5), normal(5, seed=1)
    raw, corrected = [], []
    for s in range(60):
        r = F.gradient_report(lambda x: x @ c, theta, {"r": F.pathwise(R.reinmax, generator=gen(s))}, n=50, chunk=20)["r"]
        raw.append(r["raw_bias"])
        corrected.append(r["bias"])
    assert min(raw) > 0 and sum(c == 0 for c in corrected) > 15 and sum(corrected) < 0.6 * sum(raw)


# Shapes, types, masks -----------------------------------------------------------------------------------------------

@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_output_is_exactly_one_hot(name, dtype):
    x = (4 * normal(50, 7)).to(dtype).requires_grad_()
    y = ALL[name](x, generator=gen())
    y.backward(normal(50, 7, seed=1).to(dtype))
    assert y.dtype == x.dtype and x.grad.dtype == dtype and x.grad.isfinite().all() and x.grad.abs().sum() > 0
    assert set(y.detach().unique().tolist()) == {0.0, 1.0} and (y.sum(-1) == 1).all()


@pytest.mark.parametrize("name", ONE_HOT)
def test_dim_and_layout(name):
    f, x = ONE_HOT[name], normal(3, 4, 5)
    for dim in (0, 1, -1, -2):
        D = R.reinmax(x, dim=dim, generator=gen())
        assert (D.sum(dim) == 1).all()
        g = normal(3, 4, 5, seed=1)
        here = gradient(f, x, D, g, dim=dim, generator=gen(9))
        moved = [t.movedim(dim, -1).contiguous() for t in (x, D, g)]
        assert torch.allclose(here.movedim(dim, -1), gradient(f, *moved, generator=gen(9)), atol=1e-14)
    strided = x.transpose(0, 2)
    assert not strided.is_contiguous()
    D = R.reinmax(strided, generator=gen())
    one = gradient(f, strided.contiguous(), D, g.transpose(0, 2), generator=gen(9))
    assert torch.allclose(gradient(f, strided, D, g.transpose(0, 2), generator=gen(9)), one, atol=1e-15)


@pytest.mark.parametrize("name", ALL)
def test_degenerate_shapes(name):
    f = ALL[name]
    assert f(torch.zeros(0, 5)).shape == (0, 5) and f(torch.zeros(3, 0, 5)).shape == (3, 0, 5)
    x = torch.zeros(2, 1, requires_grad=True)
    y = f(x)
    y.sum().backward()
    assert (y == 1).all() and x.grad.abs().max() <= 2**-23  # β rounds in single precision
    assert f(torch.zeros(4)).sum() == 1


@pytest.mark.parametrize("name", ALL)
def test_masked_categories(name):
    x = normal(64, 6, dtype=torch.float32)
    x[:, 2], x[::2, 4] = -math.inf, -math.inf
    x.requires_grad_()
    y = ALL[name](x, generator=gen())
    g = normal(64, 6, seed=1, dtype=torch.float32).masked_fill(x == -math.inf, math.nan)
    y.backward(g)
    dead = x == -math.inf
    assert (y[dead] == 0).all() and (x.grad[dead] == 0).all() and x.grad.isfinite().all() and x.grad.abs().sum() > 0


@pytest.mark.parametrize("name", ["st", "reinmax", "st hot", "reinmax hot", "darn", "uniform"])
def test_masking_equals_leaving_out(name):
    x, g, keep = normal(5), normal(5, seed=1), [0, 1, 3]
    x[2], x[4] = -math.inf, -math.inf
    D = torch.tensor([0, 1.0, 0, 0, 0], dtype=F64)
    assert torch.allclose(gradient(ONE_HOT[name], x, D, g)[keep], gradient(ONE_HOT[name], x[keep], D[keep], g[keep]), atol=1e-15)


def test_temperature_as_tensor():
    x, D, g = normal(4, 5), R.reinmax(normal(4, 5), generator=gen()), normal(4, 5, seed=1)
    tau = torch.tensor([[1.0], [1.2], [1.5], [2.0]], dtype=F64)
    for f in (R.st, R.reinmax):
        rows = torch.stack([gradient(f, x[i], D[i], g[i], tau=tau[i].item()) for i in range(4)])
        assert torch.allclose(gradient(f, x, D, g, tau=tau), rows, atol=1e-14)
        moved = gradient(f, x.T.contiguous(), D.T, g.T, tau=tau.T, dim=0)
        assert torch.allclose(moved.T, rows, atol=1e-14)
    assert F.gumbel_rao(x, tau, k=9).shape == F.st_gumbel_softmax(x, tau).shape == (4, 5)
    with pytest.raises(ValueError, match="tau"):
        R.reinmax(x, torch.ones(3))


def test_probabilities_come_along_and_are_differentiable():
    x = normal(3, 4).requires_grad_()
    D, p = R.reinmax(x, return_probs=True, generator=gen())
    assert torch.equal(p, x.softmax(-1))
    h, g = normal(3, 4, seed=1), normal(3, 4, seed=2)
    both = torch.autograd.grad((D * g).sum() + (p * h).sum(), x)[0]
    y = x.detach().clone().requires_grad_()
    alone = torch.autograd.grad((y.softmax(-1) * h).sum(), y)[0]
    assert torch.allclose(both, alone + gradient(R.reinmax, x.detach(), D.detach(), g), atol=1e-14)
    hard, soft = R.reinmax_compat(x, 1.3)
    assert soft.requires_grad and (hard.sum(-1) == 1).all()


# Bernoulli ----------------------------------------------------------------------------------------------------------

def test_bernoulli_is_half_the_other_probability():
    a, b = normal(20).requires_grad_(), (normal(20, seed=1) > 0).to(F64)
    out, p = R.reinmax_bernoulli(a, sample=b, return_probs=True)
    grad = torch.autograd.grad(out.sum(), a)[0]
    assert torch.equal(out, b) and torch.allclose(grad, 0.5 * torch.where(b > 0, 1 - p, p), atol=1e-15)


def test_bernoulli_is_two_category_reinmax():
    a, g = normal(9), normal(9, seed=1)
    for v in (0.0, 1.0):
        b = torch.full_like(a, v)
        two = torch.stack([a, torch.zeros_like(a)], -1)
        D, G = torch.stack([b, 1 - b], -1), torch.stack([g, torch.zeros_like(g)], -1)
        x = a.clone().requires_grad_()
        one = torch.autograd.grad(R.reinmax_bernoulli(x, sample=b), x, g)[0]
        assert torch.allclose(one, gradient(R.reinmax, two, D, G)[:, 0], atol=1e-15)


def test_bernoulli_edges():
    a = torch.tensor([math.inf, -math.inf, 0.0], requires_grad=True)
    out = R.reinmax_bernoulli(a, generator=gen())
    out.sum().backward()
    assert out[0] == 1 and out[1] == 0 and (a.grad[:2] == 0).all() and a.grad[2] == 0.25
    assert R.reinmax_bernoulli(torch.zeros(0)).shape == (0,)
    for bad, error, word in ((torch.tensor([1]), TypeError, "logits"), (torch.tensor([math.nan]), ValueError, "NaN")):
        with pytest.raises(error, match=word): R.reinmax_bernoulli(bad)
    with pytest.raises(ValueError, match="sample"): R.reinmax_bernoulli(a, sample=torch.full((3,), 0.5))
    with pytest.raises(ValueError, match="sample"): R.reinmax_bernoulli(a, sample=torch.ones(2))


# Transforms ---------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("name", ALL)
def test_func_grad_and_vmap(name):
    f, x, w = ALL[name], normal(6, 4), normal(4, seed=1)
    grad = torch.func.vmap(torch.func.grad(lambda row: (f(row) * w).sum()), randomness="different")(x)
    assert grad.shape == (6, 4) and grad.sum(1).abs().max() < 1e-14 and grad.abs().sum() > 0
    torch.manual_seed(3)
    one = torch.func.grad(lambda t: (f(t) * w).sum())(x)
    torch.manual_seed(3)
    y = x.clone().requires_grad_()
    (f(y) * w).sum().backward()
    assert torch.equal(one, y.grad)


@pytest.mark.parametrize("name", [n for n in ONE_HOT if "rao" not in n])  # that one draws noise of its own
def test_vmap_with_given_samples_equals_the_batch(name):
    f, x, g = ONE_HOT[name], normal(6, 4), normal(6, 4, seed=1)
    D = R.reinmax(x, generator=gen())
    rows = torch.func.vmap(torch.func.grad(lambda t, d, c: (f(t, sample=d) * c).sum()))(x, D, g)
    assert torch.allclose(rows, gradient(f, x, D, g), atol=1e-15)


@pytest.mark.parametrize("name", ["st", "reinmax", "reinmax hot", "gumbel_rao", "gapped p", "uniform", "stgs"])
def test_compile_without_graph_breaks(name):
    torch.compiler.reset()
    x, g = normal(5, 4, dtype=torch.float32).requires_grad_(), normal(5, 4, seed=1, dtype=torch.float32)
    D = R.reinmax(x.detach(), generator=gen())
    f = ALL[name]
    y = torch.compile(f, fullgraph=True, backend="aot_eager")(x)
    grad, = torch.autograd.grad(y, x, g)
    assert (y.sum(-1) == 1).all() and grad.isfinite().all() and grad.abs().sum() > 0
    if name in ("stgs", "gumbel_rao", "gumbel_rao many"): return
    y = torch.compile(lambda t: f(t, sample=D), fullgraph=True, backend="aot_eager")(x)
    assert torch.allclose(torch.autograd.grad(y, x, g)[0], gradient(f, x.detach(), D, g), atol=1e-6)


def test_autocast():
    layer, x = torch.nn.Linear(8, 5), normal(16, 8, dtype=torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        logits = layer(x)
        y = R.reinmax(logits)
        loss = (y @ normal(5, 3, dtype=torch.float32)).float().pow(2).mean()
    loss.backward()
    assert logits.dtype == y.dtype == torch.bfloat16 and (y.sum(-1) == 1).all()
    assert layer.weight.grad.isfinite().all() and layer.weight.grad.abs().sum() > 0


def test_checkpointing_with_a_given_sample():
    from torch.utils.checkpoint import checkpoint
    x, g = normal(3, 4).requires_grad_(), normal(3, 4, seed=1)
    D = R.reinmax(x.detach(), generator=gen())
    y = checkpoint(lambda t: R.reinmax(t * 1.0, sample=D), x, use_reentrant=False)
    assert torch.allclose(torch.autograd.grad(y, x, g)[0], gradient(R.reinmax, x.detach(), D, g))


@pytest.mark.parametrize("name, tau", [("st", 1.0), ("st", 1.3), ("reinmax", 1.0), ("reinmax", 1.3), ("darn", 1.0)])
def test_double_backward_differentiates_the_estimate(name, tau):
    x, D, v, c = normal(4).requires_grad_(), torch.eye(4, dtype=F64)[2], normal(4, seed=1), normal(4, seed=2)
    f = getattr(R, name)
    kwargs = {} if name == "darn" else {"tau": tau}
    first, = torch.autograd.grad(f(x, sample=D, **kwargs) @ c + x.pow(3).sum(), x, create_graph=True)
    second, = torch.autograd.grad(first @ v, x)
    y = x.detach().clone().requires_grad_()
    want, = torch.autograd.grad((matrix(name, y, D, tau) @ c + 3 * y**2) @ v, y)
    assert torch.allclose(second, want, atol=1e-13)


@pytest.mark.parametrize("make", [lambda x: F.gumbel_rao(x, 0.5, k=4), lambda x: F.gumbel_rao(x, 0.5, k=40)])
def test_double_backward_is_refused_where_noise_is_fixed(make):
    x, c = normal(3, 5).requires_grad_(), normal(5, seed=1)
    loss = (make(x) @ c).sum() + x.pow(2).sum()
    first, = torch.autograd.grad(loss, x, create_graph=True)
    with pytest.raises(NotImplementedError, match="second derivative"):
        first.sum().backward()


def test_double_backward_of_surrogates_is_refused():
    x = normal(2, 3).requires_grad_()
    for loss in (F.multi_sample(joint, x, 3, "rloo"), F.path_surrogate(joint, x)):
        first, = torch.autograd.grad(loss + x.pow(2).sum(), x, create_graph=True)
        with pytest.raises(NotImplementedError, match="second derivative"):
            first.sum().backward()


def _rank_net(rank):
    torch.manual_seed(0)
    net = torch.nn.Sequential(torch.nn.Linear(3, 4), R.ReinMax(1.1), torch.nn.Linear(4, 1))
    return net, lambda model: (torch.manual_seed(rank), model(torch.randn(8, 3)).pow(2).mean().backward())


def _rank(rank, file, out):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{file}", rank=rank, world_size=2, timeout=timedelta(seconds=120))
    net, step = _rank_net(rank)
    step(torch.nn.parallel.DistributedDataParallel(net))
    torch.save([p.grad for p in net.parameters()], f"{out}.{rank}")
    dist.barrier()  # none leaves while another waits for it
    dist.destroy_process_group()


def test_ddp_averages_the_gradients(tmp_path):
    mp.spawn(_rank, (str(tmp_path / "rendezvous"), str(tmp_path / "out")), nprocs=2)
    both = [torch.load(tmp_path / f"out.{rank}") for rank in (0, 1)]
    single = []
    for rank in range(2):
        net, step = _rank_net(rank)
        step(net)
        single.append([p.grad for p in net.parameters()])
    for a, b, one, two in zip(*both, *single):
        assert torch.equal(a, b) and torch.allclose(a, (one + two) / 2, atol=1e-6)


# Modules and the distribution ---------------------------------------------------------------------------------------

MODULES = [R.StraightThrough(1.2), R.ReinMax(1.1, dim=1), R.BernoulliReinMax(), F.StraightThroughGumbelSoftmax(0.5),
           F.GumbelRao(0.5, k=4), F.GappedST(gap="p")]


@pytest.mark.parametrize("module", MODULES, ids=lambda m: type(m).__name__)
def test_modules(module):
    x = normal(3, 4, 5).requires_grad_()
    y = module(x)
    y.pow(2).sum().backward()
    assert set(y.unique().tolist()) <= {0.0, 1.0} and x.grad.isfinite().all()
    assert repr(module).count("=") >= 1 and not module.state_dict()
    buffer = io.BytesIO()
    torch.save(copy.deepcopy(module), buffer)
    buffer.seek(0)
    assert repr(torch.load(buffer, weights_only=False)) == repr(module)
    assert torch.equal(module(x, generator=gen(1)), module(x, generator=gen(1)))


@pytest.mark.parametrize("cls", [R.StraightThrough, R.ReinMax, F.GumbelRao, F.GappedST])
def test_deterministic_evaluation(cls):
    x = normal(30, 4)
    mode = torch.nn.functional.one_hot(x.argmax(-1), 4).to(F64)
    layer = cls(deterministic_eval=True)
    assert torch.equal(layer.eval()(x), mode) and not torch.equal(layer.train()(x, generator=gen()), mode)
    assert not torch.equal(cls().eval()(x, generator=gen()), mode)
    bits = R.BernoulliReinMax(deterministic_eval=True).eval()
    assert torch.equal(bits(x), (x > 0).to(F64))


def test_distribution():
    logits = normal(3, 4).requires_grad_()
    d = R.OneHotCategoricalReinMax(logits=logits, temperature=1.2)
    y = d.rsample((5,))
    assert d.has_rsample and y.shape == (5, 3, 4) and d.log_prob(y).shape == (5, 3)
    g = normal(5, 3, 4, seed=1)
    got, = torch.autograd.grad(y, logits, g)
    want = gradient(R.reinmax, logits.detach().expand(5, 3, 4), y.detach(), g, tau=1.2).sum(0)
    assert torch.allclose(got, want, atol=1e-14)
    wide = d.expand((2, 3))
    assert wide.temperature == 1.2 and wide.rsample().shape == (2, 3, 4) and type(wide) is type(d)
    assert torch.distributions.Independent(d, 1).rsample().shape == (3, 4)
    p = R.OneHotCategoricalReinMax(probs=torch.tensor([0.2, 0.8])).rsample((4,))
    assert p.shape == (4, 2)
    with pytest.raises(ValueError, match="tau"):
        R.OneHotCategoricalReinMax(logits=logits, temperature=0.0)


# Errors -------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("name", ALL)
def test_bad_logits(name):
    f = ALL[name]
    for bad, error, word in [
        (torch.tensor([[1, 2]]), TypeError, "logits: expected a floating"), ([[1.0, 2.0]], TypeError, "logits"),
        (torch.tensor([[0.0, math.nan]]), ValueError, "logits.*NaN"), (torch.tensor([[0.0, math.inf]]), ValueError, r"logits.*\+inf"),
        (torch.tensor([[0.0, 1.0], [-math.inf] * 2]), ValueError, "logits.*throughout"),
        (torch.zeros(3, 0), ValueError, "logits: no category"), (torch.tensor(1.0), ValueError, "dim"),
    ]:
        with pytest.raises(error, match=word): f(bad)
    with pytest.raises(ValueError, match="dim"): f(torch.zeros(2, 3), dim=2)


@pytest.mark.parametrize("f", [R.st, R.reinmax, F.st_gumbel_softmax, F.gumbel_rao, F.gapped_st])
def test_bad_temperature(f):
    for tau in (0.0, -1.0, math.nan, math.inf, torch.tensor(0.0), torch.tensor([1.0, math.nan, 1.0])):
        with pytest.raises(ValueError, match="tau"): f(torch.zeros(2, 3), tau)
    for tau in ("1", None, True):
        with pytest.raises(TypeError, match="tau"): f(torch.zeros(2, 3), tau)


@pytest.mark.parametrize("name", ONE_HOT)
def test_bad_samples(name):
    x = torch.tensor([[0.0, 1.0, -math.inf], [0.0, 0.0, 0.0]])
    for bad, word in [(torch.ones(2, 3), "one-hot"), (torch.zeros(2, 3), "one-hot"), (torch.full((2, 3), 1 / 3), "one-hot"),
                      (torch.eye(3), "shape"), (torch.tensor([[0, 0, 1.0], [1, 0, 0]]), "-inf"), ("D", "shape")]:
        with pytest.raises(ValueError, match=f"sample.*{word}"): ONE_HOT[name](x, sample=bad)


def test_other_bad_arguments():
    x = normal(2, 3)
    for k in (0, -1, 1.5):
        with pytest.raises(ValueError, match="k:"): F.gumbel_rao(x, k=k)
    with pytest.raises(ValueError, match="chunk"): F.gumbel_rao(x, k=4, chunk=0)
    for k in (1, 0, 2.5):
        with pytest.raises(ValueError, match="k:"): F.reinmax_loo(x, k)
    for gap in (-1.0, math.nan, "q"):
        with pytest.raises(ValueError, match="gap"): F.gapped_st(x, gap=gap)
    with pytest.raises(ValueError, match="beta"): R.beta_st(x, math.nan)
    with pytest.raises(ValueError, match="method"): F.multi_sample(joint, x, 3, "magic")
    with pytest.raises(ValueError, match="k:"): F.path_surrogate(joint, x, k=0)
    D = R.reinmax(x.expand(3, 2, 3))
    with pytest.raises(ValueError, match="values: expected k >= 2"): F.rloo_surrogate(joint(D[:1]), D[:1], x)
    with pytest.raises(ValueError, match="samples"): F.rloo_surrogate(joint(D), D, x[:1])
    with pytest.raises(ValueError, match="values"): F.rloo_surrogate(torch.zeros(3, 5), D, x)
    with pytest.raises(ValueError, match="samples"): F.debiased_surrogate(joint(D), D, x)
    attached = R.reinmax(x.expand(3, 2, 3).clone().requires_grad_())
    with pytest.raises(ValueError, match="samples"): F.reinforce_surrogate(joint(attached), attached, x)


def test_cold_temperature_warns_in_st_and_reinmax_only():
    for f in (R.st, R.reinmax):
        with pytest.warns(UserWarning, match="tau"): f(torch.zeros(3), 0.5)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        F.st_gumbel_softmax(torch.zeros(3), 0.5)
        R.reinmax(torch.zeros(3), 1.5)


def test_validation_can_be_left_out():
    x = normal(4, 5).requires_grad_()
    D = R.reinmax(x, validate=False, generator=gen())
    assert torch.equal(D, R.reinmax(x, generator=gen()))
    a, = torch.autograd.grad(D.pow(2) @ normal(5), x, torch.ones(4, dtype=F64))
    b, = torch.autograd.grad(R.reinmax(x, sample=D.detach()).pow(2) @ normal(5), x, torch.ones(4, dtype=F64))
    assert torch.equal(a, b)


def test_memory_keeps_probabilities_and_index_only():
    x, saved = normal(64, 100).requires_grad_(), {}
    def pack(t):
        saved[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        R.reinmax(x)
    assert sum(saved.values()) == 64 * 100 * 8 + 64 * 8


# What a hostile user found ------------------------------------------------------------------------------------------

BAD_ROWS = [([0.0, math.nan], "a NaN"), ([0.0, math.inf], r"\+inf"), ([-math.inf, -math.inf], "throughout")]


@pytest.mark.parametrize("row, word", BAD_ROWS, ids=["nan", "inf", "masked"])
def test_enumeration_refuses_rows_without_a_distribution(row, word):
    f = lambda x: x[..., 0, 0]
    x = torch.tensor([[0.0, 1.0], row])
    for call in (R.expectation, R.exact_gradient, lambda f, x: R.expected_gradient(R.st, f, x)):
        with pytest.raises(ValueError, match=f"logits.*{word}"): call(f, x)
    with pytest.raises(ValueError, match=f"logits.*{word}"): R.expectation(lambda x: x[..., 0], x[1])


@pytest.mark.parametrize("bad", [math.inf, -math.inf, math.nan])
def test_values_at_impossible_states_do_not_matter(bad):
    theta = torch.tensor([[0.3, -math.inf, 1.0], [0.2, -0.7, -math.inf]], dtype=F64)
    f = lambda s: torch.where((s[..., 0, 1] + s[..., 1, 2]) > 0, bad, joint(s))
    x = theta.clone().requires_grad_()
    value = R.expectation(f, x)
    value.backward()
    zero = lambda s: torch.where((s[..., 0, 1] + s[..., 1, 2]) > 0, 0.0, joint(s))
    assert torch.allclose(value, R.expectation(zero, theta)) and x.grad.isfinite().all()
    assert torch.allclose(x.grad, R.exact_gradient(zero, theta)) and torch.equal(x.grad, R.exact_gradient(f, theta))
    assert R.expected_gradient(R.reinmax, f, theta).isfinite().all()


def test_impossible_states_leave_the_parameters_of_f_alone():
    theta = torch.tensor([[[0.3, -math.inf, 1.0]], [[0.5, 0.1, -math.inf]], [[0.0, 0.2, -0.3]]], dtype=F64)
    w = torch.tensor([[1.0, 0.0, 2.0], [1.0, 2.0, 0.0], [1.0, 2.0, 3.0]], dtype=F64, requires_grad=True)
    f = lambda s: (s[..., 0, :] * w).sum(-1).log()  # log 0 and its slope at the impossible states
    R.expectation(f, theta).sum().backward()
    pi = theta[:, 0].softmax(-1)
    assert torch.allclose(w.grad, torch.where(pi > 0, pi / w.detach(), 0), atol=1e-15)


def test_a_mask_in_one_row_does_not_change_another():
    theta = normal(2, 2, 3)
    theta[0, 0, 1] = -math.inf
    for f in (R.exact_gradient, lambda f, x: R.expected_gradient(R.reinmax, f, x)):
        rows = torch.stack([f(joint, row) for row in theta])
        assert torch.allclose(f(joint, theta), rows, atol=1e-14)


def test_values_of_the_wrong_shape_are_refused_everywhere():
    x, bad = normal(2, 3).requires_grad_(), lambda D: D.sum(-1)  # (..., L): not summed over the latents
    for call in (lambda: R.expectation(bad, x), lambda: R.expected_gradient(R.reinmax, bad, x),
                 lambda: F.gradient_samples(bad, x, F.pathwise(R.reinmax), 5),
                 lambda: F.gradient_report(bad, x, {"r": F.pathwise(R.reinmax)}, exact=normal(2, 3)),
                 lambda: F.path_surrogate(bad, x), lambda: R.expected_gradient(R.st, lambda D: 1.0, x),
                 *[lambda m=m: F.multi_sample(lambda D: D, x, 3, m) for m in ("rloo", "reinmax", "debiased")],
                 *[lambda m=m: F.multi_sample(lambda D: D.sum(), x, 3, m) for m in ("reinforce", "reinmax_loo")],
                 lambda: F.gradient_samples(joint, x, lambda f, x: f(R.st(x)).mean(), 5)):
        with pytest.raises(ValueError, match="f: expected values of shape"): call()
    with pytest.raises(ValueError, match="exact: expected"):
        F.gradient_report(joint, x, {"r": F.pathwise(R.reinmax)}, exact=normal(3))


def test_values_without_a_gradient_are_refused_by_name():
    x, code = normal(2, 3).requires_grad_(), normal(3, seed=1)
    lookup = lambda D: code[D.argmax(-1)].sum(-1)
    for call in (lambda: R.expected_gradient(R.reinmax, lookup, x), lambda: F.path_surrogate(lookup, x),
                 lambda: F.gradient_samples(lookup, x, F.pathwise(R.reinmax), 4)):
        with pytest.raises(ValueError, match="f: its values carry no gradient"): call()
    w = normal(1).requires_grad_()
    for f in (lookup, lambda D: lookup(D) * w):
        with pytest.raises(ValueError, match="values: its values carry no"): F.multi_sample(f, x, 3, "debiased")


def test_counts():
    x = normal(2, 3)
    for bad in (0, -1, 2.5, True, "3"):
        for method in ("reinforce", "reinmax"):
            with pytest.raises(ValueError, match="k:"): F.multi_sample(joint, x, bad, method)
        for call in (lambda: F.GumbelRao(k=bad), lambda: F.path_surrogate(joint, x, k=bad), lambda: F.gumbel_rao(x, k=bad)):
            with pytest.raises(ValueError, match="k:"): call()
        for call in (lambda: F.gradient_samples(joint, x, F.pathwise(R.st), 4, chunk=bad), lambda: F.GumbelRao(chunk=bad),
                     lambda: F.gradient_report(joint, x, {"s": F.pathwise(R.st)}, chunk=bad)):
            with pytest.raises(ValueError, match="chunk:"): call()
        with pytest.raises(ValueError, match="n:"): F.gradient_samples(joint, x, F.pathwise(R.st), bad)
        with pytest.raises(ValueError, match="latents:"): R.one_hot_states(bad, 3)
        with pytest.raises(ValueError, match="categories:"): R.one_hot_states(3, bad)
    with pytest.raises(ValueError, match="n:.*>= 2"): F.gradient_report(joint, x, {"s": F.pathwise(R.st)}, n=1)
    with pytest.raises(ValueError, match="latents:"): R.expectation(lambda s: s.sum((-1, -2)), normal(0, 3))
    assert F.GumbelRao(k=np.int64(3))(x).shape == x.shape


@pytest.mark.parametrize("f", [R.st, R.reinmax, F.st_gumbel_softmax, F.gumbel_rao, F.gapped_st, R.StraightThrough, R.ReinMax,
                               F.GumbelRao, F.GappedST, F.StraightThroughGumbelSoftmax, R.OneHotCategoricalReinMax])
def test_temperature_that_asks_for_a_gradient_is_refused(f):
    name = "temperature" if f is R.OneHotCategoricalReinMax else "tau"
    head = () if isinstance(f, type) else (normal(2, 3),)
    probs = {"logits": normal(2, 3)} if name == "temperature" else {}
    for tau in (torch.tensor(1.2, requires_grad=True), torch.nn.Parameter(torch.ones(2, 1))):
        with pytest.raises(ValueError, match="tau: there is no gradient.*detach"): f(*head, **probs, **{name: tau})
    for tau in (torch.tensor(True), torch.tensor(1j)):
        with pytest.raises(TypeError, match="tau"): f(*head, **probs, **{name: tau})


@pytest.mark.parametrize("f", [R.st, R.reinmax, F.st_gumbel_softmax, F.gumbel_rao, F.gapped_st])
def test_extreme_temperatures(f):
    x = torch.tensor([[0.3, -0.2, 1.0], [0.0, 1.0, -math.inf]], requires_grad=True)
    D = lambda tau, **k: f(x, tau, generator=gen(), **k)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for tau in (1e-300, 1e-46, 1e300, torch.tensor(1e-300, dtype=F64), torch.tensor(1e300, dtype=F64), 10**400):
            with pytest.raises(ValueError, match="tau"): D(tau)
        for tau in (1e-37, 3e38, np.float32(1.5), np.float64(1.5), np.int64(2), torch.tensor(1e-37)):
            g, = torch.autograd.grad((D(tau) * normal(2, 3, dtype=torch.float32)).sum(), x)
            assert g.isfinite().all() and (D(tau).sum(-1) == 1).all()
        assert torch.equal(D(np.float32(1.5)), D(1.5))


def test_overflow_of_the_quotient_is_exact():
    x = torch.tensor([[3e38, 1.0, 3e38], [-3e38, -2e38, -3e38], [5.0, 4.0, 3.0]])
    want = torch.tensor([[0.5, 0.0, 0.5], [0.0, 1.0, 0.0], [0.0, 0.0, 0.0]])
    for tau in (0.5, torch.tensor(0.5)):
        got = R._softmax(x, tau)
        assert torch.equal(got[:2], want[:2]) and torch.equal(got[2], (x[2] / 0.5).softmax(-1))
    with pytest.raises(ValueError, match="tau.*overflows"): R._softmax(x, torch.tensor([[0.5, 0.6, 0.5]]))


def test_tensor_temperature_is_a_buffer():
    tau = torch.tensor([[1.5], [2.0]])
    for cls in (R.StraightThrough, R.ReinMax, F.GumbelRao, F.GappedST, F.StraightThroughGumbelSoftmax):
        layer = cls(tau)
        assert [n for n, _ in layer.named_buffers()] == ["tau"] and not list(layer.parameters())
        assert layer.to("meta").tau.device.type == "meta" and cls(tau).double().tau.dtype == F64
        assert cls(tau)(normal(2, 3)).shape == (2, 3) and not list(cls(1.5).buffers())


@pytest.mark.parametrize("name", ONE_HOT)
def test_samples_of_other_types_and_devices(name):
    x, D, g = normal(3, 4), torch.eye(4, dtype=F64)[[1, 3, 0]], normal(3, 4, seed=1)
    want = gradient(ONE_HOT[name], x, D, g, generator=gen(2))
    for dtype in (torch.bool, torch.int64, torch.uint8, torch.float16):
        out = ONE_HOT[name](x, sample=D.to(dtype))
        assert torch.equal(out, D) and out.dtype == F64
        assert torch.equal(gradient(ONE_HOT[name], x, D.to(dtype), g, generator=gen(2)), want)
    with pytest.raises(ValueError, match="sample.*one-hot"): ONE_HOT[name](x, sample=2 * D.long())
    with pytest.raises(ValueError, match="sample.*cpu.*meta"): ONE_HOT[name](x, sample=D.to("meta"))


def test_bad_bernoulli_samples():
    a = torch.tensor([math.inf, -math.inf, 0.0], requires_grad=True)
    for bad, word in (([1.0, 0.0, 1.0], "list"), (torch.tensor([0.0, 0, 0]), "excludes"), (torch.tensor([1.0, 1, 0]), "excludes"),
                      (torch.zeros(3, device="meta"), "cpu.*meta"), (1.0, "float")):
        with pytest.raises(ValueError, match=f"sample.*{word}"): R.reinmax_bernoulli(a, sample=bad)
    assert torch.equal(R.reinmax_bernoulli(a, sample=torch.tensor([True, False, True])), torch.tensor([1.0, 0.0, 1.0]))


def test_gap_and_beta_and_matrix_name_the_argument():
    x = normal(2, 3)
    for gap in ("q", -1, -1.0, math.nan, math.inf):
        with pytest.raises(ValueError, match="gap"): F.GappedST(gap=gap)
    for gap in (None, [1.0], True):
        for f in (lambda: F.gapped_st(x, gap=gap), lambda: F.GappedST(gap=gap)):
            with pytest.raises(TypeError, match="gap: expected a number or 'p'"): f()
    for beta in ("a", None, True):
        with pytest.raises(TypeError, match="beta: expected a number"): R.beta_st(x, beta)
    for tau in (0, -1.0, math.nan, 1e-300):
        with pytest.raises(ValueError, match="tau"): R.estimator_matrix("st", x.float(), torch.eye(3)[:2], tau)
    D, tau = torch.eye(3, dtype=F64)[:2], torch.tensor([[1.3], [2.0]], dtype=F64)
    rows = [R.estimator_matrix("st", x[i], D[i], tau[i].item()) for i in range(2)]
    assert torch.allclose(R.estimator_matrix("st", x, D, tau), torch.stack(rows), atol=1e-15)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_without_gradients(mode):
    with mode():
        x = normal(2, 3)
        for method in ("reinforce", "rloo", "reinmax", "reinmax_loo", "debiased"):
            D = R.reinmax(x.expand(3, 2, 3), generator=gen(1))
            assert torch.equal(F.multi_sample(joint, x, 3, method, gen(1)), joint(D).mean(0)), method
        inside = [R.exact_gradient(joint, x), R.expected_gradient(R.reinmax, joint, x), R.backward_matrix(R.reinmax, x[0], generator=gen()),
                  F.gradient_samples(joint, x, F.pathwise(R.reinmax, generator=gen()), 4)]
        assert F.path_surrogate(joint, x, generator=gen()) == 0
        assert F.gradient_report(joint, x, {"s": F.pathwise(R.st)}, n=4)["s"]["n"] == 4
    x = normal(2, 3)
    outside = [R.exact_gradient(joint, x), R.expected_gradient(R.reinmax, joint, x), R.backward_matrix(R.reinmax, x[0], generator=gen()),
               F.gradient_samples(joint, x, F.pathwise(R.reinmax, generator=gen()), 4)]
    for a, b in zip(inside, outside):
        assert torch.equal(a, b)
    assert torch.equal(F.multi_sample(joint, x, 3, "debiased", gen(1)), joint(R.reinmax(x.expand(3, 2, 3), generator=gen(1))).mean(0))


# What a second review found ------------------------------------------------------------------------------------------

@pytest.mark.parametrize("f", [F.st_gumbel_softmax, F.gumbel_rao, F.gapped_st])
def test_temperature_may_not_vary_along_the_categories(f):
    x, steps = torch.zeros(2, 3), torch.tensor([0.5, 1.0, 2.0])
    with pytest.raises(ValueError, match="tau.*categor"): f(x, steps)
    with pytest.raises(ValueError, match="tau.*categor"): f(x.T, steps[:, None], dim=0)
    for good in (steps[:2, None], torch.full((2, 3), 0.7), torch.tensor(0.7)):
        assert (f(x, good).sum(-1) == 1).all()


@pytest.mark.parametrize("method", ["reinforce", "rloo", "reinmax", "reinmax_loo", "debiased"])
def test_surrogates_under_vmap(method):
    x, w = normal(5, 2, 3), normal(6, seed=1)
    f = lambda D: (2 * D.flatten(-2) @ w).tanh()
    one = lambda row: F.multi_sample(f, row, 3, method)
    values = torch.func.vmap(one, randomness="different")(x)
    assert values.shape == (5,) and len(values.unique()) > 1
    rows = torch.func.vmap(torch.func.grad(one), randomness="different")(x.expand(20_000, 5, 2, 3).reshape(-1, 2, 3))
    rows = rows.reshape(20_000, 5, 2, 3)
    target = R.exact_gradient(f, x) if "reinmax" not in method else R.expected_gradient(R.reinmax, f, x)
    z = (rows.mean(0) - target).abs() / (rows.std(0) / 20_000**0.5)
    assert rows.sum(-1).abs().max() < 1e-12 and z.max() < 5


def test_path_under_vmap():
    x, mix = normal(5, 2, 3), normal(6, 6, seed=5)
    f = lambda D: torch.sin(2 * D.flatten(-2) @ mix).sum(-1)
    wide = x.expand(20_000, 5, 2, 3).reshape(-1, 2, 3)
    rows = torch.func.vmap(torch.func.grad(lambda r: F.path_surrogate(f, r, 2)), randomness="different")(wide)
    rows = rows.reshape(20_000, 5, 2, 3)
    z = (rows.mean(0) - R.exact_gradient(f, x)).abs() / (rows.std(0) / 20_000**0.5)
    assert z.max() < 5
    leaf = x.clone().requires_grad_()
    torch.func.vmap(lambda r: F.path_surrogate(f, r, 2), randomness="different")(leaf).sum().backward()
    assert leaf.grad.abs().sum() > 0


@pytest.mark.parametrize("gap", [1.0, "p"])
@pytest.mark.parametrize("tau", [1.0, 0.7])
def test_double_backward_of_gapped_st_is_that_of_its_estimate(gap, tau):
    x, w, v, D = normal(5), normal(5, seed=1), normal(5, seed=2), torch.eye(5, dtype=F64)[3]

    def estimate(t, create=False):
        t = t.clone().requires_grad_()
        return torch.autograd.grad(F.gapped_st(t, tau, gap=gap, sample=D) @ w, t)[0]
    y = x.clone().requires_grad_()
    first, = torch.autograd.grad(F.gapped_st(y, tau, gap=gap, sample=D) @ w + y.pow(3).sum(), y, create_graph=True)
    assert torch.allclose(first, estimate(x) + 3 * x**2, atol=1e-14)
    second, = torch.autograd.grad(first @ v, y)
    h, eye = 1e-6, torch.eye(5, dtype=F64)
    want = torch.stack([(estimate(x + h * e) - estimate(x - h * e)) @ v / (2 * h) for e in eye])
    assert torch.allclose(second, want + 6 * x * v, atol=1e-8)


def test_gapped_st_is_finite_where_probabilities_underflow():
    e1 = torch.tensor([0.0, 1.0, 0.0])
    for gap in (1.0, "p"):
        x = torch.tensor([200.0, 0.0, 0.0])
        got = gradient(F.gapped_st, x, e1, torch.tensor([0.3, -1.0, 2.0]), gap=gap)
        s = torch.tensor([199.0, 200.0, 0.0]).softmax(0)  # the gap of "p" tends to 1 as p does to 0
        assert torch.allclose(got, J(s) @ torch.tensor([0.3, -1.0, 2.0]), atol=1e-6)
        x = x.index_fill(0, torch.tensor([2]), -math.inf)
        got = gradient(F.gapped_st, x, e1, torch.tensor([0.3, -1.0, math.inf]), gap=gap)
        assert got[2] == 0 and got.isfinite().all() and got[0] != 0


def test_uniform_baseline_refuses_a_sample_whose_probability_underflows():
    x, e1 = torch.tensor([200.0, 0.0, 0.0]), torch.tensor([0.0, 1.0, 0.0])
    with pytest.raises(ValueError, match="sample.*underflow"): F.reinmax_uniform_baseline(x, sample=e1)
    y = x.clone().requires_grad_()
    F.reinmax_uniform_baseline(y, sample=e1, validate=False).square().sum().backward()
    assert not y.grad.isnan().any()


@pytest.mark.parametrize("k", [2, 5, 100])
def test_gumbel_rao_under_autocast(k):
    x, w = normal(4, 5, dtype=torch.float32), normal(5, seed=1, dtype=torch.float32)
    grads = []
    for on in (False, True):
        y = x.clone().requires_grad_()
        with torch.autocast("cpu", torch.bfloat16, enabled=on):
            loss = (F.gumbel_rao(y, 0.5, k=k, generator=gen(1)) * w).sum()
            loss.backward()
        grads.append(y.grad)
    assert torch.equal(*grads) and grads[0].abs().sum() > 0


def test_debiased_surrogate_under_autocast():
    x, table = normal(4, 2, 3, dtype=torch.float32), normal(2, 3, seed=1, dtype=torch.float32)
    D, grads = R.reinmax(x.expand(3, 4, 2, 3), generator=gen(2)), []
    for on in (False, True):
        y = x.clone().requires_grad_()
        s = F.reinmax_loo(y, 3, sample=D)
        values = (s * table).sum((-1, -2)).exp()
        with torch.autocast("cpu", torch.bfloat16, enabled=on):
            F.debiased_surrogate(values, s, y).sum().backward()
        grads.append(y.grad)
    assert torch.equal(*grads)


@pytest.mark.parametrize("method", ["reinforce", "rloo", "reinmax", "reinmax_loo", "debiased"])
def test_one_value_a_sample_for_a_single_latent(method):
    x = normal(5).requires_grad_()
    with pytest.raises(ValueError, match=r"f: expected values of shape \(4,\)"):
        F.multi_sample(lambda D: D.sum(), x, 4, method)
    assert F.multi_sample(lambda D: D.square() @ normal(5), x, 4, method).shape == ()


def test_bad_baselines_and_vanishing_gradients_are_named():
    x = normal(4, 2, 3)
    D = R.reinmax(x.expand(3, 4, 2, 3))
    for bad in (torch.zeros(5), torch.zeros(2, 3, 4)):
        with pytest.raises(ValueError, match="baseline"): F.reinforce_surrogate(joint(D), D, x, bad)
    with pytest.raises(ValueError, match="gradient.*zero"):
        F.gradient_report(lambda D: 0 * D.sum((-1, -2)), x, {"st": F.pathwise(R.st)}, 8)


def test_a_baseline_that_is_no_number_and_a_dim_that_is_none():
    logits, samples = torch.zeros(2, 3), torch.eye(3)[:2][None]
    with pytest.raises(ValueError, match="baseline: nan"):
        F.reinforce_surrogate(torch.ones(1, 2), samples, logits, baseline=math.nan)
    for dim in (None, "a", 1.0):
        with pytest.raises(TypeError, match="dim: expected an int"): R.reinmax(logits, dim=dim)
