"""Tests of altbp.target_prop_practice against autograd, closed forms and torch's own optimiser."""
import copy
import math
import pickle
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

import altbp.target_prop_practice as tp
from altbp.data import DataNotFound
from altbp.experiments import REGISTRY, fingerprint, load_results, run_experiment
from altbp.target_prop import InvertibleMLP, gait_errors, itp_errors, orthogonality_penalty, output_error
from altbp.training import fit, seeded

RESULTS = Path(__file__).resolve().parent.parent / "nbs" / "results"
NAMES = sorted(n for n, e in REGISTRY.items() if e.module == "altbp.target_prop_practice")


@pytest.fixture(autouse=True)
def one_thread():
    n = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(n)


def rand(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def orthogonal(n, seed=0):
    return torch.linalg.qr(rand(n, n, seed=seed))[0]


def small_net(direct=False, seed=0):
    return seeded(lambda: tp.DecoderMLP([6, 5, 4, 3], direct), seed, dtype=torch.float64)


def grads(net, *args, **kwargs):
    net.zero_grad()
    loss = tp.decoder_gradients(net, *args, **kwargs)
    return loss, [p.grad.clone() for p in net.layers.parameters()]


# The optimiser -----------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("betas", [(0.9, 0.99), (0.0, 0.5), (0.5, 0.999)])
def test_adam_is_torchs_at_another_rate(betas):
    ours, theirs = (torch.zeros(3, 2, dtype=torch.float64) for _ in range(2))
    a = tp.AdamUncorrected([ours], lr=0.01, betas=betas, eps=1e-30)
    b = torch.optim.Adam([theirs], lr=0.01, betas=betas, eps=1e-30)
    for t in range(1, 20):
        ours.grad = rand(3, 2, seed=t)
        theirs.grad = ours.grad.clone()
        b.param_groups[0]["lr"] = 0.01 * (1 - betas[0] ** t) / math.sqrt(1 - betas[1] ** t)
        a.step(), b.step()
        torch.testing.assert_close(ours, theirs, rtol=1e-11, atol=1e-13)


def test_adam_of_a_constant_gradient():
    p = torch.zeros(4, dtype=torch.float64)
    opt, length = tp.AdamUncorrected([p], lr=1e-3), []
    for _ in range(3):
        p.grad, before = torch.tensor([1.0, -2.0, 30.0, 4e-3], dtype=torch.float64), p.clone()
        opt.step()
        length.append((p - before).abs())
    assert torch.stack(length).sum(0)[:3] / 1e-3 == pytest.approx(3.919346, abs=1e-5)
    assert (p * torch.tensor([-1, 1, -1, -1])).min() > 0


def test_adam_groups_closure_state_and_missing_gradients():
    a, b, c = (torch.ones(2, requires_grad=True) for _ in range(3))
    opt = tp.AdamUncorrected([{"params": [a]}, {"params": [b, c], "lr": 0.5}], lr=0.1)
    loss = opt.step(lambda: (a.sum() + 2 * b.sum()).backward() or a.sum())
    assert loss.item() == 2 and torch.equal(c, torch.ones(2))
    assert (1 - a[0]).item() == pytest.approx(0.1, rel=1e-5) and (1 - b[0]).item() == pytest.approx(0.5, rel=1e-5)
    twin = [t.detach().clone().requires_grad_() for t in (a, b, c)]
    again = tp.AdamUncorrected([{"params": twin[:1]}, {"params": twin[1:], "lr": 0.5}], lr=0.1)
    again.load_state_dict(copy.deepcopy(opt.state_dict()))
    for t, g in ((a, 3.0), (twin[0], 3.0)): t.grad = torch.full((2,), g)
    for t in (b, twin[1]): t.grad = None
    opt.step(), again.step()
    assert torch.equal(a, twin[0])


@pytest.mark.parametrize("options", [{"lr": -1}, {"betas": (1.0, 0.9)}, {"betas": (0.9, -0.1)}, {"eps": -1e-8},
                                     {"lr": math.nan}])
def test_adam_refuses(options):
    with pytest.raises(ValueError, match=next(iter(options))): tp.AdamUncorrected([torch.zeros(1)], **options)


# Decoders ----------------------------------------------------------------------------------------------------------

def test_exact_decoders_give_itp():
    model = seeded(lambda: InvertibleMLP.square(6, 3, activation="asinh", dtype=torch.float64), 0)
    acts = model.activities(rand(5, 6))
    e = 0.1 * rand(5, 6, seed=1)
    undo = [lambda v, l=l: model.layers[l].inverse(model.activations[l].inverse(v)) for l in (1, 2, 3)]
    with torch.no_grad():
        for difference in (True, False):
            targets = tp.decoded_targets(acts.ys, acts.ys[-1] - e, undo, difference)
            for y, t, want in zip(acts.ys, targets, itp_errors(model, acts, e)):
                torch.testing.assert_close(y - t, want, rtol=1e-9, atol=1e-11)


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 10**6))
def test_difference_keeps_fixed_points_and_plain_tp_does_not(seed):
    net = small_net(seed=seed)
    with torch.no_grad():
        hs = net.activities(rand(4, 6, seed=seed))
        for h, t in zip(hs, tp.decoded_targets(hs, hs[-1], net.decoders)): assert (h - t).abs().max() < 1e-14
        plain = tp.decoded_targets(hs, hs[-1], net.decoders, difference=False)
        assert (plain[0] - hs[0]).norm() > 1e-3


def test_decoded_targets_by_hand():
    hs = [torch.tensor([[1.0]]), torch.tensor([[2.0]]), torch.tensor([[3.0]])]
    double, add = (lambda v: 2 * v), (lambda v: v + 1)
    # top 5: below 2 + (5 + 1) − (3 + 1) = 4; below 1 + 2·4 − 2·2 = 5
    assert [t.item() for t in tp.decoded_targets(hs, torch.tensor([[5.0]]), [double, add])] == [5, 4, 5]
    assert [t.item() for t in tp.decoded_targets(hs, torch.tensor([[5.0]]), [double, add], False)] == [12, 6, 5]
    with pytest.raises(ValueError, match="decoders"): tp.decoded_targets(hs, hs[-1], [add])


@pytest.mark.parametrize("direct", [False, True])
def test_network_shapes_and_errors(direct):
    net = small_net(direct)
    hs = net.activities(rand(7, 6))
    assert [h.shape[1] for h in hs] == [5, 4, 3] and torch.equal(net(rand(7, 6)), hs[-1])
    assert torch.equal(net.activities(hs[0], 1)[-1], hs[-1])
    with torch.no_grad(): targets = tp.targets_of(net, hs, hs[-1] + 1)
    assert [t.shape for t in targets] == [h.shape for h in hs]
    with torch.no_grad(): part = tp.targets_of(net, hs[1:], hs[-1] + 1)
    if not direct: torch.testing.assert_close(part[0], targets[1])
    with pytest.raises(ValueError, match="widths"): tp.DecoderMLP([4, 3])
    assert pickle.loads(pickle.dumps(net)).direct == direct


@pytest.mark.parametrize("rule", tp.DECODER_RULES)
def test_output_layer_is_trained_by_the_gradient(rule):
    net, x, y = small_net(rule == "ddtp"), rand(9, 6), torch.arange(9) % 3
    loss, ours = grads(net, x, y, rule=rule)
    exact = F.cross_entropy(net(x), y)
    want = torch.autograd.grad(exact, list(net.layers[-1].parameters()))
    assert loss.item() == pytest.approx(exact.item())
    for a, b in zip(ours[-2:], want): torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-13)
    with pytest.raises(ValueError, match="rule"): tp.decoder_gradients(net, x, y, rule="gait")


def test_decoders_that_transpose_give_backpropagation():
    # with the Jacobian of the forward step as direct decoder, one linear path: Q = Jᵀ sends the gradient itself
    net = seeded(lambda: tp.DecoderMLP([6, 5, 3], direct=True), 0, dtype=torch.float64)
    net.decoders[0].weight.data.copy_(net.layers[1].weight.T)
    x, y = rand(8, 6), torch.arange(8) % 3
    for a, b in zip(grads(net, x, y, rule="ddtp", step=1e-3)[1], grads(net, x, y, rule="bp")[1]):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)


def test_losses_train_only_their_decoders():
    net = small_net()
    with torch.no_grad(): hs = net.activities(rand(6, 6))
    for loss in (tp.reconstruction_loss, tp.difference_reconstruction_loss):
        net.zero_grad()
        loss(net, hs, 0.1, torch.Generator().manual_seed(0)).backward()
        assert all(p.grad is None for p in net.layers.parameters())
        assert all(p.grad.abs().sum() > 0 for g in net.decoders for p in list(g.parameters())[:1])


def test_exact_reconstruction_costs_nothing():
    net = seeded(lambda: tp.DecoderMLP([4, 3, 3], direct=True), 0, dtype=torch.float64)
    net.decoders[0].weight.data.copy_(net.layers[1].weight.inverse())
    with torch.no_grad(): hs = net.activities(rand(6, 4))
    assert tp.difference_reconstruction_loss(net, hs, 0.3).item() < 1e-20
    net.decoders[0].weight.data.mul_(1.1)
    assert tp.difference_reconstruction_loss(net, hs, 0.3).item() > 1e-3


@pytest.mark.parametrize("decay", [0.0, 0.3])
def test_direct_optimum_has_no_gradient(decay):
    net = seeded(lambda: tp.DecoderMLP([5, 4, 2], direct=True), 0, dtype=torch.float64)
    with torch.no_grad(): hs = net.activities(rand(3, 5))
    J = net.layers[1].weight.detach()  # linear output: the same for every example
    Q = J.T @ torch.linalg.inv(J @ J.T + decay * torch.eye(2, dtype=torch.float64))
    grads = []
    for s in range(400):
        net.decoders[0].weight.data.copy_(Q)
        loss = tp.difference_reconstruction_loss(net, hs, 0.1, torch.Generator().manual_seed(s), decay)
        grads.append(torch.autograd.grad(loss, net.decoders[0].weight)[0])
    g = torch.stack(grads)
    assert (g.mean(0) / (g.std(0) / 20 + 1e-9)).abs().max() < 4.5
    net.decoders[0].weight.data.copy_(1.5 * Q)
    loss = tp.difference_reconstruction_loss(net, hs, 0.1, torch.Generator().manual_seed(0), decay)
    assert torch.autograd.grad(loss, net.decoders[0].weight)[0].norm() > 5 * g.mean(0).norm()


def test_sampled_loss_is_the_ridge_regression():
    # tanh, several examples: E|QJe - e|² + decay |Q|² = mean |QJ - I|² + decay |Q|², for any Q
    net = seeded(lambda: tp.DecoderMLP([6, 5, 4, 3], direct=True), 0, dtype=torch.float64)
    hs = [h.detach() for h in net.activities(2 * rand(4, 6))]
    want = 0.3 * sum(q.weight.detach().square().sum() for q in net.decoders)
    for l, q in enumerate(net.decoders):
        for h in hs[l]:
            J = torch.autograd.functional.jacobian(lambda u, l=l: net.activities(u, l + 1)[-1], h)
            want += (q.weight.detach() @ J - torch.eye(len(h))).square().sum() / len(hs[l])
    g = torch.Generator().manual_seed(0)
    draws = torch.stack([tp.difference_reconstruction_loss(net, hs, 1e-5, g, 0.3).detach() for _ in range(1500)])
    error = draws.std() / len(draws) ** 0.5
    assert abs(draws.mean() - want) < 4 * error and error < 0.02 * want


# Inverses ----------------------------------------------------------------------------------------------------------

@settings(max_examples=25, deadline=None)
@given(st.integers(1, 12), st.integers(0, 10**6), st.floats(0.01, 0.9))
def test_newton_schulz_squares_the_residual(n, seed, size):
    W, E = orthogonal(n, seed), rand(n, n, seed=seed + 1)
    B = W.T @ (torch.eye(n) + size * E / E.norm())
    R = torch.eye(n) - W @ B
    torch.testing.assert_close(torch.eye(n) - W @ tp.newton_schulz(W, B), R @ R, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(tp.newton_schulz(W, B, 2), tp.newton_schulz(W, tp.newton_schulz(W, B)))


@pytest.mark.parametrize("W, B", [((3, 2), (3, 2)), ((3, 3), (2, 2)), ((3,), (3, 3)), ((2, 3, 3), (2, 3, 3))])
def test_newton_schulz_refuses(W, B):
    with pytest.raises(ValueError, match="W, B"): tp.newton_schulz(torch.ones(W), torch.ones(B))


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 10), st.integers(1, 20), st.integers(0, 10**6))
def test_delta_rule_descends_its_own_error(n, k, seed):
    W, B, noise = rand(n, n, seed=seed), rand(n, n, seed=seed + 1).requires_grad_(), rand(k, n, seed=seed + 2)
    loss = ((noise @ W.T) @ B.T - noise).square().sum() / (2 * k)
    want = B.detach() - 0.1 * torch.autograd.grad(loss, B)[0]
    torch.testing.assert_close(tp.learn_inverse(W, B.detach(), noise), want, rtol=1e-9, atol=1e-11)


def test_delta_rule_rests_at_the_inverse():
    W = rand(5, 5) + 3 * torch.eye(5)
    torch.testing.assert_close(tp.learn_inverse(W, W.inverse(), rand(9, 5)), W.inverse())


@pytest.mark.parametrize("kind, bound", [("learned", 1e-3), ("newton_schulz", 1e-12), ("frozen", 1e-12)])
def test_inverses_begin_near_and_follow(kind, bound):
    model = tp.digits_net(0)
    B = tp.Inverses(model, kind, torch.Generator().manual_seed(0))
    gap = lambda: max((b @ m.weight - torch.eye(64)).norm().item() / 8 for b, m in zip(B.matrices(), model.layers[1:]))
    assert gap() < bound and len(B.matrices()) == 4
    for i, m in enumerate(model.layers): m.weight.data += 1e-3 * rand(64, 64, seed=i)
    moved = gap()
    for _ in range(60): B.refresh(model)
    assert (gap() > moved / 2) == (kind == "frozen")
    other = tp.Inverses(model, "frozen")
    other.load_state_dict(B.state_dict())
    assert all(torch.equal(a, b) for a, b in zip(other.matrices(), B.matrices()))


def test_inverses_refuse_and_stay_out_of_training():
    with pytest.raises(ValueError, match="kind"): tp.Inverses(tp.digits_net(0), "exact")
    assert not list(tp.Inverses(tp.digits_net(0), "frozen").parameters())


# Rules and training ------------------------------------------------------------------------------------------------

@settings(max_examples=20, deadline=None)
@given(st.integers(1, 7), st.integers(1, 7), st.integers(0, 10**6))
def test_equal_norm_penalty_is_its_gradient(rows, columns, seed):
    W = rand(rows, columns, seed=seed).requires_grad_()
    value, grad = tp.equal_norm_penalty(W.detach())
    R = W.T @ W
    eye = torch.eye(columns, dtype=torch.float64)
    best = (R - R.trace() / columns * eye).square().sum()
    torch.testing.assert_close(value, best.detach())
    torch.testing.assert_close(grad, torch.autograd.grad(best, W)[0], rtol=1e-9, atol=1e-11)
    for c in (0.0, 1.0): assert value <= (R - c * eye).square().sum() + 1e-9


def test_equal_norm_penalty_vanishes_on_scaled_orthogonal_matrices():
    assert tp.equal_norm_penalty(3 * orthogonal(6))[0] < 1e-24
    assert tp.equal_norm_penalty(orthogonal(6) * torch.arange(1, 7))[0] > 1


@pytest.mark.parametrize("kind", ["offdiag", "identity", "equal"])
def test_target_rule_adds_the_penalty_to_all_layers(kind):
    x, y = rand(6, 64), torch.arange(6)
    plain, model = tp.digits_net(0), tp.digits_net(0)
    for m in (plain, model):
        for i, layer in enumerate(m.layers): layer.weight.data += 0.1 * rand(64, 64, seed=i)
    out = tp.target_rule("bp", kind=kind, penalty=0.5)(model, x, y)
    tp.target_rule("bp")(plain, x, y)
    assert set(out) == {"loss", "online"}
    for a, b in zip(model.layers, plain.layers):
        add = tp.equal_norm_penalty(b.weight.detach())[1] if kind == "equal" else orthogonality_penalty(
            b.weight.detach(), kind)[1]
        torch.testing.assert_close(a.weight.grad, b.weight.grad + 0.5 * add)


def test_rule_angles():
    model, x, y = tp.digits_net(0), rand(6, 64), torch.arange(6)
    for errors in tp.rule_angles(model, x, y, form="limit"): assert max(errors) < 1e-10
    assert tp.rule_angles(model, x, y, "itp")[0][0] > 30
    model.layers[-1].bias.data.fill_(math.inf)
    assert all(math.isnan(a) for a in tp.rule_angles(model, x, y, "itp")[0])


def test_rule_gives_nan_as_loss_after_overflow_and_training_stops():
    model, data = tp.digits_net(0), tp.digits(flat=True, n_train=120, n_test=60)
    for layer in model.layers[2:4]: layer.weight.data.mul_(1e-200)
    out = tp.train_targets(model, data, 2, rule="itp")
    assert out["steps"] == 1 and out["train_curve"] == [] and out["train_final"] <= 0.3


def test_train_targets_learns_and_is_reproducible(tmp_path):
    data = tp.digits(flat=True, n_train=300, n_test=100)
    first, second = (tp.train_targets(tp.digits_net(0), data, 4, penalty=0.1, inverse=i) for i in ("learned", "learned"))
    assert first == second and first["test_final"] > 0.8
    assert len(first["online"]) == 20 and len(first["angles"]) == len(first["predicted"]) == 5
    assert first["test_peak"] == max(first["test_curve"]) and first["test_final"] == first["test_curve"][-1]
    path = tmp_path / "fit.pt"
    tp.train_targets(tp.digits_net(0), data, 2, penalty=0.1, inverse="learned", checkpoint=path)
    resumed = tp.train_targets(tp.digits_net(0), data, 4, penalty=0.1, inverse="learned", checkpoint=path)
    assert resumed == first


def test_exact_inverses_equal_the_rule_without():
    x, y = rand(6, 64), torch.arange(6)
    model = tp.digits_net(0)
    acts = model.activities(x)
    e = output_error(acts.ys[-1], y, n_classes=10)[1]
    B = tp.Inverses(model, "newton_schulz")
    for a, b in zip(gait_errors(model, acts, e, form="limit", inverses=B.matrices()),
                    gait_errors(model, acts, e, form="limit")):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-11)


def test_peak_and_final_keep_the_best_epoch():
    history = {"loss": [1.0] * 120, "online": [0.0] * 60 + [1.0] * 60, "train": [0.2, 0.9, 0.5], "test": [0.1, 0.8, 0.4]}
    out = tp.peak_and_final(history, {"train": 0.5, "test": 0.4})
    assert (out["train_peak"], out["train_final"], out["test_peak"], out["test_final"]) == (0.9, 0.5, 0.8, 0.4)
    assert out["online"] == [0.0] * 30 + [1.0] * 30 and out["test_curve"] == [0.1, 0.8, 0.4]


# What does not fit -------------------------------------------------------------------------------------------------

def activities(net, n=6):
    with torch.no_grad(): return net.activities(rand(n, 6))


@pytest.mark.parametrize("sigma", [0.0, -1.0, math.nan, math.inf])
def test_noise_must_be_positive(sigma):
    net = small_net()
    with pytest.raises(ValueError, match="sigma"): tp.difference_reconstruction_loss(net, activities(net), sigma)
    if sigma: # without noise the other loss is an autoencoder's
        with pytest.raises(ValueError, match="sigma"): tp.reconstruction_loss(net, activities(net), sigma)
    with pytest.raises(ValueError, match="sigma"):
        tp.decoder_teacher(net, "drl", sigma, 0.0, torch.Generator())(rand(3, 6))
    assert all(p.isfinite().all() for p in net.parameters())


@pytest.mark.parametrize("loss", [tp.reconstruction_loss, tp.difference_reconstruction_loss])
def test_losses_need_all_layers_and_an_example(loss):
    net = small_net()
    for hs in (activities(net)[1:], activities(net, 0)):
        with pytest.raises(ValueError, match="hs"): loss(net, hs, 0.1)


@pytest.mark.parametrize("direct", [False, True])
def test_targets_must_have_the_shape_of_what_they_are_for(direct):
    net = small_net(direct)
    hs = activities(net)
    for top in (hs[-1][:1], hs[-1][:, :1]):  # both would be broadcast somewhere
        with pytest.raises(ValueError, match="top"): tp.targets_of(net, hs, top)
        with pytest.raises(ValueError, match="top"): tp.decoded_targets(hs, top, small_net().decoders)
    with pytest.raises(ValueError, match="hs"): tp.targets_of(net, hs * 2, hs[-1])
    with pytest.raises(ValueError, match="top"): tp.decoded_targets([], hs[-1], [])


@pytest.mark.parametrize("widths", [[4, 3], [4.0, 3, 2], [4, 0, 2], []])
def test_decoder_network_refuses(widths):
    with pytest.raises(ValueError, match="widths"): tp.DecoderMLP(widths)


def test_decoder_network_takes_any_iterable():
    assert [l.out_features for l in tp.DecoderMLP(iter([5, 4, 3])).layers] == [4, 3]


@pytest.mark.parametrize("rule, direct", [("ddtp", False), ("dtp", True), ("tp", True), ("drl", True)])
def test_rules_need_their_kind_of_decoders(rule, direct):
    net, x, y = small_net(direct), rand(5, 6), torch.arange(5) % 3
    with pytest.raises(ValueError, match="rule: .* needs a DecoderMLP with direct"): grads(net, x, y, rule=rule)
    with pytest.raises(ValueError, match="rule"): tp.decoder_teacher(net, rule, 0.1, 0.0, torch.Generator())
    with pytest.raises(ValueError, match="rule: 'gait' is not one of bp"): tp.decoder_teacher(net, "gait", 0.1, 0.0, None)
    assert all(p.grad is None for p in net.parameters())


@pytest.mark.parametrize("rule", ["bp", "dtp"])
def test_decoder_gradients_refuse_and_add_nothing(rule):
    net, x, y = small_net(), rand(5, 6), torch.arange(5) % 3
    for step in (0.0, -1.0, math.nan):
        with pytest.raises(ValueError, match="step"): grads(net, x, y, rule=rule, step=step)
    for labels in (y + 1, y - 1, y[:3], y.double()):
        with pytest.raises(ValueError, match="target"): grads(net, x, labels, rule=rule)
    assert tp.decoder_gradients(net, x[:0], y[:0], rule).isnan()
    assert all(p.grad is None for p in net.parameters())
    with pytest.raises(ValueError, match="rule"): tp.family_targets(net, activities(net), rand(6, 3), "bp", 0.1)


@pytest.mark.parametrize("rule", tp.DECODER_RULES)
def test_decoder_gradients_work_without_grad_and_add_up(rule):
    net, x, y = small_net(rule == "ddtp"), rand(5, 6), torch.arange(5) % 3
    want = grads(net, x, y, rule=rule)[1]
    with torch.no_grad(): tp.decoder_gradients(net, x, y, rule)
    for p, g in zip(net.layers.parameters(), want): torch.testing.assert_close(p.grad, 2 * g)
    assert all(p.grad is None for p in net.decoders.parameters())


@pytest.mark.parametrize("penalty", [-1.0, math.nan, math.inf])
def test_equal_norm_penalty_must_not_be_negative(penalty):
    with pytest.raises(ValueError, match="penalty"):
        tp.target_rule("bp", kind="equal", penalty=penalty)(tp.digits_net(0), rand(3, 64), torch.arange(3))


def test_newton_schulz_refuses_another_dtype():
    with pytest.raises(ValueError, match="W, B"): tp.newton_schulz(torch.eye(3), torch.eye(3).double())


def test_newton_schulz_inverses_of_any_start():
    # WWᵀ of a Gaussian start has eigenvalues up to 4: from B = Wᵀ the iteration alone would diverge
    model = tp.digits_net(0, init="gaussian")
    B = tp.Inverses(model, "newton_schulz")
    for _ in range(3): B.refresh(model)
    for b, m in zip(B.matrices(), model.layers[1:]):
        torch.testing.assert_close(b @ m.weight, torch.eye(64, dtype=torch.float64), rtol=0, atol=1e-8)
    for m in model.layers: m.weight.data.mul_(5.0)  # far away again
    B.refresh(model)
    for b, m in zip(B.matrices(), model.layers[1:]):
        torch.testing.assert_close(b @ m.weight, torch.eye(64, dtype=torch.float64), rtol=0, atol=1e-8)


def test_learned_inverses_of_wide_layers_converge():
    n, g = 1500, torch.Generator().manual_seed(0)  # beyond 2 / (1 + (n + 1) / 64) the rate 0.1 diverges
    W, B = torch.eye(n), torch.zeros(n, n)
    for _ in range(5): B = tp.INVERSE_KINDS["learned"](W, B, g)
    error = (B - W).square().sum().item() / n
    assert error == pytest.approx((1 - 1 / (1 + (n + 1) / 64)) ** 5, rel=0.05)


# Experiments -------------------------------------------------------------------------------------------------------

def test_pooled_images():
    try: data, full = tp.pooled("fashion_mnist", 3), tp.pooled("fashion_mnist", 3, 28)
    except DataNotFound: pytest.skip("no Fashion-MNIST here")
    assert data.x_train.shape == (180, 196) and full.x_train.shape == (180, 784)
    corner = full.x_train[:, [0, 1, 28, 29]].mean(1)
    torch.testing.assert_close(data.x_train[:, 0], corner)


@pytest.mark.parametrize("name", ["gait-digits", "gait-family"])
def test_quick_runs(name, tmp_path):
    new, failed = run_experiment(REGISTRY[name], [0], "cpu", tmp_path, quick=True)
    assert new and not failed
    for run in load_results(tmp_path / f"{name}.json")["runs"]:
        assert 0.3 < run["result"]["test_final"] <= run["result"]["test_peak"] <= 1


@pytest.mark.parametrize("name", NAMES)
def test_stored_results_are_of_this_code(name):
    results = load_results(RESULTS / f"{name}.json")
    assert results["fingerprint"] == fingerprint(REGISTRY[name])
    for run in results["runs"]:
        r = run["result"]
        assert run["case"] in REGISTRY[name].cases
        for part in ("train", "test"): assert 0 <= r[f"{part}_final"] <= r[f"{part}_peak"] <= 1
