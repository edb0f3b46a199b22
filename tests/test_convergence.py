"""Two-layer feedback alignment: the engines against autograd, the kernels against sampling, the bounds, bad input."""
import copy
import math
import pickle
import tracemalloc
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from altbp import convergence
from altbp.convergence import (TwoLayer, cutoff, displacement_bounds, fa_step, gram_limit, kernels, train,
                               two_layer)

TORCH = {"identity": lambda z: z, "relu": torch.relu, "tanh": torch.tanh, "sigmoid": torch.sigmoid}


def rng(seed=0):
    return torch.Generator().manual_seed(seed)


def make(seed, n, d, p, activation):
    gen = rng(seed)
    X = torch.randn(n, d, dtype=torch.float64, generator=gen) / d**0.5
    return two_layer(d, p, activation, generator=gen), X, torch.randn(n, dtype=torch.float64, generator=gen)


def reference(net, X, y, eta, lams, rule="fa"):
    """The same dynamics by autograd alone: the error at each time, and the last weights."""
    W, beta, p = net.W.clone(), net.beta.clone(), len(net.b)
    errors = []
    for lam in lams:
        W.requires_grad_(), beta.requires_grad_()
        h = TORCH[net.activation](X @ W.T)
        e = h @ beta / p**0.5 - y
        loss = e.square().sum() / 2 + lam * beta.square().sum() / 2
        dbeta, dW = torch.autograd.grad(loss, [beta, W], retain_graph=True)
        if rule == "fa":
            dW, = torch.autograd.grad(h @ net.b / p**0.5, W, e.detach())
        errors.append(e.detach())
        W, beta = (W - eta * dW).detach(), (beta - eta * dbeta).detach()
    errors.append(TORCH[net.activation](X @ W.T) @ beta / p**0.5 - y)
    return torch.stack(errors), W, beta


# Engines ----------------------------------------------------------------------------------------------------------

@settings(max_examples=25, deadline=None)
@given(st.integers(0, 999), st.integers(1, 6), st.integers(1, 6), st.integers(1, 9),
       st.sampled_from(sorted(TORCH)), st.sampled_from(["fa", "bp"]), st.sampled_from(["full", "gram", "reduced"]))
def test_engines_follow_autograd(seed, n, d, p, activation, rule, engine):
    if engine == "reduced" and (activation, rule) != ("identity", "fa"):
        activation, rule = "identity", "fa"
    net, X, y = make(seed, n, d, p, activation)
    lams = [0.3] * 20 + [0.0] * 20
    errors, W, beta = reference(net, X, y, 0.05, lams, rule)
    run = train(net, X, y, 0.05, 40, cutoff(0.3, 20), rule, engine)
    torch.testing.assert_close(run.loss, errors.square().sum(1) / 2, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(run.net.W, W, rtol=1e-9, atol=1e-9)  # pinv of a random X may be ill-conditioned
    torch.testing.assert_close(run.net.beta, beta, rtol=1e-10, atol=1e-11)


@pytest.mark.parametrize("activation, engine", [("tanh", "gram"), ("relu", "gram"), ("sigmoid", "gram"),
                                                ("identity", "gram"), ("identity", "reduced"), ("tanh", "full")])
def test_long_runs_agree_to_1e_12(activation, engine):
    net, X, y = make(3, 10, 20, 60, activation)
    lams = [0.1] * 250 + [0.0] * 250
    errors, W, beta = reference(net, X, y, 0.1, lams)
    run = train(net, X, y, 0.1, 500, cutoff(0.1, 250), engine=engine)
    assert (run.loss - errors.square().sum(1) / 2).abs().max() < 1e-12
    assert (run.net.W - W).abs().max() < 1e-12 and (run.net.beta - beta).abs().max() < 1e-12
    cos = net.b @ beta / (net.b.norm() * beta.norm())
    assert abs(run.cos[-1] - cos) < 1e-12 and abs(run.net.cos - cos) < 1e-12


def test_rules_differ_and_staggered_updates_do_not_pass():
    net, X, y = make(0, 5, 6, 8, "tanh")
    fa, bp = (train(net, X, y, 0.1, 50, rule=r).net for r in ("fa", "bp"))
    assert (fa.W - bp.W).abs().max() > 1e-3
    staggered = net
    for _ in range(50):
        W = fa_step(staggered, X, y, 0.1).W
        staggered = replace(staggered, W=W, beta=fa_step(replace(staggered, W=W), X, y, 0.1).beta)
    assert (staggered.beta - fa.beta).abs().max() > 1e-4


def test_training_leaves_its_input_and_can_be_continued():
    net, X, y = make(0, 5, 6, 8, "relu")
    before = copy.deepcopy((net, X, y))
    for engine in ("full", "gram"):
        once = train(net, X, y, 0.1, 60, engine=engine)
        twice = train(train(net, X, y, 0.1, 25, engine=engine).net, X, y, 0.1, 35, engine=engine)
        torch.testing.assert_close(once.net.W, twice.net.W, rtol=0, atol=1e-12)
        torch.testing.assert_close(once.loss[25:], twice.loss, rtol=0, atol=1e-12)
    for a, b in zip((net.W, net.beta, net.b, X, y), (before[0].W, before[0].beta, before[0].b, *before[1:])):
        assert torch.equal(a, b)


def test_no_steps_and_no_examples():
    net, X, y = make(0, 4, 3, 5, "tanh")
    run = train(net, X, y, 0.1, 0)
    assert len(run.loss) == len(run.cos) == 1 and torch.equal(run.net.beta, net.beta)
    empty = train(net, X[:0], y[:0], 0.1, 3, 1.0)
    assert (empty.loss == 0).all() and torch.allclose(empty.net.beta, 0.9**3 * net.beta)
    assert torch.equal(empty.net.W, net.W)


@pytest.mark.parametrize("engine", ["full", "gram", "reduced"])
def test_float32_stays_float32(engine):
    net = two_layer(6, 20, "identity", torch.float32, rng())
    X, y = torch.randn(4, 6, generator=rng(1)), torch.randn(4, generator=rng(2))
    run = train(net, X, y, 0.01, 50, 0.1, engine=engine)
    assert run.net.W.dtype == run.net.beta.dtype == torch.float32
    double = TwoLayer(net.W.double(), net.beta.double(), net.b.double(), "identity")
    exact = train(double, X.double(), y.double(), 0.01, 50, 0.1, engine="full")
    torch.testing.assert_close(run.net.W.double(), exact.net.W, rtol=1e-4, atol=1e-5)


def loop_allocations(p):
    """The most memory that one pass of the reduced engine's loop takes, of 50."""
    seen = []

    class Spy:
        def __iter__(self):
            for _ in range(50):
                tracemalloc.reset_peak()
                start = tracemalloc.get_traced_memory()[0]
                yield 0.1
                seen.append(tracemalloc.get_traced_memory()[1] - start)

    net, X, y = make(0, 10, 12, p, "identity")
    tracemalloc.start()
    convergence._reduced(net, X, y, 1e-3, Spy(), "fa")
    tracemalloc.stop()
    return max(seen)


def test_reduced_loop_allocates_nothing_of_the_width():
    assert loop_allocations(50_000) <= loop_allocations(50) + 1000 < 50_000


def test_reduced_loop_is_as_fast_for_any_width():
    import time
    def seconds(p):
        net, X, y = make(0, 50, 10, p, "identity")
        train(net, X, y, 1e-5, 10, engine="reduced")
        return min(clock(lambda: train(net, X, y, 1e-5, 2000, engine="reduced")) for _ in range(3))
    def clock(f):
        start = time.process_time()
        f()
        return time.process_time() - start
    assert seconds(10_000) < 4 * seconds(10) + 0.5


# Kernels ----------------------------------------------------------------------------------------------------------

@settings(max_examples=15, deadline=None)
@given(st.integers(0, 999), st.sampled_from(["identity", "tanh", "sigmoid"]), st.sampled_from(["fa", "bp"]))
def test_kernels_are_the_derivative_of_the_step(seed, activation, rule):
    net, X, y = make(seed, 4, 5, 7, activation)
    e, G_H = net(X) - y, sum(kernels(net, X, rule))
    rest = [(fa_step(net, X, y, eta, rule=rule)(X) - y - e + eta * G_H @ e).norm().item() for eta in (1e-3, 1e-4)]
    assert rest[1] <= rest[0] / 50 + 1e-15


@pytest.mark.parametrize("activation", sorted(TORCH))
def test_gram_limit_is_the_mean_over_weights(activation):
    gen = rng(1)
    X = torch.randn(5, 3, dtype=torch.float64, generator=gen)
    X = X / X.norm(dim=1, keepdim=True) * torch.tensor([[1.0], [0.5], [1.0], [1.5], [1.0]])
    W = torch.randn(400_000, 3, dtype=torch.float64, generator=gen)
    h = TORCH[activation](W @ X.T)
    spread = (h[:, :, None] * h[:, None, :]).std(0) / len(W) ** 0.5
    assert ((gram_limit(X, activation) - h.T @ h / len(W)).abs() < 5 * spread + 1e-6).all()


def test_gram_limit_closed_forms():
    t = torch.tensor([0.0, math.pi / 2, math.pi], dtype=torch.float64)
    X = torch.stack([t.cos(), t.sin()], 1)
    torch.testing.assert_close(gram_limit(X, "relu")[0], torch.tensor([0.5, 0.5 / math.pi, 0.0]).double())
    torch.testing.assert_close(gram_limit(3 * X, "identity"), 9 * X @ X.T)
    half = gram_limit(X, "sigmoid")[0, 1]  # independent sigmoids of mean 1/2
    assert abs(half - 0.25) < 1e-12 and abs(gram_limit(X, "tanh")[0, 1]) < 1e-12
    assert (torch.linalg.eigvalsh(gram_limit(torch.eye(4, dtype=torch.float64), "relu")) > 0).all()
    with pytest.raises(ValueError, match="activation: 'swish'"):
        gram_limit(X, "swish")


@pytest.mark.parametrize("norm", [0.3, 1.0, 3.0, 150**0.5])
@pytest.mark.parametrize("activation", ["tanh", "sigmoid"])
def test_gram_limit_of_steep_activations(activation, norm):
    t = torch.tensor([0.0, 0.3, 2.5], dtype=torch.float64)
    limit = gram_limit(norm * torch.stack([t.cos(), t.sin()], 1), activation)
    u = torch.linspace(-10, 10, 200_001, dtype=torch.float64)
    diagonal = (torch.softmax(-(u**2) / 2, 0) * TORCH[activation](norm * u) ** 2).sum()
    torch.testing.assert_close(limit.diagonal(), diagonal.expand(3), rtol=1e-9, atol=1e-12)
    assert torch.equal(limit, limit.T)
    finer = gram_limit(norm * torch.stack([t.cos(), t.sin()], 1), activation, nodes=900)
    torch.testing.assert_close(limit, finer, rtol=0, atol=1e-9)


def test_gram_limit_keeps_the_dtype_and_refuses_what_is_no_data():
    X = torch.randn(4, 3, dtype=torch.float64, generator=rng())
    low = gram_limit(X.float())
    assert low.dtype == torch.float32 and (low - gram_limit(X)).abs().max() < 1e-6
    for bad in (X[0], X.long(), X / 0):
        with pytest.raises(ValueError, match="X: "):
            gram_limit(bad)
    with pytest.raises(ValueError, match="nodes: 1"):
        gram_limit(X, nodes=1)


def test_zero_input_has_zero_kernel():
    X = torch.tensor([[0.0, 0.0], [1.0, 0.0]], dtype=torch.float64)
    for activation in ("identity", "relu", "tanh"):
        limit = gram_limit(X, activation)
        assert torch.isfinite(limit).all() and limit[0].abs().max() < 1e-12 < limit[1, 1]


# Theorems ---------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("seed", range(3))
def test_error_contracts_and_weights_stay(seed):
    net, X, y = make(seed, 8, 20, 1500, "tanh")
    X, y = X / X.norm(dim=1, keepdim=True), y.clamp(-1, 1)
    gamma = torch.linalg.eigvalsh(gram_limit(X))[0].item()
    run = train(net, X, y, 0.5, 200)
    error = (2 * run.loss).sqrt()
    assert (error[1:] <= (1 - 0.5 * gamma / 4) * error[:-1]).all()
    beta, W = displacement_bounds(net, X, y, gamma)
    assert ((run.net.beta - net.beta).abs() <= beta).all()
    assert ((run.net.W - net.W).norm(dim=1) <= W).all()
    lam = 2 * gamma
    decayed = (2 * train(net, X, y, 0.5, 200, lam).loss).sqrt()
    assert (decayed[1:] <= (1 - 0.5 * gamma / 4 - 0.5 * lam) * decayed[:-1] + 0.5 * lam * y.norm() + 1e-12).all()


def test_linear_error_contracts_at_half_gamma_with_decay():
    for seed in range(3):
        net, X, y = make(seed, 8, 60, 3000, "identity")
        X = X / X.norm(dim=1, keepdim=True)
        values = torch.linalg.eigvalsh(X @ X.T)
        gamma, eta = values[0].item(), 0.3 / values[-1].item()
        lam = torch.tensor([2 * gamma] * 100 + [0.0] * 100)
        e = (2 * train(net, X, y, eta, 200, lambda t: lam[t].item(), engine="reduced").loss).sqrt()
        bound = lambda last: (1 - eta * gamma / 2 - eta * lam) * e[:-1] + last * eta * lam * y.norm()
        live = e[:-1] > 1e-9
        assert (e[1:] <= bound(1.0))[live].all() and not (e[1:] <= bound(0.0))[live].all()


# Bad input --------------------------------------------------------------------------------------------------------

BAD = [(dict(lam=-0.1), "lam: -0.1"), (dict(lam=10.0), "eta \\* lam < 1"), (dict(lam=float("nan")), "lam: nan"),
       (dict(lam=lambda t: -1.0 if t == 4 else 0.0), "lam: -1.0"), (dict(eta=0.0), "eta: 0.0"),
       (dict(eta=float("inf")), "eta"), (dict(steps=-1), "steps: -1"), (dict(rule="dfa"), "rule: 'dfa'"),
       (dict(engine="fast"), "engine: 'fast'"), (dict(engine="reduced"), "'identity'")]


@pytest.mark.parametrize("change, message", BAD)
def test_bad_arguments(change, message):
    net, X, y = make(0, 4, 3, 5, "tanh")
    before = copy.deepcopy(net)
    with pytest.raises(ValueError, match=message):
        train(net, X, y, **(dict(eta=0.1, steps=5) | change))
    assert torch.equal(net.W, before.W) and torch.equal(net.beta, before.beta)


def test_bad_data():
    net, X, y = make(0, 4, 3, 5, "tanh")
    bad_y = y.clone()
    bad_y[2] = float("nan")
    for data, message in [((X, bad_y), "y: not all finite"), ((X / 0, y), "X: not all finite"),
                          ((X[:, :2], y), r"X \(4, 2\).*W \(5, 3\)"), ((X, y[:3]), r"y \(3,\)"),
                          ((X, y[:, None]), r"y \(4, 1\)"), ((X[0], y[:1]), r"X \(3,\)"),
                          ((X.float(), y), "X: dtype"), ((X, y.long()), "y: dtype")]:
        with pytest.raises(ValueError, match=message):
            train(net, *data, 0.1, 5)


def test_bad_steps_and_kernels():
    net, X, y = make(0, 4, 3, 5, "tanh")
    for change, message in [(dict(rule="FA"), "rule: 'FA'"), (dict(lam=-1.0), "lam: -1.0"), (dict(eta=2.0, lam=0.5), "eta \\* lam < 1"),
                            (dict(eta=-1.0), "eta: -1.0"), (dict(y=y[:, None]), r"y \(4, 1\)"), (dict(X=X[:, :2]), r"X \(4, 2\)")]:
        with pytest.raises(ValueError, match=message):
            fa_step(**(dict(net=net, X=X, y=y, eta=0.1) | change))
    with pytest.raises(ValueError, match="rule: 'FA'"):
        kernels(net, X, "FA")


def test_bounds_of_displacement_need_their_assumptions():
    net, X, y = make(0, 4, 3, 5, "tanh")
    unit = X / X.norm(dim=1, keepdim=True)
    beta, W = displacement_bounds(net, unit, y, 0.1)
    assert beta.shape == W.shape == (5,) and (beta > 0).all() and (W > 0).all()
    for gamma in (0.0, -1.0, math.inf, math.nan):
        with pytest.raises(ValueError, match="gamma: "):
            displacement_bounds(net, unit, y, gamma)
    with pytest.raises(ValueError, match="norm is not 1"):
        displacement_bounds(net, 10 * unit, y, 0.1)
    with pytest.raises(ValueError, match="relu has no bounds"):
        displacement_bounds(replace(net, activation="relu"), unit, y, 0.1)
    with pytest.raises(ValueError, match="B1: 0"):
        displacement_bounds(net, unit, y, 0.1, B1=0)


def test_broken_weights_are_refused():
    net, X, y = make(0, 4, 3, 5, "tanh")
    for name in ("W", "beta", "b"):
        with pytest.raises(ValueError, match=f"^{name}: not all finite"):
            train(replace(net, **{name: getattr(net, name) / 0}), X, y, 0.1, 2)


def test_half_precision_runs_to_the_end():
    net = two_layer(6, 20, "tanh", torch.bfloat16, rng())
    X, y = torch.randn(4, 6, generator=rng(1)).bfloat16(), torch.randn(4, generator=rng(2)).bfloat16()
    for engine in ("full", "gram"):
        run = train(net, X, y, 0.1, 5, engine=engine)
        assert run.net.W.dtype == run.loss.dtype == torch.bfloat16 and torch.isfinite(run.loss).all()
    exact = train(TwoLayer(net.W.double(), net.beta.double(), net.b.double()), X.double(), y.double(), 0.1, 5)
    assert (run.net.W.double() - exact.net.W).abs().max() < 0.05


def test_bad_networks():
    W, v = torch.zeros(5, 3), torch.zeros(5)
    for args, message in [((W, v[:4], v), r"\(4,\)"), ((W[:0], v[:0], v[:0]), "p > 0"), ((W, v, torch.zeros(2, 5)), r"\(2, 5\)"), ((v, v, v), "shapes"),
                          ((W, v.double(), v), "dtype"), ((W.long(), v.long(), v.long()), "dtype"),
                          ((W, v, v, "swish"), "'swish'")]:
        with pytest.raises(ValueError, match=message):
            TwoLayer(*args)


def test_networks_are_seeded_and_pickle():
    a, b = two_layer(3, 5, generator=rng(4)), two_layer(3, 5, generator=rng(4))
    assert torch.equal(a.W, b.W) and not torch.equal(a.beta, a.b)
    again = pickle.loads(pickle.dumps(a))
    assert torch.equal(again.W, a.W) and again.activation == a.activation
