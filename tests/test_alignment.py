"""Alignment: the accounts of ReLU neurons, the mean-field theory against simulation, the classifier against autograd."""
import inspect
import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from altbp.alignment import (LAMBDAS, RATES, alignment_ode, alignment_problem, classifier_state, classifier_step,
                             convergence_dropout, convergence_sigmoid, dropout_step, fa_classifier, final_alignment, final_cosines, isometry, neuron_constants, settle,
                             slow_alignment)
from altbp.convergence import cutoff, train, two_layer
from altbp.data import digits


def rng(seed=0):
    return torch.Generator().manual_seed(seed)


def orthonormal(n, d, seed=0):
    return torch.linalg.qr(torch.randn(d, n, dtype=torch.float64, generator=rng(seed)))[0].T


def simulate(p, Y, L, tau, cut=math.inf, eta=0.02, seeds=6, zero=False):
    """Mean final cosine of linear nets on orthonormal inputs, by the full engine's equal, the reduced one."""
    X, out = orthonormal(4, 20), []
    for seed in range(seeds):
        gen = rng(seed)
        net = two_layer(20, p, "identity", generator=gen)
        net = replace(net, beta=0 * net.beta) if zero else net
        y = torch.randn(4, dtype=torch.float64, generator=gen)
        y = y / y.norm() * Y * p**0.5
        T = 10**9 if cut == math.inf else round(cut / eta)
        out.append(train(net, X, y, eta, round(tau / eta), cutoff(L, T), engine="reduced").cos[-1].item())
    return sum(out) / seeds


# Accounts ---------------------------------------------------------------------------------------------------------

@settings(max_examples=15, deadline=None)
@given(st.integers(0, 999), st.integers(1, 6), st.integers(1, 5), st.integers(1, 4), st.booleans())
def test_accounts_grow_by_half_the_squared_step(seed, n, p, k, bias):
    gen = rng(seed)
    normal = lambda *s: torch.randn(*s, dtype=torch.float64, generator=gen)
    W, c, V, B = normal(p, 3), normal(p) * bias, normal(k, p), normal(k, p)
    x, target = normal(n, 3), normal(n, k)
    start = neuron_constants(W, V, B, c)
    growth = torch.zeros(p, dtype=torch.float64)
    for _ in range(30):  # feedback by a surrogate: the gradient of q·(h Bᵀ) with q = dL/d output
        W, c, V = (t.detach().requires_grad_() for t in (W, c, V))
        h = torch.relu(x @ W.T + c)
        out = h @ V.T
        q = torch.autograd.grad((out - target).abs().pow(1.5).sum(), out, retain_graph=True)[0]
        dV, = torch.autograd.grad(out, V, q, retain_graph=True)
        dW, dc = torch.autograd.grad(h @ B.T, [W, c], q)
        if not bias:
            dc = 0 * dc
        growth += 0.01**2 * (dW.square().sum(1) + dc.square()) / 2
        W, c, V = (t.detach() - 0.01 * g for t, g in ((W, dW), (c, dc), (V, dV)))
    torch.testing.assert_close(neuron_constants(W, V, B, c), start + growth, rtol=1e-9, atol=1e-9)


def test_account_is_what_it_says():
    W, V, B = torch.tensor([[3.0, 4.0]]), torch.tensor([[2.0], [1.0]]), torch.tensor([[0.5], [-1.0]])
    assert neuron_constants(W, V, B).tolist() == [12.5 - (1.0 - 1.0)]
    assert neuron_constants(W, V, B, torch.tensor([2.0])).tolist() == [14.5]
    for bad in [(W, V, B[:1]), (W, V.T, B.T), (W, V[0], B[0])]:
        with pytest.raises(ValueError, match="V .*, B "):
            neuron_constants(*bad)


def test_isometry():
    gamma, eps = isometry(3 * orthonormal(4, 9))
    assert abs(gamma - 9) < 1e-12 and abs(eps) < 1e-12
    X = torch.diag(torch.tensor([1.0, 2.0]))
    assert isometry(X) == (1.0, 3.0)
    assert isometry(torch.ones(3, 2)) == (0.0, math.inf)  # more examples than dimensions
    repeated = orthonormal(3, 9)[[0, 1, 2, 0]]
    assert isometry(repeated) == isometry(repeated.float()) == (0.0, math.inf)
    for bad in (X[:0], X[0], X / 0):
        with pytest.raises(ValueError, match="X: shape"):
            isometry(bad)


# Mean field -------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("Y, L, tau, cut", [(1, 1, 20, math.inf), (1, 1, 20, 5), (0.5, 2, 30, 15), (1, 0, 20, 1)])
def test_ode_predicts_wide_nets(Y, L, tau, cut):
    ode = alignment_ode(Y, L, tau, cut)
    assert abs(ode["cos"][-1] - simulate(6000, Y, L, tau, cut)) < 0.012
    assert ode["tau"][0] == 0 and ode["tau"][-1] == tau and ode["cos"][0] == 0
    assert (ode["U"] - (Y - ode["R"] - ode["sigma"] * ode["A"])).abs().max() < 1e-8
    torch.testing.assert_close(ode["D"][-1], torch.tensor(math.exp(-L * min(tau, cut))).double(), rtol=1e-6, atol=0)


@settings(max_examples=30, deadline=None)
@given(st.floats(0, 50), st.floats(0, 200), st.floats(1, 2000))
def test_ode_is_right_or_refuses(Y, L, tau):
    try:
        ode = alignment_ode(Y, L, tau, steps=400)
    except ValueError as e:
        assert "steps: 400 are too few" in str(e)
        return
    assert all(torch.isfinite(v).all() for v in ode.values())
    fine = alignment_ode(Y, L, tau, steps=1600)
    assert abs(fine["cos"][-1] - ode["cos"][-1]) < 0.02


def test_ode_names_the_steps_that_stiff_problems_lack():
    for args in [(1, 1, 10_000), (1, 100, 100)]:
        with pytest.raises(ValueError, match="steps: 2000 are too few for tau"):
            alignment_ode(*args)
    assert torch.isfinite(alignment_ode(1, 100, 20, steps=10_000)["cos"]).all()


@settings(max_examples=20, deadline=None)
@given(st.floats(0, 5), st.booleans())
def test_final_alignment_is_the_end_of_the_flow(Y, zero):
    end = alignment_ode(Y, 0.0, 60.0, memory=0.0 if zero else 1.0, steps=3000)["cos"][-1].item()
    assert abs(final_alignment(Y, zero) - end) < 1e-6


def test_final_alignment_of_small_and_large_targets():
    assert final_alignment(0.0) == final_alignment(0.0, True) == 0.0
    assert abs(final_alignment(1e-4) / (1e-8 / 2) - 1) < 1e-6 and abs(final_alignment(1e-4, True) / 5e-5 - 1) < 1e-6
    assert 0.99 < final_alignment(1e6) < 1
    assert abs(simulate(6000, 1.0, 0.0, 20.0, zero=True) - final_alignment(1.0, True)) < 0.02


@settings(max_examples=10, deadline=None)
@given(st.floats(0.2, 6), st.floats(0.5, 3))
def test_slow_alignment_is_the_limit_of_small_targets(theta, L):
    ends = [alignment_ode(Y, L, theta / Y, steps=6000)["cos"][-1].item() for Y in (0.04, 0.02)]
    gaps = [abs(end - slow_alignment(theta, L)) for end in ends]
    assert gaps[1] < 0.05 and gaps[1] < 0.75 * gaps[0] + 1e-4


def test_theory_refuses_bad_arguments():
    for args in [(-1, 1, 1), (1, -1, 1), (1, 1, 0), (1, 1, math.inf), (1, 1, 1, -1), (math.nan, 1, 1),
                 (1, math.inf, 1), (math.inf, 1, 1), (1, 1, 1, math.nan)]:
        with pytest.raises(ValueError, match="Y, L"):
            alignment_ode(*args)
    with pytest.raises(ValueError, match="steps: 0"):
        alignment_ode(1, 1, 1, steps=0)
    for Y in (-1, math.inf, math.nan):
        with pytest.raises(ValueError, match="Y: "):
            final_alignment(Y)
    for args in [(-1, 1), (1, -1), (float("nan"), 1), (math.inf, 1), (1, math.inf)]:
        with pytest.raises(ValueError, match="theta, L"):
            slow_alignment(*args)


# The authors' experiment --------------------------------------------------------------------------------------------

def test_problem_is_seeded_and_scaled():
    for activation in LAMBDAS:
        net, X, y = alignment_problem(activation, 300, rng(1))
        again = alignment_problem(activation, 300, rng(1))
        assert torch.equal(X, again[1]) and torch.equal(y, again[2]) and torch.equal(net.W, again[0].W)
        assert X.shape == (50, 150) and y.shape == (50,) and torch.isfinite(y).all()


def test_settle_stops_as_told():
    net, X, y = alignment_problem("identity", 50, rng(2))
    go = lambda **kw: settle(net, X, y, 1e-3 / 25, 5.0, 150, "reduced", **(dict(every=100, most=700) | kw))
    early, end, steps = go(tol=0.0)
    assert steps == 700  # never settled
    assert torch.allclose(early.beta, train(net, X, y, 1e-3 / 25, 150, 5.0, engine="reduced").net.beta)
    assert torch.allclose(end.beta, train(net, X, y, 1e-3 / 25, 700, 5.0, engine="reduced").net.beta, atol=1e-4)
    assert go(tol=1e9)[2] == 150  # settled at the first look
    loss = train(net, X, y, 1e-3 / 25, 700, 5.0, engine="reduced").loss
    looks = (2 * loss[::100] / 50).diff().abs()
    tol = (looks[3] + looks[4]).item() / 2  # the fifth look is the first below it
    assert looks[3] > tol > looks[4] and go(tol=tol)[2] == 500


def test_final_cosines_align_with_decay():
    out = final_cosines("identity", 50, 0, lams=(0.0, 0.5))
    assert out["settled 0.5"] > 0.8 > 0.6 > out["settled 0"] and out["steps 0.5"] >= 2500
    assert out == final_cosines("identity", 50, 0, lams=(0.0, 0.5))


def test_every_activation_of_the_experiment_has_its_rate():
    assert LAMBDAS.keys() == RATES.keys() == {"identity", "relu", "tanh", "sigmoid"}
    assert all(lams[0] == 0 and list(lams) == sorted(lams) for lams in LAMBDAS.values())
    out = convergence_sigmoid(0, "cpu", p=8)
    assert [k for k in out if k.startswith("settled")] == [f"settled {lam:g}" for lam in LAMBDAS["sigmoid"]]


# Dropout ----------------------------------------------------------------------------------------------------------

def dropout_problem(activation, seed=0):
    gen = rng(seed)
    X, y = (torch.randn(*s, dtype=torch.float64, generator=gen) for s in ((5, 4), (5,)))
    return two_layer(4, 7, activation, generator=gen), X, y, gen


@pytest.mark.parametrize("activation", ["identity", "relu", "tanh", "sigmoid"])
def test_nothing_dropped_is_the_plain_step(activation):
    net, X, y, _ = dropout_problem(activation)
    Z, beta = X @ net.W.T, net.beta.clone()
    for _ in range(20):
        dropout_step(Z, beta, net.b, X @ X.T, y, 0.1, torch.ones_like(Z), activation)
    end = train(net, X, y, 0.1, 20).net
    torch.testing.assert_close(beta, end.beta, rtol=0, atol=1e-12)
    torch.testing.assert_close(Z, X @ end.W.T, rtol=0, atol=1e-12)


@pytest.mark.parametrize("activation", ["identity", "tanh"])
def test_dropout_follows_autograd(activation):
    net, X, y, gen = dropout_problem(activation, 1)
    mask = (torch.rand(5, 7, generator=gen, dtype=torch.float64) < 0.6) / 0.6
    W, beta = net.W.clone().requires_grad_(), net.beta.clone().requires_grad_()
    h = {"identity": lambda z: z, "tanh": torch.tanh}[activation](X @ W.T) * mask / 7**0.5
    e = (h @ beta - y).detach()
    dW, = torch.autograd.grad(e @ (h @ net.b), W, retain_graph=True)
    dbeta, = torch.autograd.grad(e @ (h @ beta), beta)
    Z, new = X @ net.W.T, net.beta.clone()
    dropout_step(Z, new, net.b, X @ X.T, y, 0.1, mask, activation)
    torch.testing.assert_close(new, net.beta - 0.1 * dbeta)
    torch.testing.assert_close(Z, X @ (net.W - 0.1 * dW).T)


def test_dropout_refuses_a_mask_unlike_the_units():
    net, X, y, _ = dropout_problem("tanh")
    Z, beta = X @ net.W.T, net.beta.clone()
    with pytest.raises(ValueError, match=r"mask: shape \(7,\), but Z has \(5, 7\)"):
        dropout_step(Z, beta, net.b, X @ X.T, y, 0.1, torch.ones(7, dtype=Z.dtype), "tanh")
    assert torch.equal(beta, net.beta) and torch.equal(Z, X @ net.W.T)


def test_dropout_experiment_is_seeded():
    out = convergence_dropout(3, "cpu", p=8)
    assert list(out) == [f"cos {u:g}" for u in (0, 0.4, 0.6, 0.8)] and out == convergence_dropout(3, "cpu", p=8)
    plain = final_cosines("identity", 8, 3, lams=(0.0,))["cos 0"]
    assert abs(out["cos 0"] - plain) < 1e-4 < abs(out["cos 0.8"] - plain)


# Classifier -------------------------------------------------------------------------------------------------------

def test_classifier_step_follows_autograd():
    gen = rng(3)
    normal = lambda *s: torch.randn(*s, dtype=torch.float64, generator=gen)
    W1, W2, B, x, y = normal(7, 5), normal(3, 7), normal(3, 7), normal(9, 5), torch.arange(9) % 3
    leaves = [W1.clone().requires_grad_(), W2.clone().requires_grad_()]
    h = torch.relu(x @ leaves[0].T)
    logits = h @ leaves[1].T / 7**0.5
    q, dW2 = torch.autograd.grad(F.cross_entropy(logits, y), [logits, leaves[1]], retain_graph=True)
    dW1, = torch.autograd.grad(h @ B.T / 7**0.5, leaves[0], q)
    classifier_step(W1, W2, B, x, y, 0.1, 0.3)
    torch.testing.assert_close(W1, leaves[0].detach() - 0.1 * dW1)
    torch.testing.assert_close(W2, (1 - 0.03) * leaves[1].detach() - 0.1 * dW2)


@pytest.mark.parametrize("change, message", [
    (dict(lam=-1.0), "lam: -1.0"), (dict(lam=1000.0), "lr \\* lam < 1"), (dict(lr=0.0), "lr = 0.0"),
    (dict(batch=10**6), "batch: 1000000 of 50 examples"), (dict(steps=0), "steps: 0"), (dict(p=0), "p: 0")])
def test_classifier_refuses_bad_arguments(change, message):
    data = digits(n_train=50, n_test=10, flat=True)
    with pytest.raises(ValueError, match=message):
        fa_classifier(**(dict(data=data, lam=0.0, steps=1, batch=10) | change))
    image = digits(n_train=50, n_test=10)
    with pytest.raises(ValueError, match=r"data: x_train \(50, 1, 8, 8\)"):
        fa_classifier(image, 0.0, 1, batch=10)


def test_authors_experiment_refuses_what_it_lacks():
    with pytest.raises(ValueError, match="activation: 'sine' is not one of identity, relu, tanh, sigmoid"):
        final_cosines("sine", 20, 0)
    with pytest.raises(ValueError, match="must not be negative"):
        final_cosines("relu", 20, 0, lams=(-0.1,))


def test_guards_leave_the_text_that_identifies_stored_runs():
    source = inspect.getsource(fa_classifier)
    assert "def fa_classifier(" in source and "classifier_step(" in source
    assert list(inspect.signature(fa_classifier).parameters)[:3] == ["data", "lam", "steps"]


def test_alignment_of_deltas():
    gen = rng(4)
    W1, W2, x, y = (torch.randn(*s, generator=gen) for s in ((7, 5), (3, 7), (9, 5), (9, 1)))
    y = torch.arange(9) % 3
    assert abs(classifier_state(W1, W2, W2, x, y)["alignment"] - 1) < 1e-6
    assert abs(classifier_state(W1, W2, -W2, x, y)["alignment"] + 1) < 1e-6
    sure = classifier_state(100 * W1, W2, W2, x, (torch.relu(100 * x @ W1.T) @ W2.T).argmax(1))
    assert sure["accuracy"] == 1 and 0 <= sure["alignment"] <= 1 + 1e-6  # deltas far below float32's smallest square


def test_interrupted_training_resumes(tmp_path):
    data = digits(n_train=200, n_test=50, flat=True)
    run = lambda steps, file=None: fa_classifier(data, 0.1, steps, p=20, batch=64, every=5, file=file)
    whole, file = run(22), tmp_path / "state.pt"
    run(10, file)
    assert run(22, file) == whole and whole["step"] == [5, 10, 15, 20, 22]


@pytest.mark.parametrize("c", [torch.ones(2, 3), torch.ones(1)])
def test_neuron_constants_want_one_bias_for_each_neuron(c):
    V = torch.ones(2, 3)
    with pytest.raises(ValueError, match="c: .* is not "): neuron_constants(torch.ones(3, 2), V, V, c=c)
