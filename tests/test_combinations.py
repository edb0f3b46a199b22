"""Combinations of rules: against backward passes written out, enumeration and closed forms."""
import itertools

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as some
from torch import nn

from altbp.combinations import (GATE_CASES, TOKEN_CASES, TokenNet, combo_gates, combo_head, combo_tokens,
                                edge_work, feedback_angle, gate_field, gate_net, gate_report, gradient_angles,
                                kept_bytes, mean_update, penalised, thinned, to_rule, weight_gradient)
from altbp.feedback_alignment import convert
from altbp.reinmax import reinmax, st
from altbp.stochastic_backprop import MaskSource
from altbp.target_prop import InvertibleMLP, bp_errors, gait_errors, local_gradients
from altbp.training import seeded

F64 = torch.float64


def network(keep=0.5, shared=False, **options):
    source = MaskSource(keep, mask="random", shared=shared, seed=1)
    return seeded(lambda: TokenNet(source=source, **options), 0, dtype=F64)


def batch(n=4):
    g = torch.Generator().manual_seed(0)
    return torch.rand(n, 1, 8, 8, dtype=F64, generator=g), torch.randint(10, (n,), generator=g)


def by_hand(net, x):
    """The network without any class of the package."""
    p = net.patch
    h = x.unfold(2, p, p).unfold(3, p, p).permute(0, 2, 3, 1, 4, 5).flatten(3).flatten(1, 2)
    h = h @ net.embed.weight.T + net.embed.bias
    for mix, branch in zip(net.mixes, net.branches):
        h = h + (mix.weight @ h + mix.bias[:, None])
        low, _, up = branch.fn
        z = h @ low.weight.T + low.bias
        h = h + torch.where(z > 0, z, 0.1 * z) @ up.weight.T + up.bias
    return h.flatten(1) @ net.head.weight.T + net.head.bias


@pytest.mark.parametrize("training", [True, False])
def test_token_net_computes_what_it_says(training):
    net, (x, _) = network(depth=2).train(training), batch()
    torch.testing.assert_close(net(x), by_hand(net, x))


@pytest.mark.parametrize("patch", [3, 0, -2])
def test_token_net_refuses_patches_that_do_not_fit(patch):
    with pytest.raises(ValueError, match=f"patch: {patch} does not divide"):
        TokenNet(patch=patch)


@pytest.mark.parametrize("shape", [(2, 1, 9, 9), (2, 1, 4, 16), (2, 3, 8, 8)])
def test_token_net_refuses_images_of_another_shape(shape):
    with pytest.raises(ValueError, match=r"x: shape .* is not \(B, 1, 8, 8\)"):
        TokenNet()(torch.rand(shape))


def test_gate_report_refuses_feedback_that_it_does_not_know():
    with pytest.raises(ValueError, match="model: a layer with feedback of its own"):
        gate_report(to_rule(gate_net("st"), "fa"), torch.rand(4, 64), torch.arange(4))


def test_conversion_keeps_names_and_draws_new_masks_every_pass():
    net, (x, _) = network(), batch()
    for rule in ("fa", "gait"):
        model = to_rule(net, rule)
        assert [k for k, _ in model.named_parameters()] == [k for k, _ in net.named_parameters()]
        seen = set()
        for _ in range(8):
            model(x)
            assert len(model.source.masks) == 2  # one for each branch
            seen.add(tuple(torch.cat(list(model.source.masks.values())).tolist()))
        assert len(seen) > 4
    assert net.source.masks is None  # the original was never run


@pytest.mark.parametrize("rule", ["bp", "fa", "usf", "gait"])
def test_a_thinned_branch_sends_down_what_is_written_here(rule):
    net, (x, y) = network(depth=1, width=6), batch()
    with torch.no_grad():
        for p in net.branches.parameters():
            p.add_(0.3 * torch.randn(p.shape, dtype=F64, generator=torch.Generator().manual_seed(2)))
    model = to_rule(net, rule, seed=3)
    captured = []
    model.branches[0].register_forward_hook(lambda m, i, out: (out.retain_grad(), captured.append((i[0], out))) and None)
    F.cross_entropy(model(x), y).backward()
    (h, out), (low, _, up) = captured[0], model.branches[0].fn
    h = h.detach()
    a = next(iter(model.source.masks.values())).to(F64)[None, :, None] / 0.5
    down = {"bp": lambda: up.weight, "fa": lambda: up.feedback, "gait": lambda: torch.linalg.inv(up.weight).T,
            "usf": lambda: up.weight.sign() / (3 * 6) ** 0.5}[rule]()
    delta = a * out.grad
    z = h @ low.weight.T + low.bias
    lower = (delta @ down) * torch.where(z > 0, 1.0, 0.1)
    torch.testing.assert_close(up.bias.grad, delta.sum((0, 1)))
    torch.testing.assert_close(low.weight.grad, torch.einsum("bno,bni->oi", lower, h))


def test_gradient_angles_and_feedback_angles():
    net, (x, y) = network(), batch()
    plain = to_rule(net, "bp")
    found = gradient_angles(plain, net, x, y)
    assert found["angle_rule"] < 1e-5 and 5 < found["angle_draw"] < 90
    assert plain.training and feedback_angle(plain) == 0
    fa = to_rule(net, "fa")
    with torch.no_grad(): fa.embed.weight.mul_(2)
    assert gradient_angles(fa, net, x, y)["angle_rule"] > 20
    torch.testing.assert_close(net.embed.weight, fa.embed.weight)  # taken over
    assert 70 < feedback_angle(fa) < 110
    assert feedback_angle(to_rule(net, "gait")) < 1e-3  # orthogonal to single precision


def test_weight_gradient_is_that_of_autograd_below_the_head():
    net, (x, y) = network(1.0), batch()
    F.cross_entropy(by_hand(net, x), y).backward()
    parts = [p.grad.flatten() for k, p in net.named_parameters() if "weight" in k and "head" not in k]
    torch.testing.assert_close(weight_gradient(net, x, y), torch.cat(parts))


@pytest.mark.parametrize("rule", ["bp", "fa", "gait"])
def test_bytes_saved_by_thinning(rule):
    x, y = torch.rand(7, 1, 8, 8), torch.zeros(7, dtype=torch.long)
    size = [kept_bytes(to_rule(TokenNet(source=MaskSource(k, mask="random", shared=False)), rule), x, y)
            for k in (1.0, 0.25)]
    assert size[0] - size[1] == 2 * (4 * 3 * 7 * 12 * 32 - (8 * (4 + 16) + 4 * 4))


def test_penalty_is_added_to_undone_layers_only():
    net, (x, y) = network(1.0), batch()
    with torch.no_grad(): net.branches[0].fn[0].weight.mul_(1.5)
    model = to_rule(net, "gait")
    penalised(0.0)(model, x, y)
    without = {k: p.grad.clone() for k, p in model.named_parameters()}
    model.zero_grad()
    penalised(0.25)(model, x, y)
    for k, p in model.named_parameters():
        W, pull = p.detach(), torch.zeros_like(p)
        if k.startswith(("mixes", "branches")) and k.endswith("weight"):
            pull = 0.25 * 4 * W @ (W.T @ W - torch.eye(len(W), dtype=F64))
        torch.testing.assert_close(p.grad, without[k] + pull)


@settings(max_examples=15, deadline=None)
@given(seed=some.integers(0, 2**20), orthogonal=some.booleans())
def test_thinned_units_commute_with_orthogonal_inverses(seed, orthogonal):
    g = torch.Generator().manual_seed(seed)
    net = InvertibleMLP.square(5, 2, init="orthogonal" if orthogonal else "gaussian", generator=g, dtype=F64)
    acts = net.activities(torch.randn(3, 5, dtype=F64, generator=g))
    e = torch.randn(3, 5, dtype=F64, generator=g)
    a = [2.0 * torch.randint(2, (1, 5), generator=g) for _ in range(3)]
    a[2][0, 0] = a[1][0, 0] = a[0][0, 0] = 2.0
    some_acts = thinned(acts, a)
    bp = local_gradients(bp_errors(net, some_acts, e), some_acts)[0][0]
    gait = local_gradients(gait_errors(net, some_acts, e, form="limit"), some_acts)[0][0]
    delta = e  # backpropagation, written out
    for l in (2, 1): delta = (delta * acts.slopes[l] * a[l]) @ net.layers[l].weight
    delta = delta * acts.slopes[0] * a[0] / 3
    torch.testing.assert_close(bp, delta.T @ acts.xs[0])
    assert torch.allclose(bp, gait, rtol=1e-9, atol=1e-12) == orthogonal


def test_thinned_wants_weights_for_every_layer():
    net = InvertibleMLP.square(4, 1, dtype=F64)
    with pytest.raises(ValueError):
        thinned(net.activities(torch.rand(2, 4, dtype=F64)), [torch.ones(1, 4)])


def gates(L=2, N=3, B=4, seed=0):
    g = torch.Generator().manual_seed(seed)
    decoder = seeded(lambda: nn.Sequential(nn.Linear(L * N, 7), nn.Tanh(), nn.Linear(7, 5)), seed, dtype=F64)
    return decoder, 2 * torch.randn(B, L, N, dtype=F64, generator=g), torch.arange(B), g


def test_field_is_the_gradient_or_the_fed_back_error():
    decoder, logits, y, g = gates()
    s = logits.softmax(-1).expand(3, *logits.shape).clone().requires_grad_()
    scores = decoder(s.flatten(-2))
    loss = F.cross_entropy(scores.flatten(0, 1), y.repeat(3), reduction="sum")
    torch.testing.assert_close(gate_field(decoder, y)(s), torch.autograd.grad(loss, s)[0])
    B = torch.randn(5, 6, dtype=F64, generator=g)
    error = decoder(s.flatten(-2)).softmax(-1) - F.one_hot(y, 5)
    torch.testing.assert_close(gate_field(decoder, y, B)(s), (error @ B).view(s.shape))
    torch.testing.assert_close(gate_field(decoder, y, B)(s[0]), (error[0] @ B).view(s[0].shape))


def states(L, N):
    return [F.one_hot(torch.tensor(i), N).to(F64) for i in itertools.product(range(N), repeat=L)]


def jacobian(pi): return torch.diag(pi) - torch.outer(pi, pi)


@pytest.mark.parametrize("name", ["st", "reinmax"])
def test_mean_update_against_a_loop_over_states(name):
    decoder, logits, y, g = gates()
    field = gate_field(decoder, y, torch.randn(5, 6, dtype=F64, generator=g))
    pi, want = logits.softmax(-1), torch.zeros_like(logits)
    for D in states(2, 3):
        v = field(D.expand(logits.shape))
        for b, l in itertools.product(range(4), range(2)):
            M = jacobian(pi[b, l])
            if name == "reinmax": M = (M + torch.outer(D[l] - pi[b, l], D[l] - pi[b, l])) / 2
            want[b, l] += (pi[b] * D).sum(-1).prod() * M @ v[b, l]
    torch.testing.assert_close(mean_update({"st": st, "reinmax": reinmax}[name], field, logits), want)


def test_edge_work_of_a_gradient_is_the_gradient_of_the_mean():
    decoder, logits, y, _ = gates()
    leaf = logits.clone().requires_grad_()
    mean = sum((leaf.softmax(-1) * D).sum(-1).prod(-1)
               * F.cross_entropy(decoder(D.flatten()).expand(4, -1), y, reduction="none") for D in states(2, 3))
    want, = torch.autograd.grad(mean.sum(), leaf)
    torch.testing.assert_close(edge_work(gate_field(decoder, y), logits, 10), want)


@settings(max_examples=10, deadline=None)
@given(seed=some.integers(0, 2**20))
def test_affine_fields_are_exact_for_reinmax_only(seed):
    _, logits, _, g = gates(seed=seed)
    A, c = torch.randn(6, 6, dtype=F64, generator=g), torch.randn(6, dtype=F64, generator=g)
    constant = lambda s: c.view(2, 3).expand(s.shape)
    affine = lambda s: (s.detach().flatten(-2) @ A + c).view(s.shape)
    closed = torch.stack([torch.stack([jacobian(p) @ v for p, v in zip(row, c.view(2, 3))]) for row in logits.softmax(-1)])
    torch.testing.assert_close(edge_work(constant, logits, 1), closed)
    torch.testing.assert_close(mean_update(reinmax, affine, logits), edge_work(affine, logits, 2))
    assert (mean_update(st, affine, logits) - edge_work(affine, logits, 2)).abs().max() > 1e-4


def test_gate_net_and_its_report():
    with pytest.raises(ValueError, match="estimator"): gate_net("gumbel")
    net = seeded(lambda: gate_net("st"), 0)
    x, y = torch.rand(5, 64), torch.arange(5)
    report = gate_report(net, x, y)
    assert report["angle_work"] == 0 and report["error_reinmax"] < report["error_st"] < 1
    assert report["angle_reinmax"] < 5
    direct = convert(net, "dfa", example=x, generator=0)
    assert gate_report(direct, x, y)["angle_work"] > 20
    net.eval()
    assert torch.equal(net(x), net(x))  # the mode, not a sample
    assert all(p.dtype == torch.float32 for p in net.parameters())  # the report worked on a copy


def test_experiments_in_a_quick_run():
    found = combo_tokens(0, "cpu", quick=True, **TOKEN_CASES[4])
    assert found["test_error"] < 60 and len(found["angle_rule"]) == 1
    assert combo_head(0, "cpu", quick=True)["test_error"] < 60
    found = combo_gates(0, "cpu", quick=True, **GATE_CASES[3])
    assert found["error_reinmax"][0] < found["error_st"][0]
