"""Target propagation: networks that can be undone, the rules, their limits, and the layers for autograd."""
import copy
import math
import pickle
import warnings
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import altbp.target_prop as tp
from altbp.backprop import angle, relative_error
from altbp.training import fit, seeded

NAMES = list(tp.INVERTIBLE)
ACTIVATIONS = [tp.LeakyReLU(), tp.LeakyReLU(0.3), tp.LeakyReLU(2.0), tp.Asinh(), tp.Identity()]
EXACT = ("difference", "limit", "central")  # forms without cancellation


def gen(seed=0):
    return torch.Generator().manual_seed(seed)


def net(n=12, hidden=3, n_classes=None, activation="leaky_relu", dtype=torch.float64, seed=0, **options):
    return tp.InvertibleMLP.square(n, hidden, n_classes, activation=activation, dtype=dtype, generator=gen(seed),
                                   **options)


def batch(model, size=9, seed=1, spread=0.1):
    """Inputs, and targets near the outputs, so that no unit crosses its kink at the default γ."""
    p = model.layers[0].weight
    x = torch.randn(size, p.shape[1], generator=gen(seed), dtype=torch.float64).to(p.dtype)
    with torch.no_grad():
        y = model(x)
    return x, y + spread * y.abs().mean() * torch.randn(y.shape, generator=gen(seed + 1), dtype=torch.float64).to(p.dtype)


def gradients(model, x, target, rule="gait", **options):
    model.zero_grad()
    tp.assign_gradients(model, x, target, rule, **options)
    return [p.grad for p in model.parameters()]


def autograd(model, x, target):
    loss = ((model(x) - target) ** 2).sum(1).mean() / 2
    return torch.autograd.grad(loss, list(model.parameters()))


def worst(a, b):
    return max(relative_error(x, y) for x, y in zip(a, b, strict=True))


def prepared(model, x, target, loss="mse"):
    acts = model.activities(x)
    return acts, tp.output_error(acts.ys[-1], target, loss, model.n_classes)[1]


# Activations --------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("f", ACTIVATIONS, ids=repr)
def test_activation_inverse_and_slope(f):
    z = torch.cat([torch.linspace(-6, 6, 101, dtype=torch.float64), torch.tensor([0.0, -0.0], dtype=torch.float64)])
    torch.testing.assert_close(f.inverse(f.f(z)), z, rtol=1e-13, atol=1e-15)
    away = z[z != 0].requires_grad_()
    slope, = torch.autograd.grad(f.f(away).sum(), away)
    torch.testing.assert_close(f.df(away), slope, rtol=1e-12, atol=0)
    assert (f.df(z) > 0).all() and f.df(z).dtype == z.dtype
    assert f.df(torch.zeros(3, dtype=torch.float32)).dtype == torch.float32
    assert f.df(torch.tensor(0.0)) == 1


@settings(max_examples=60)
@given(st.sampled_from(ACTIVATIONS), st.floats(-5, 5), st.floats(-5, 5))
def test_inverse_difference_is_the_difference(f, y, q):
    y, q = torch.tensor([y], dtype=torch.float64), torch.tensor([q], dtype=torch.float64)
    naive = f.inverse(y + q) - f.inverse(y)
    torch.testing.assert_close(f.inverse_difference(y, q), naive, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("f", ACTIVATIONS, ids=repr)
def test_inverse_difference_does_not_cancel(f):
    y = torch.tensor([-3.0, -1e-3, 0.4, 2.0], dtype=torch.float64)
    exact = 1e-30 / f.df(f.inverse(y))  # to first order, which is all at this size
    torch.testing.assert_close(f.inverse_difference(y, torch.full_like(y, 1e-30)), exact, rtol=1e-12, atol=0)
    assert (f.inverse(y + 1e-30) - f.inverse(y) == 0).all()  # what the naive formula would say


def test_leaky_relu_across_the_kink():
    f = tp.LeakyReLU(0.1)
    y, q = torch.tensor([1.0, -0.2, 0.0, -1e-20]), torch.tensor([-1.5, 0.7, -1.0, 1.0])
    torch.testing.assert_close(f.inverse_difference(y, q), torch.tensor([-6.0, 2.5, -10.0, 1.0]))


def test_invertible_refuses():
    assert tp.invertible("asinh") == tp.Asinh()
    assert tp.invertible(tp.LeakyReLU(0.3)).slope == 0.3
    with pytest.raises(ValueError, match="activation: 'relu' is not one of"):
        tp.invertible("relu")
    with pytest.raises(TypeError, match="activation: .* got ReLU"):
        tp.invertible(nn.ReLU())
    for slope in (0, -0.1, math.nan, math.inf):
        with pytest.raises(ValueError, match="slope"):
            tp.LeakyReLU(slope)


def test_an_activation_of_ones_own():
    class Cubic(tp.InvertibleActivation):
        def f(self, z): return z**3 + z
        def df(self, z): return 3 * z**2 + 1
        def inverse(self, y):
            z = torch.zeros_like(y)
            for _ in range(60):
                z = z - (self.f(z) - y) / self.df(z)
            return z

    model = net(8, 2, activation=Cubic())
    with torch.no_grad():
        for layer in model.layers:
            layer.weight.mul_(0.3)
    x, t = batch(model)
    acts, e = prepared(model, x, t)
    limit = tp.gait_errors(model, acts, e, form="limit")
    assert worst(tp.gait_errors(model, acts, e, 1e-4, "central"), limit) < 1e-6


# Networks -----------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("widths", [[5, 5, 5], [7, 4, 4], [3, 6, 6, 6], [9, 8, 5, 5, 2]])
@pytest.mark.parametrize("name", NAMES)
def test_layers_can_be_undone(widths, name):
    model = tp.InvertibleMLP(widths, activation=name, generator=gen(), dtype=torch.float64)
    acts = model.activities(torch.randn(6, widths[0], dtype=torch.float64))
    torch.testing.assert_close(acts.ys[-1], model(acts.xs[0]))
    for l in range(1, len(widths) - 1):
        layer, f = model.layers[l], model.activations[l]
        read = layer.inverse(f.inverse(acts.ys[l]))
        torch.testing.assert_close(read, acts.xs[l])
        torch.testing.assert_close(acts.xs[l], acts.ys[l - 1][:, :widths[l + 1]], rtol=0, atol=0)
    for y, z, s, n in zip(acts.ys, acts.zs, acts.slopes, widths[1:]):
        assert y.shape == z.shape == s.shape == (6, n)


def test_orthogonal_and_gaussian_start():
    model = tp.InvertibleMLP([30, 20, 20], generator=gen(), dtype=torch.float64)
    W1, W2 = (layer.weight for layer in model.layers)
    torch.testing.assert_close(W1 @ W1.mT, torch.eye(20, dtype=torch.float64))
    assert tp.orthogonality_defect(W2) < 1e-14
    assert all((layer.bias == 0).all() for layer in model.layers)
    wide = tp.InvertibleMLP([300, 200, 200], init="gaussian", generator=gen())
    assert abs(wide.layers[0].weight.var().item() * 250 - 1) < 0.03
    assert abs(wide.layers[1].weight.var().item() * 200 - 1) < 0.03
    a, b = seeded(lambda: tp.InvertibleMLP([4, 4]), 3), seeded(lambda: tp.InvertibleMLP([4, 4]), 3)
    assert torch.equal(a.layers[0].weight, b.layers[0].weight)
    assert a.layers[0].weight.dtype == torch.float32
    last = tp.InvertibleMLP.square(6, 2, generator=gen()).layers
    assert not torch.equal(last[-1].weight, last[-2].weight)


def test_network_refuses():
    assert tp.InvertibleMLP(torch.tensor([4, 4, 3]).numpy()).layers[1].in_features == 3
    for widths in ([5], [], [4, 0], [4, 2.5], [-1, 3]):
        with pytest.raises(ValueError, match="widths"):
            tp.InvertibleMLP(widths)
    with pytest.raises(ValueError, match="widths: layer 3 grows from 4 to 6"):
        tp.InvertibleMLP([9, 5, 4, 6])
    tp.InvertibleMLP([2, 5, 4])  # the first layer may grow
    for n in (0, 5, -1, 2.5):
        with pytest.raises(ValueError, match="n_classes"):
            tp.InvertibleMLP([9, 4], n_classes=n)
    with pytest.raises(ValueError, match="init: 'zeros'"):
        tp.InvertibleMLP([4, 4], init="zeros")
    with pytest.raises(ValueError, match="activation: 'tanh'"):
        tp.InvertibleMLP([4, 4], activation="tanh")
    for x in (torch.zeros(3, 5), torch.zeros(4), torch.zeros(2, 1, 4)):
        with pytest.raises(ValueError, match="x: expected"):
            tp.InvertibleMLP([4, 4])(x)


def test_network_copies_pickles_and_loads():
    model = net(6, 2, 4)
    x, _ = batch(model)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(other(x), model(x))
    fresh = net(6, 2, 4, seed=9)
    fresh.load_state_dict(model.state_dict())
    assert torch.equal(fresh(x), model(x))


def test_solving():
    W, p = torch.randn(5, 5, dtype=torch.float64), torch.randn(3, 5, dtype=torch.float64)
    torch.testing.assert_close(tp.solve_rows(W, p) @ W.mT, p)
    with pytest.raises(ValueError, match=r"layer 3: expected a square weight matrix, got \(5, 4\)"):
        tp.solve_rows(W[:, :4], p, "layer 3")
    W[2] = 0
    with pytest.raises(torch.linalg.LinAlgError, match="layer 2: the weight matrix is singular"):
        tp.solve_rows(W, p, "layer 2")
    for dtype in (torch.float16, torch.bfloat16):  # in float32, for there is no half-precision solve
        W, p = torch.eye(4, dtype=dtype) * 2, torch.ones(2, 4, dtype=dtype)
        d = tp.solve_rows(W, p)
        assert d.dtype == dtype and (d == 0.5).all()


# Output errors ------------------------------------------------------------------------------------------------------

def test_output_errors_against_autograd():
    y, labels = torch.randn(5, 7, dtype=torch.float64), torch.tensor([0, 3, 2, 1, 0])
    one_hot = F.one_hot(labels, 4).double()
    value, e = tp.output_error(y, labels, "mse", 4)
    torch.testing.assert_close(e, F.pad(y[:, :4] - one_hot, (0, 3)))
    torch.testing.assert_close(value, ((y[:, :4] - one_hot) ** 2).sum(1).mean() / 2)
    torch.testing.assert_close(tp.output_error(y, one_hot, "mse", 4)[1], e)
    value, e = tp.output_error(y, labels, "ce", 4)
    torch.testing.assert_close(e, F.pad(y[:, :4].softmax(1) - one_hot, (0, 3)))
    torch.testing.assert_close(tp.output_error(y, labels, F.cross_entropy, 4)[1], e)
    assert tp.output_error(y.float(), labels, "mse", 4)[1].dtype == torch.float32
    for dtype in (torch.int32, torch.uint8):
        for loss in ("mse", "ce"):
            same = tp.output_error(y, labels.to(dtype), loss, 4)[1]
            assert torch.equal(same, tp.output_error(y, labels, loss, 4)[1])
    assert not value.requires_grad


def test_output_error_refuses():
    y = torch.randn(5, 4)
    cases = [dict(target=torch.zeros(4, dtype=torch.long)), dict(target=torch.zeros(5, 3)), dict(target=torch.zeros(5)),
             dict(target=torch.full((5,), 4)), dict(target=torch.full((5,), -1)), dict(target=torch.zeros(5, 4, 1))]
    for case in cases:
        with pytest.raises(ValueError, match="target"):
            tp.output_error(y, **case)
    with pytest.raises(TypeError, match="target: expected a tensor, got list"):
        tp.output_error(y, [0, 1, 2, 3, 0])
    with pytest.raises(ValueError, match="loss: 'hinge'"):
        tp.output_error(y, torch.zeros(5, 4), "hinge")
    with pytest.raises(ValueError, match="loss: expected a number"):
        tp.output_error(y, torch.zeros(5, 4), lambda s, t: (s - t) ** 2)
    with pytest.raises(ValueError, match="loss: expected a number as a tensor, got 3.0"):
        tp.output_error(y, torch.zeros(5, 4), lambda s, t: 3.0)
    for n in (0, 7, 2.5):  # 7: the four scores would be cut to one by a negative padding
        with pytest.raises(ValueError, match="n_classes: .* is not an integer from 1 to 4"):
            tp.output_error(y, torch.zeros(5, dtype=torch.long), "mse", n)


# Rules --------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("widths", [[6] * 5, [9, 7, 7, 4, 3], [3, 6, 5]])
def test_bp_is_autograd(name, widths):
    model = tp.InvertibleMLP(widths, activation=name, init="gaussian", generator=gen(), dtype=torch.float64)
    x, t = batch(model)
    assert worst(gradients(model, x, t, "bp"), autograd(model, x, t)) < 1e-12


@pytest.mark.parametrize("depth", [2, 9, 17])
@pytest.mark.parametrize("form", EXACT)
@pytest.mark.parametrize("name", ["leaky_relu", "identity"])
def test_gait_is_backpropagation_on_orthogonal_nets(name, form, depth):
    for dtype, bound in ((torch.float64, 1e-12), (torch.float32, 1e-5)):
        model = net(32, depth - 1, activation=name, dtype=dtype)
        x, t = batch(model, 16)
        assert worst(gradients(model, x, t, form=form), autograd(model, x, t)) < bound


@settings(max_examples=30)
@given(st.integers(0, 10**6), st.integers(1, 5), st.integers(0, 4), st.integers(1, 6), st.sampled_from(NAMES))
def test_limit_is_backpropagation_on_any_orthogonal_tower(seed, last, drop, size, name):
    widths = [7, last + 2 * drop, last + 2 * drop, last + drop, last]
    model = tp.InvertibleMLP(widths, activation=name, generator=gen(seed), dtype=torch.float64)
    x, t = batch(model, size, seed)
    ours, theirs = gradients(model, x, t, form="limit"), autograd(model, x, t)
    for a, b in zip(ours, theirs):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("form,order", [("difference", 1), ("central", 2)])
def test_smooth_activations_converge_with_the_order(form, order):
    model = net(16, 3, activation="asinh")
    x, t = batch(model)
    exact = autograd(model, x, t)
    coarse, fine = (worst(gradients(model, x, t, form=form, gamma=g), exact) for g in (2e-2, 1e-2))
    assert abs(math.log2(coarse / fine) - order) < 0.05


@pytest.mark.parametrize("name", NAMES)
def test_all_forms_agree_where_rounding_allows(name):
    model = net(10, 2, activation=name, init="gaussian", seed=3)
    x, t = batch(model)
    acts, e = prepared(model, x, t)
    reference = tp.gait_errors(model, acts, e, 1e-3)
    assert worst(tp.gait_errors(model, acts, e, 1e-3, "literal"), reference) < 1e-6
    limit = tp.gait_errors(model, acts, e, form="limit")
    assert worst(tp.gait_errors(model, acts, e, form="adaptive"), limit) < 1e-4
    assert worst(tp.gait_errors(model, acts, e, 1e-9), limit) < 1e-8


def test_limit_by_hand():
    model = net(5, 2, init="gaussian")
    x, t = batch(model)
    acts, e = prepared(model, x, t)
    errors = tp.gait_errors(model, acts, e, form="limit")
    for l in (2, 1):
        W = model.layers[l].weight.detach()
        torch.testing.assert_close(errors[l - 1], (errors[l] * acts.slopes[l]) @ torch.linalg.inv(W).mT)


@pytest.mark.parametrize("name", NAMES)
def test_itp_targets_are_inverses_of_targets(name):
    model = net(6, 3, activation=name)
    x, t = batch(model, spread=0.3)
    acts, e = prepared(model, x, t)
    for step in (1.0, 0.25):
        targets = tp.layer_targets(acts, [step * d for d in tp.itp_errors(model, acts, e, step)])
        want = acts.ys[-1] - step * e
        for l in range(3, -1, -1):
            torch.testing.assert_close(targets[l], want, rtol=1e-9, atol=1e-9)
            want = model.layers[l].inverse(model.activations[l].inverse(want)) if l else None


@pytest.mark.parametrize("corrected", [False, True])
def test_tp_with_exact_inverses_is_itp(corrected):
    model = net(6, 3, activation="asinh")
    x, t = batch(model)
    acts, e = prepared(model, x, t)
    inverses = [torch.linalg.inv(layer.weight.detach()) for layer in model.layers[1:]]
    assert worst(tp.tp_errors(model, acts, e, inverses, corrected=corrected), tp.itp_errors(model, acts, e)) < 1e-12


def test_targets_stand_for_the_errors():
    model = net(5, 2)
    acts, e = prepared(model, *batch(model))
    errors = tp.gait_errors(model, acts, e, 0.1)
    targets = tp.layer_targets(acts, errors, 0.1)
    for t, y, d, scale in zip(targets, acts.ys, errors, (0.01, 0.1, 1), strict=True):
        torch.testing.assert_close(t, y - scale * d)
    with pytest.raises(ValueError):  # not as many errors as layers
        tp.layer_targets(acts, errors[1:])


def test_gait_with_given_inverses():
    model = net(8, 3)
    x, t = batch(model)
    acts, e = prepared(model, x, t)
    exact = [torch.linalg.inv(layer.weight.detach()) for layer in model.layers[1:]]
    for form in EXACT:
        assert worst(tp.gait_errors(model, acts, e, form=form, inverses=exact), tp.bp_errors(model, acts, e)) < 1e-12
    noisy = [B + 1e-4 * torch.randn(B.shape, generator=gen(5), dtype=B.dtype) for B in exact]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        plain = tp.gait_errors(model, acts, e, 1e-2, "literal", noisy)
    corrected = tp.gait_errors(model, acts, e, 1e-2, "literal", noisy, corrected=True)
    bp = tp.bp_errors(model, acts, e)
    assert angle(plain[0], bp[0]) > 45
    assert angle(corrected[0], bp[0]) < 0.5
    assert worst(corrected, tp.gait_errors(model, acts, e, 1e-2, inverses=noisy)) < 1e-6


def test_gauss_newton_against_explicit_jacobians():
    model = tp.InvertibleMLP([4, 6, 5, 3], activation="asinh", init="gaussian", generator=gen(), dtype=torch.float64)
    x, t = batch(model, 4)
    acts, e = prepared(model, x, t)

    def rest(y, l):  # the network above layer l
        for layer, f in zip(model.layers[l:], model.activations[l:]):
            y = f.f(layer(y))
        return y

    Js = tp.jacobians(model, acts)
    errors, damped = tp.gauss_newton_errors(model, acts, e), tp.gauss_newton_errors(model, acts, e, 0.1)
    for l in (1, 2, 3):
        for i in range(4):
            J = torch.autograd.functional.jacobian(lambda y: rest(y, l), acts.ys[l - 1][i].detach())
            torch.testing.assert_close(Js[l - 1][i], J)
            least = torch.linalg.lstsq(J, e[i, :, None], driver="gelsd").solution[:, 0]
            torch.testing.assert_close(errors[l - 1][i], least)
            want = J.mT @ torch.linalg.solve(J @ J.mT + 0.1 * torch.eye(3, dtype=J.dtype), e[i])
            torch.testing.assert_close(damped[l - 1][i], want)
    for damping in (-1, math.nan, math.inf):
        with pytest.raises(ValueError, match="damping"):
            tp.gauss_newton_errors(model, acts, e, damping)


@pytest.mark.parametrize("rule", ["bp", "itp", "gait", "gn", "tp"])
@pytest.mark.parametrize("form", tp.FORMS)
def test_zero_error_gives_zero_update(rule, form):
    if rule != "gait" and form != "difference":
        return
    for dtype in (torch.float64, torch.float32):
        model = net(8, 6, 3, dtype=dtype)
        x, _ = batch(model)
        t = model(x).detach()
        options = {"gait": dict(form=form), "tp": dict(corrected=True)}.get(rule, {})
        if rule == "tp":
            options["inverses"] = [torch.randn(8, 8, dtype=dtype) for _ in range(6)]
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert all((g == 0).all() for g in gradients(model, x, t, rule, **options))


@pytest.mark.parametrize("form", tp.FORMS)
def test_one_example_without_error_among_others(form):
    model = net(8, 3)
    x, t = batch(model)
    t[2] = model(x)[2].detach()
    acts, e = prepared(model, x, t)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        errors = tp.gait_errors(model, acts, e, form=form)
    assert all((d[2] == 0).all() and d.isfinite().all() and (d[0] != 0).any() for d in errors)


def test_auxiliary_units_have_no_error():
    for model in (net(10, 3, 4), tp.InvertibleMLP([10, 9, 6, 4], 2, generator=gen(), dtype=torch.float64)):
        x, t = batch(model)
        acts, e = prepared(model, x, t)
        assert (e[:, model.n_classes:] == 0).all()
        for d, above in zip(tp.gait_errors(model, acts, e), acts.xs[1:]):
            assert (d[:, above.shape[1]:] == 0).all()
        assert worst(gradients(model, x, t), gradients(model, x, t, "bp")) < 1e-12


def test_deep_single_precision_does_not_underflow():
    model = net(16, 39, dtype=torch.float32)  # γ^39 is far below the smallest float32
    x, t = batch(model)
    for form in EXACT:
        assert worst(gradients(model, x, t, form=form), autograd(model, x, t)) < 1e-4


def test_rules_leave_their_arguments_alone():
    model = net(8, 3)
    x, t = batch(model)
    acts, e = prepared(model, x, t)
    before = [y.clone() for y in (*acts.ys, *acts.zs, e, *model.parameters())]
    for form in tp.FORMS:
        tp.gait_errors(model, acts, e, form=form, gamma=1e-2)
    tp.itp_errors(model, acts, e)
    tp.gauss_newton_errors(model, acts, e)
    assert all(torch.equal(a, b) for a, b in zip(before, (*acts.ys, *acts.zs, e, *model.parameters())))


def test_rules_refuse():
    model = net(6, 2)
    x, t = batch(model)
    acts, e = prepared(model, x, t)
    for gamma in (0, -1e-3, math.nan, math.inf):
        with pytest.raises(ValueError, match="gamma"):
            tp.gait_errors(model, acts, e, gamma)
    for step in (0, -1.0, math.inf):
        with pytest.raises(ValueError, match="step"):
            tp.itp_errors(model, acts, e, step)
    with pytest.raises(ValueError, match="form: 'exact' is not one of"):
        tp.gait_errors(model, acts, e, form="exact")
    with pytest.raises(ValueError, match="inverses: expected the shapes"):
        tp.gait_errors(model, acts, e, inverses=[torch.eye(6)])
    with pytest.raises(ValueError, match="rule: 'fa' is not one of"):
        tp.assign_gradients(model, x, t, "fa")
    for penalty in (-1, math.nan):
        with pytest.raises(ValueError, match="penalty"):
            tp.assign_gradients(model, x, t, penalty=penalty)
    for first in (0, 4):
        with pytest.raises(ValueError, match="penalise_from: expected a layer from 1 to 3"):
            tp.assign_gradients(model, x, t, penalty=0.1, penalise_from=first)
    with pytest.raises(TypeError, match="model: expected an InvertibleMLP, got Linear"):
        tp.assign_gradients(nn.Linear(6, 6), x, t)
    with pytest.raises(TypeError, match="x: expected real numbers"):
        tp.assign_gradients(model, torch.ones(2, 6, dtype=torch.long), t[:2])
    for rule in ("bp", "itp", "gait", "gn"):
        with pytest.raises(ValueError, match="e_out: expected the output's shape"):
            tp.RULES[rule](model, acts, e[:, :3])
    with torch.no_grad():
        model.layers[1].weight[0] = 0
    with pytest.raises(torch.linalg.LinAlgError, match="layer 2: the weight matrix is singular"):
        tp.assign_gradients(model, x, t)
    model.layers[2] = nn.Linear(6, 5, dtype=torch.float64)
    with pytest.raises(ValueError, match="layer 3: expected a square weight matrix"):
        tp.gait_errors(model, model.activities(x), torch.randn(9, 5, dtype=torch.float64))


def test_overflow_names_the_layer():
    model = net(6, 4, activation="asinh", output_activation="identity")
    x, t = batch(model)
    with pytest.raises(FloatingPointError, match="layer [123]: the error sent down"):
        gradients(model, x, t + 1e4, "itp")


@pytest.mark.parametrize("form", ["literal", "adaptive"])
def test_forms_by_targets_do_not_return_what_is_not_finite(form):
    model = net(6, 3, activation="asinh", output_activation="identity")
    acts, e = prepared(model, *batch(model))
    with pytest.raises(FloatingPointError, match="layer 2: the error sent down"):
        tp.gait_errors(model, acts, 1e9 * e, 0.5 if form == "literal" else 1e9, form)
    with torch.no_grad():
        model.layers[2].weight.fill_(math.nan)
    with pytest.raises(FloatingPointError, match="layer 2: the error sent down"):
        tp.gait_errors(model, acts, e, form=form)


@pytest.mark.parametrize("wrong", [dict(kind="l2"), dict(penalise_from=1.5), dict(gamma=0), dict(penalty=-1)])
def test_wrong_arguments_leave_no_gradients_behind(wrong):
    model = net(6, 2)
    with pytest.raises(ValueError, match=next(iter(wrong))):
        tp.assign_gradients(model, *batch(model), **dict(penalty=0.1) | wrong)
    assert all(p.grad is None for p in model.parameters())
    with pytest.raises(ValueError, match="kind"):  # even where nothing is penalised
        tp.assign_gradients(model, *batch(model), kind="l2")


# Rounding -----------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("n,gamma,dtype", [(64, 1e-2, torch.float64), (24, 1e-3, torch.float64), (64, 0.1, torch.float32)])
def test_predicted_rounding_error(n, gamma, dtype):
    model = net(n, 3, activation="asinh", dtype=dtype)
    x, t = batch(model, 40)
    acts, e = prepared(model, x, t)
    exact = tp.gait_errors(model, acts, e, gamma)
    predicted = tp.predicted_rounding_error(acts, exact, gamma)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        literal = tp.gait_errors(model, acts, e, gamma, "literal")
    measured = [relative_error(a, b) for a, b in zip(literal, exact)]
    assert predicted[-1] == measured[-1] == 0
    for a, b in zip(predicted[:-1], measured):
        assert 1 / 3 < a / b < 3


def test_noise_is_announced_with_its_layers():
    model = net(32, 4)
    x, t = batch(model)
    with pytest.warns(UserWarning, match=r"layers 1 \("):
        gradients(model, x, t, form="literal")
    single = net(32, 4, dtype=torch.float32)
    with pytest.warns(UserWarning, match=r"layers 1 .*, 2 .*, 3 .*form='difference'"):
        gradients(single, *batch(single), form="literal")
    with warnings.catch_warnings(record=True) as caught:  # one text for many batches, not one for each
        warnings.simplefilter("always")
        for seed in range(20):
            gradients(model, *batch(model, seed=seed), form="literal")
    assert len(caught) == 20 and len({str(w.message) for w in caught}) <= 4
    with pytest.warns(UserWarning, match="layers 1 .*4 "):
        gradients(single, *batch(single), form="adaptive")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        gradients(model, x, t, form="adaptive")
        gradients(net(32, 2), x, t, form="literal")
        gradients(single, *batch(single))


# Gradients, penalties, angles ---------------------------------------------------------------------------------------

def test_gradients_add_up_and_frozen_parameters_stay():
    model = net(6, 2)
    x, t = batch(model)
    once = [g.clone() for g in gradients(model, x, t)]
    tp.assign_gradients(model, x, t)
    assert worst([p.grad for p in model.parameters()], [2 * g for g in once]) < 1e-15
    model.layers[1].weight.requires_grad_(False)
    model.zero_grad()
    tp.assign_gradients(model, x, t, penalty=0.1)
    assert model.layers[1].weight.grad is None and model.layers[1].bias.grad is not None


def test_layers_without_a_bias():
    model = net(6, 2)
    plain, bare = copy.deepcopy(model), model
    for layer in bare.layers:
        layer.bias = None
    x, t = batch(model)
    for form in tp.FORMS:
        ours, theirs = gradients(bare, x, t, form=form), gradients(plain, x, t, form=form)
        assert worst(ours, theirs[::2]) < 1e-9
    inverses = [layer.weight.detach().mT for layer in bare.layers[1:]]
    assert worst(gradients(bare, x, t, "tp", inverses=inverses), gradients(bare, x, t, "itp")) < 1e-9


def test_a_loss_that_is_not_finite_writes_nothing():
    model = net(6, 2)
    x, t = batch(model)
    x[0, 0] = math.nan
    assert not tp.assign_gradients(model, x, t).isfinite()
    assert all(p.grad is None for p in model.parameters())


def test_a_rule_of_ones_own():
    model = net(6, 2)
    x, t = batch(model)

    def feedback(model, acts, e_out, matrices):
        return tp.sweep(acts, e_out, lambda l, e: (e * acts.slopes[l - 1]) @ matrices[l - 2])

    own = gradients(model, x, t, feedback, matrices=[layer.weight for layer in model.layers[1:]])
    assert worst(own, autograd(model, x, t)) < 1e-12


@pytest.mark.parametrize("kind", ["offdiag", "identity"])
@pytest.mark.parametrize("shape", [(5, 5), (4, 6), (6, 4)])
def test_penalty_gradient(kind, shape):
    W = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    R = W.mT @ W
    eye = torch.eye(shape[1], dtype=torch.float64)
    want = ((R - eye) ** 2).sum() if kind == "identity" else (R * (1 - eye)).pow(2).sum()
    value, gradient = tp.orthogonality_penalty(W.detach(), kind)
    torch.testing.assert_close(value, want.detach())
    torch.testing.assert_close(gradient, torch.autograd.grad(want, W)[0])
    torch.testing.assert_close(torch.autograd.grad(tp.orthogonality_penalty(W, kind)[0], W)[0], gradient)
    with pytest.raises(ValueError, match="kind"):
        tp.orthogonality_penalty(W, "l2")
    with pytest.raises(ValueError, match="W: expected a matrix"):
        tp.orthogonality_penalty(W[0], kind)


@pytest.mark.parametrize("first", [1, 2, 3])
def test_penalty_is_added_to_the_mean_gradient(first):
    model = net(6, 2, init="gaussian")
    x, t = batch(model)
    plain = [g.clone() for g in gradients(model, x, t)][::2]
    with_penalty = gradients(model, x, t, penalty=0.3, penalise_from=first)[::2]
    for l, (a, b, layer) in enumerate(zip(plain, with_penalty, model.layers), 1):
        extra = 0.3 * tp.orthogonality_penalty(layer.weight.detach())[1] if l >= first else torch.zeros_like(a)
        torch.testing.assert_close(b - a, extra)


def test_defect_and_predicted_angle():
    Q = net(8, 1).layers[1].weight.detach()
    assert tp.orthogonality_defect(3 * Q, scale_free=True) < 1e-14
    assert abs(tp.orthogonality_defect(3 * Q) - 8) < 1e-12
    with pytest.raises(ValueError, match="W: expected a square"):
        tp.orthogonality_defect(Q[:, :3])
    assert math.isnan(tp.predicted_angle([0 * Q])[0])
    model = net(128, 4, activation="asinh", seed=2)
    with torch.no_grad():
        for layer in model.layers:
            layer.weight.add_(0.05 / 128**0.5 * torch.randn(128, 128, generator=gen(3), dtype=torch.float64))
    acts, e = prepared(model, *batch(model, 40))
    pairs = zip(tp.gait_errors(model, acts, e, form="limit"), tp.bp_errors(model, acts, e))
    predicted = tp.predicted_angle([layer.weight for layer in model.layers[1:]])
    assert len(predicted) == 5 and predicted[-1] == 0
    for want, (a, b) in list(zip(predicted, pairs))[:-1]:
        assert abs(angle(a, b) / want - 1) < 0.1


@settings(max_examples=50)
@given(st.integers(2, 8), st.integers(0, 10**6))
def test_alignment_bound(n, seed):
    W = torch.randn(n, n, generator=gen(seed), dtype=torch.float64)
    v = torch.randn(n, generator=gen(seed + 1), dtype=torch.float64)
    kappa = torch.linalg.cond(W).item()
    cosine = math.cos(angle(torch.linalg.solve(W, v), W.mT @ v, degrees=False))
    assert cosine >= tp.alignment_bound(kappa) * (1 - 1e-9)


def test_alignment_bound_is_attained():
    u, s, v = torch.linalg.svd(torch.randn(4, 4, dtype=torch.float64))
    s = torch.tensor([10.0, 5, 2, 1], dtype=torch.float64)
    W, worst_case = u @ torch.diag(s) @ v, u[:, 0] + u[:, 3]
    cosine = math.cos(angle(torch.linalg.solve(W, worst_case), W.mT @ worst_case, degrees=False))
    assert abs(cosine - tp.alignment_bound(10)) < 1e-13
    assert tp.alignment_bound(1) == 1 and tp.alignment_bound(math.inf) == 0
    for kappa in (0.5, math.nan):
        with pytest.raises(ValueError, match="kappa"):
            tp.alignment_bound(kappa)


# Half precision, training ---------------------------------------------------------------------------------------------

@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("rule", ["bp", "itp", "gait", "gn"])
def test_half_precision_is_promoted(dtype, rule):
    model = net(8, 3, dtype=dtype)
    x, t = batch(model, spread=3)  # near the outputs, the forward pass's rounding would be most of the error
    ours = gradients(model, x, t, rule)
    assert all(g.dtype == dtype and g.isfinite().all() for g in ours)
    if rule in ("bp", "gait"):
        assert worst(ours, autograd(model.float(), x.float(), t.float())) < 0.1


@pytest.mark.parametrize("rule", ["bp", "itp", "gait", "gn"])
def test_autocast_is_for_the_forward_pass_only(rule):
    model = net(8, 3, dtype=torch.float32)
    x, t = batch(model, spread=3)
    want = [g.clone() for g in gradients(model, x, t, rule, penalty=0.1)]
    with torch.autocast("cpu", torch.bfloat16):
        ours = gradients(model, x, t, rule, penalty=0.1)
    assert all(g.dtype == torch.float32 for g in ours)
    if rule in ("bp", "gait"):
        assert worst(ours, want) < 0.1
    else:
        assert all(g.isfinite().all() for g in ours)


@pytest.mark.parametrize("form", tp.FORMS)
def test_empty_batches(form):
    model = net(6, 2)
    acts = model.activities(torch.zeros(0, 6, dtype=torch.float64))
    errors = tp.gait_errors(model, acts, torch.zeros(0, 6, dtype=torch.float64), form=form)
    assert [tuple(e.shape) for e in errors] == [(0, 6)] * 3


def test_it_is_a_rule_for_fit():
    data = torch.rand(40, 8, dtype=torch.float64), torch.randint(3, (40,))
    runs = []
    for rule in ("bp", "gait"):
        model = net(8, 2, 3)
        sgd = partial(torch.optim.SGD, lr=0.1)
        runs.append(fit(model, data, 5, sgd, partial(tp.assign_gradients, rule=rule), batch_size=10, seed=0)["loss"])
    assert runs[0][0] == runs[1][0] and runs[0][-1] < runs[0][0]
    assert abs(runs[0][-1] - runs[1][-1]) < 0.05  # close, but the weights leave the orthogonal ones


def test_batches_of_one():
    model = net(6, 2, 3)
    x, _ = batch(model, 1)
    label = torch.tensor([1])
    assert worst(gradients(model, x, label), gradients(model, x, label, "bp")) < 1e-12


# Inverse feedback for autograd --------------------------------------------------------------------------------------

def sequential(dtype=torch.float64, make=tp.InverseFeedbackLinear):
    return nn.Sequential(nn.Linear(5, 7), nn.LeakyReLU(0.1), make(7), nn.LeakyReLU(0.1), make(7), nn.Tanh(),
                         nn.Linear(7, 3)).to(dtype)


def test_backward_is_the_limit_form():
    model = net(9, 3, 4, init="gaussian")
    x, labels = batch(model)[0], torch.randint(4, (9,))
    layers = [model.layers[0]] + [tp.InverseFeedbackLinear(9, dtype=torch.float64) for _ in range(3)]
    for new, old in zip(layers, model.layers):
        new.load_state_dict(old.state_dict())
    other = nn.Sequential(*[m for layer in layers for m in (layer, nn.LeakyReLU(0.1))])
    F.cross_entropy(other(x)[:, :4], labels).backward()
    ours = gradients(model, x, labels, form="limit", loss="ce")
    assert worst([p.grad for layer in layers for p in layer.parameters()], ours) < 1e-12


@pytest.mark.parametrize("shape", [(6,), (3, 6), (2, 3, 6), (0, 6)])
@pytest.mark.parametrize("bias", [True, False])
def test_inverse_feedback_layer(shape, bias):
    layer = tp.InverseFeedbackLinear(6, bias=bias, dtype=torch.float64)
    x = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    g = torch.randn(shape, dtype=torch.float64)
    out = layer(x)
    torch.testing.assert_close(out, F.linear(x, layer.weight, layer.bias))
    dx, *rest = torch.autograd.grad(out, [x, *layer.parameters()], g)
    torch.testing.assert_close(dx @ layer.weight.mT, g)
    exact = torch.autograd.grad(F.linear(x, layer.weight, layer.bias), list(layer.parameters()), g)
    for a, b in zip(rest, exact, strict=True):
        torch.testing.assert_close(a, b)


def test_inverse_feedback_refuses():
    with pytest.raises(ValueError, match="out_features: a layer from 3 to 4"):
        tp.InverseFeedbackLinear(3, 4)
    tp.InverseFeedbackLinear(3, 3)
    with pytest.raises(ValueError, match="weight: expected a square"):
        tp.inverse_feedback_linear(torch.zeros(2, 3), torch.zeros(4, 3))
    with pytest.raises(ValueError, match="x: expected"):
        tp.inverse_feedback_linear(torch.zeros(2, 4), torch.zeros(3, 3))
    with pytest.raises(torch.linalg.LinAlgError, match="singular"):
        x = torch.zeros(2, 3, requires_grad=True)
        tp.inverse_feedback_linear(x, torch.zeros(3, 3)).sum().backward()


def test_double_backward_differentiates_the_rule():
    W = torch.randn(3, 3, dtype=torch.float64, requires_grad=True)
    x, g = (torch.randn(2, 3, dtype=torch.float64, requires_grad=True) for _ in "ab")

    def down(W, g):
        return torch.autograd.grad(tp.inverse_feedback_linear(x, W), x, g, create_graph=True)[0]

    ours = torch.autograd.grad(down(W, g).pow(2).sum(), [W, g])
    want = torch.autograd.grad((g @ torch.linalg.inv(W).mT).pow(2).sum(), [W, g])
    assert worst(ours, want) < 1e-10


def test_torch_func():
    layer = tp.InverseFeedbackLinear(4, dtype=torch.float64)
    x = torch.randn(5, 4, dtype=torch.float64)
    params = dict(layer.named_parameters())

    def loss(params, x):
        return torch.func.functional_call(layer, params, (x,)).pow(3).sum()

    each = torch.func.vmap(torch.func.grad(loss, argnums=(0, 1)), (None, 0))(params, x)
    for i in range(5):
        one = torch.func.grad(loss, argnums=(0, 1))(params, x[i])
        torch.testing.assert_close(each[1][i], one[1])
        torch.testing.assert_close(each[0]["weight"][i], one[0]["weight"])
    stack = {k: torch.stack([v, 2 * v]) for k, v in params.items()}
    both = torch.func.vmap(torch.func.grad(loss, argnums=1), (0, None))(stack, x)
    torch.testing.assert_close(both[1], torch.func.grad(loss, argnums=1)({k: 2 * v for k, v in params.items()}, x))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_and_autocast(dtype):
    model = sequential(torch.float32)
    x = torch.randn(4, 5)
    model(x).sum().backward()
    full = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    with torch.autocast("cpu", dtype):
        model(x).float().sum().backward()
    cast = [p.grad.clone() for p in model.parameters()]
    assert all(a.dtype == torch.float32 and relative_error(a, b) < 0.2 for a, b in zip(cast, full))
    half = sequential(dtype)
    half(x.to(dtype)).sum().backward()
    assert all(p.grad.dtype == dtype and p.grad.isfinite().all() for p in half.parameters())


def test_convert():
    plain = nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 6), nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 3)))
    ours = tp.convert(plain, skip=["2"])
    kinds = [type(m).__name__ for m in ours.modules() if isinstance(m, nn.Linear)]
    assert kinds == ["Linear", "Linear", "InverseFeedbackLinear", "Linear"]
    assert type(plain[3][0]) is nn.Linear
    x = torch.randn(3, 5)
    assert torch.equal(plain(x), ours(x)) and plain.state_dict().keys() == ours.state_dict().keys()
    with pytest.raises(ValueError, match="skip: no modules"):
        tp.convert(plain, skip=["9"])
    with pytest.raises(ValueError, match="no square nn.Linear"):
        tp.convert(nn.Linear(3, 4))
    shared = nn.ModuleDict({"a": nn.Linear(4, 4), "c": nn.Linear(4, 4)})
    shared["b"] = shared["a"]
    for name in "ab":  # either name of a module that has two
        ours = tp.convert(shared, skip=[name])
        assert type(ours["a"]) is nn.Linear and type(ours["c"]) is tp.InverseFeedbackLinear
    ours = tp.convert(plain, skip=["2"])
    assert torch.equal(copy.deepcopy(ours)(x), pickle.loads(pickle.dumps(ours))(x))


def test_compile():
    model = sequential(torch.float32)
    x = torch.randn(4, 5)
    model(x).sum().backward()
    want = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    torch.compile(model, backend="aot_eager", fullgraph=True)(x).sum().backward()
    assert worst([p.grad for p in model.parameters()], want) < 1e-5


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_cuda():
    model = net(16, 4, 10, dtype=torch.float64).cuda()
    x, labels = torch.rand(6, 16, dtype=torch.float64).cuda(), torch.randint(10, (6,)).cuda()
    for form in tp.FORMS:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            assert all(g.is_cuda and g.isfinite().all() for g in gradients(model, x, labels, form=form))
    assert worst(gradients(model, x, labels), gradients(model, x, labels, "bp")) < 1e-12
    for rule in ("itp", "gn"):
        gradients(model, x, labels, rule, penalty=0.1)


def test_shapes_and_types_that_do_not_fit():
    with pytest.raises(ValueError, match=r"p: expected rows \(B, 3\) of real numbers, got torch.int64"):
        tp.solve_rows(2 * torch.eye(3).long(), torch.ones(2, 3).long())  # else cut off to integers
    for shape in ((2, 4), (3,)):
        with pytest.raises(ValueError, match=r"p: expected rows \(B, 3\)"): tp.solve_rows(torch.eye(3), torch.ones(shape))
    for shape in ((4,), (2, 3, 4)):
        with pytest.raises(ValueError, match="y: expected"): tp.output_error(torch.ones(shape), torch.zeros(2).long())
    acts = net(4, 1).activities(torch.ones(2, 4, dtype=torch.float64))
    with pytest.raises(ValueError, match="gamma"): tp.layer_targets(acts, acts.ys, gamma=0.0)
    with pytest.raises(TypeError, match="skip"): tp.convert(nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3)), skip="0")


@pytest.mark.parametrize("rule", ["bp", "itp", "gait", "gn"])
def test_errors_of_another_dtype_are_promoted(rule):
    model, e = net(6, 3), torch.eye(6)[:3]
    acts = model.activities(torch.linspace(-1, 1, 18, dtype=torch.float64).view(3, 6))
    for a, b in zip(tp.RULES[rule](model, acts, e), tp.RULES[rule](model, acts, e.double())):
        assert a.dtype == torch.float64 and torch.equal(a, b)
