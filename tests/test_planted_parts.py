"""Tests of altbp.planted_parts: the renderer's truth, the scores, and the maps against direct autograd."""
import json
import math
from itertools import permutations
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

import altbp.planted_parts as pp
from altbp.experiments import REGISTRY, fingerprint, load_results

RESULTS = Path(__file__).resolve().parent.parent / "nbs" / "results"
NAMES = sorted(n for n, e in REGISTRY.items() if e.module == "altbp.planted_parts")
WORLDS = list(pp.PARTS)


def gen(seed=0):
    return torch.Generator().manual_seed(seed)


# The renderer -------------------------------------------------------------------------------------------------------

@given(st.tuples(*[st.floats(-2, 2)] * 6))
@settings(max_examples=100, deadline=None)
def test_distance_to_a_segment(v):
    x, y, x0, y0, dx, dy = v
    t = np.linspace(0, 1, 20001)
    brute = ((x - x0 - t * dx) ** 2 + (y - y0 - t * dy) ** 2).min()
    d = pp._distance(*[torch.tensor([[e]], dtype=torch.float64) for e in v]).item()
    assert abs(d - brute) <= 1e-3 * (abs(dx) + abs(dy)) + 1e-9 and d <= brute + 1e-9


def test_a_disc_has_its_area_and_place():
    shapes = {"disc": (0.5, pp.path((0, 0)))}
    d = pp.draw(shapes, torch.tensor([0, 0]), 40, torch.tensor([16.0, 16.0]), torch.zeros(2),
                torch.tensor([[0.0, 0.0], [5.0, -3.0]]))
    assert d.sum((1, 2)).tolist() == pytest.approx([math.pi * 64] * 2, rel=0.01)
    at = torch.arange(40) - 19.5
    x, y = (d[1] * at).sum() / d[1].sum(), (d[1] * at[:, None]).sum() / d[1].sum()
    assert x.item() == pytest.approx(5, abs=0.02) and y.item() == pytest.approx(-3, abs=0.02)


def test_rotation_turns_clockwise():
    shapes = {"arm": (0.15, pp.path((0, 0), (0, -1)))}  # points up; a quarter turn: to the right
    d = pp.draw(shapes, torch.tensor([0]), 41, torch.tensor([16.0]), torch.tensor([math.pi / 2]), torch.zeros(1, 2))[0]
    assert d[20, 34] > 0.9 and d[20, 6] == 0 and d[6, 20] == 0


@pytest.mark.parametrize("world", WORLDS)
@pytest.mark.parametrize("body", [True, False])
def test_masks_are_where_the_parts_are(world, body):
    g = gen(1)
    P = len(pp.PARTS[world])
    parts = torch.rand(20, P, generator=g).argsort(1)[:, :4]
    whole = pp.render(world, parts, gen(5), body, noise=0)
    assert whole.images.shape[:2] == (20, 1) and whole.masks.shape[:2] == (20, 4)
    for j in range(4):
        less = parts.clone()
        less[:, j] = -1
        without = pp.render(world, less, gen(5), body, noise=0)
        changed = (whole.images - without.images)[:, 0].abs() > 0.2
        assert changed.flatten(1).any(1).all(), "each part is visible"
        assert not (changed & ~whole.masks[:, j]).any(), "and only inside its mask"
        assert not without.masks[:, j].any()
        assert (without.present(P).sum(1) == 3).all()


@pytest.mark.parametrize("world", ["glyphs", "digits"])
def test_tiles_do_not_overlap(world):
    s = pp.render(world, torch.arange(5).repeat(30, 1), gen())
    assert (s.masks.sum(1) <= 1).all() and (s.masks.sum((2, 3)) == 144).all()


def test_swapping_one_part_leaves_the_rest():
    a = pp.render("glyphs", torch.tensor([[0, 2, 3]]), gen(3))
    b = pp.render("glyphs", torch.tensor([[1, 2, 3]]), gen(3))
    same = ~a.masks[:, :1].any(1)
    assert torch.equal(a.images[:, 0][same], b.images[:, 0][same]) and not torch.equal(a.images, b.images)


def test_digits_of_training_and_test_are_different_images():
    a, b = pp._digit_pool(False)[0], pp._digit_pool(True)[0]
    assert len(a) == 1200 and len(b) == 597
    x, places = pp._digit_pool(True)
    assert places.shape[0] == 10 and places.max() < len(x)


@pytest.mark.parametrize("args", [("nope", torch.zeros(1, 2).long()), ("figures", torch.tensor([[8]])),
                                  ("glyphs", torch.zeros(3).long()), ("glyphs", torch.zeros(1, 2)),
                                  ("glyphs", torch.zeros(0, 2).long()), ("glyphs", torch.full((1, 2), -2)),
                                  ("glyphs", torch.arange(10)[None] % 9), ("figures", torch.arange(9)[None] % 8)])
def test_bad_scenes(args):
    with pytest.raises(ValueError, match="world|parts"):
        pp.render(*args, gen())


# Neurons and pairs ----------------------------------------------------------------------------------------------------

NEURON = pp.Neuron(torch.tensor([1, 0.9, 0.8, -0.8] + [0.0] * 6))


@pytest.mark.parametrize("call, word", [
    (lambda: pp.random_parts(torch.zeros(10), 5, gen()), "chance"),
    (lambda: pp.random_parts(torch.eye(10)[0], 5, gen()), "chance"),
    (lambda: pp.random_parts(torch.ones(6), 5, gen()), "chance"),
    (lambda: pp.neurons(1, 10, gen(), 8), "n_parts"),
    (lambda: pp.neurons(1, 2, gen()), "n_parts"),
    (lambda: pp.cast(pp.Neuron(NEURON.gains[1:]), 4, gen()), "three drivers"),
    (lambda: pp.stage("glyphs", pp.cast(NEURON, 4, gen()), "ABZ", gen()), "recipe: 'ABZ'"),
    (lambda: pp.stage("glyphs", pp.cast(NEURON, 4, gen()), "", gen()), "recipe"),
    (lambda: pp.staged_pairs("glyphs", NEURON, ("ABde", "AYdf"), 4, gen()), "recipe: 'AYdf'"),
    (lambda: pp.trained_net("faces"), "world: 'faces'"),
    (lambda: pp.fitted_neurons("faces"), "world: 'faces'"),
    (lambda: pp.randomised(pp.PartNet(4), 5, 0), "layers"),
    (lambda: pp.randomised(pp.PartNet(4), 0, 0), "layers"),
    (lambda: pp.scores(torch.rand(1, 4, 4), torch.ones(1, 2, 4, 4).bool()), "masks"),
    (lambda: pp.scores(torch.rand(1, 4, 4), torch.ones(1, 3, 4, 4)), "masks"),
    (lambda: pp.scores(torch.full((1, 4, 4), math.nan), torch.eye(16).bool().view(1, 16, 4, 4)), "NaN")])
def test_what_cannot_be_is_refused(call, word):
    with pytest.raises(ValueError, match=word):
        call()


def test_a_guarded_function_keeps_its_face_and_takes_names():
    assert pp.random_parts.__name__ == "random_parts" and "two to five" in pp.random_parts.__doc__
    a = pp.random_parts(chance=torch.full((10,), 0.5), n=3, generator=gen())
    assert torch.equal(a, pp.random_parts(torch.full((10,), 0.5), 3, gen()))


def test_nothing_shared_without_a_readout():
    net = pp.PartNet(8).eval()
    p = pp.PairMaps(net, torch.zeros(8), *torch.rand(2, 3, 1, 42, 42))
    for name in ("gradient", "PBP", "PBP literal", "PBP CAM", "BiLRP-like"):
        assert pp.pair_maps(p, name).abs().sum() == 0


@given(st.integers(0, 10**6), st.integers(5, 10))
@settings(max_examples=20, deadline=None)
def test_random_parts_are_sets_of_two_to_five(seed, P):
    parts = pp.random_parts(torch.full((P,), 0.4), 50, gen(seed))
    assert parts.shape == (50, 5) and parts.max() < P
    for row in parts.tolist():
        have = [p for p in row if p >= 0]
        assert len(set(have)) == len(have) and 2 <= len(have) <= 5


def test_random_parts_have_their_frequencies():
    chance = torch.tensor([0.5, 0.5, 0.5] + [0.25] * 7)
    parts = pp.random_parts(chance, 20000, gen())
    got = torch.stack([(parts == k).any(1).double().mean() for k in range(10)])
    coins = torch.rand(200000, 10, generator=gen(1)) < chance  # conditional on 2 … 5 parts
    coins = coins[(coins.sum(1) >= 2) & (coins.sum(1) <= 5)]
    assert torch.allclose(got, coins.double().mean(0), atol=0.015)


def test_neurons_prefer_bodies_and_respond_linearly():
    n, = pp.neurons(1, 10, gen(), inhibitors=2)
    assert sorted(n.gains.tolist(), reverse=True)[:3] == pytest.approx([1, 0.9, 0.8])
    assert (n.gains == -0.8).sum() == 2 and (n.gains == 0).sum() == 5
    eye = torch.eye(10).repeat(400, 1)
    y = n.respond(eye, gen(1)).reshape(400, 10).mean(0)
    assert torch.allclose(y, n.gains, atol=0.08)
    have = [pp.Stimuli(torch.zeros(1), n.draw(2000, b, gen(2)), torch.zeros(1)).present(10) @ n.gains.clamp(min=0)
            for b in (True, False)]
    assert have[0].mean() > have[1].mean() + 0.5


def test_cast_is_balanced_and_right():
    n, = pp.neurons(1, 10, gen(), inhibitors=1)
    letters = pp.cast(n, 12, gen())
    orders = sorted(zip(*(letters[x].tolist() for x in "ABC")))
    drivers = (n.gains > 0).nonzero()[:, 0].tolist()
    assert orders == sorted(2 * list(permutations(drivers)))
    assert (n.gains[letters["X"]] < 0).all() and "Y" not in letters
    everything = torch.stack(list(letters.values()), 1)
    assert all(len(set(row)) == 10 for row in everything.tolist())


def test_bodies_of_staged_pairs_differ_in_one_part_only():
    n, = pp.neurons(1, 10, gen())
    out, a, b = pp.staged_pairs("glyphs", n, ("ABde", "ACgh", "BCgh"), 6, gen(4))
    assert torch.equal(a.masks, b.masks)
    same = ~a.masks[:, 0]
    assert torch.equal(a.images[:, 0][same], b.images[:, 0][same])
    assert (out.parts[:, 0] == a.parts[:, 0]).all() and (out.parts[:, 1] == b.parts[:, 0]).all()


# Scores ---------------------------------------------------------------------------------------------------------------

@given(st.lists(st.integers(0, 5), min_size=1, max_size=12), st.lists(st.integers(0, 5), min_size=1, max_size=12))
@settings(max_examples=100, deadline=None)
def test_auc_counts_pairs(high, low):
    brute = sum((h > l) + 0.5 * (h == l) for h in high for l in low) / (len(high) * len(low))
    assert pp.auc(torch.tensor(high).float(), torch.tensor(low).float()) == pytest.approx(brute)


def test_auc_refuses_nothing():
    with pytest.raises(ValueError, match="empty"):
        pp.auc(torch.ones(0), torch.ones(2))


def test_scores_of_known_maps():
    masks = torch.zeros(1, 4, 4, 8, dtype=torch.bool)
    for k in range(4):
        masks[0, k, :, 2 * k:2 * k + 2] = True
    perfect = masks[:, 0].float()
    rival = masks[:, 1].float() + 2 * masks[:, 2]
    good = {k: v[0] for k, v in pp.scores(perfect, masks).items()}
    assert good == {"pg": 1, "auc": 1, "auc_nd": 1, "auc_sd": 1, "energy": 1, "win": 1}
    bad = {k: v[0] for k, v in pp.scores(rival, masks).items()}
    assert (bad["pg"], bad["auc_nd"], bad["auc_sd"], bad["energy"], bad["win"]) == (0, 0, 0, 0, 0)
    flat = {k: v[0] for k, v in pp.scores(torch.ones(1, 4, 8), masks).items()}
    assert flat["auc"] == flat["auc_nd"] == flat["auc_sd"] == 0.5 and flat["energy"] == pytest.approx(0.25)


def test_rank_correlation_is_spearman():
    stats = pytest.importorskip("scipy.stats")
    a, b = torch.rand(3, 5, 6, generator=gen()), torch.rand(3, 5, 6, generator=gen(1))
    expected = [stats.spearmanr(x.flatten(), y.flatten())[0] for x, y in zip(a, b)]
    assert pp.rank_correlation(a, b).tolist() == pytest.approx(expected)


# Maps -----------------------------------------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def pairs():
    net = pp.seeded(lambda: pp.PartNet(24, 10), 0).eval().requires_grad_(False)
    w = torch.randn(24, generator=gen()) * (torch.rand(24, generator=gen(1)) < 0.4)
    n, = pp.neurons(1, 10, gen())
    out, in_ = pp.staged_pairs("glyphs", n, ("ABde", "ACdf"), 2, gen(2))
    return pp.PairMaps(net, w, out.images, in_.images), out, in_


def test_partners(pairs):
    p, _, _ = pairs
    assert torch.equal(p.other, p.a[[2, 3, 0, 1]])
    assert torch.allclose(p.beta().sum(1), F.cosine_similarity(p.a * p.w, p.other * p.w))


@pytest.mark.parametrize("name", pp.METHODS)
def test_maps_are_finite_and_not_negative(pairs, name):
    m = pp.pair_maps(pairs[0], name)
    assert m.shape == (4, 42, 42) and torch.isfinite(m).all() and (m >= 0).all() and m.sum() > 0
    assert not m.requires_grad


@pytest.mark.parametrize("name", pp.SINGLE)
def test_single_image_maps_ignore_the_partner(pairs, name):
    p, out, in_ = pairs
    q = pp.PairMaps(p.net, p.w, out.images, in_.images.flip(0))
    a, b = (pp.pair_maps(x, name)[:2] for x in (p, q))
    if name == "SmoothGrad": assert torch.allclose(a, b)
    else: assert torch.allclose(a, b, atol=1e-6 * float(a.max()))


@pytest.mark.parametrize("name", ["gradient of s", "PBP", "PBP literal", "PBP CAM", "PBP, w = 1"])
def test_pair_maps_depend_on_the_partner(pairs, name):
    p, out, in_ = pairs
    q = pp.PairMaps(p.net, p.w, out.images, in_.images.flip(0))
    a, b = (pp.pair_maps(x, name)[:2] for x in (p, q))
    assert (a - b).norm() > 1e-3 * a.norm()


def test_gradient_and_pbp_against_autograd(pairs):
    p, _, _ = pairs
    x = p.x[:1].clone().requires_grad_()
    a = p.net.maps(x).mean((2, 3))
    grad, = torch.autograd.grad(a[0] @ p.w, x, retain_graph=True)
    got = p.scalar(lambda a: a @ p.w)[0]
    assert torch.allclose(got, grad[0, 0], atol=1e-6 * float(grad.abs().max()))
    I, beta = 0, p.beta()[0]
    for i in range(24):
        row, = torch.autograd.grad(a[0, i], x, retain_graph=True)
        if row.norm() > 0: I = I + beta[i] * row[0, 0] / row.norm()
    assert torch.allclose(pp.shared_map(p)[0], I.abs(), atol=1e-5 * float(I.abs().max()))
    assert pp.shared_map(p).flatten(1).norm(dim=1)[0] <= beta.sum() + 1e-6


def test_joint_relevance_is_the_hessian_form(pairs):
    """Σ_i w_i² a'_i J_i ⊙ x is x times the gradient of the numerator with the partner held fixed."""
    p, _, _ = pairs
    x = p.x.clone().requires_grad_()
    numerator = (p.net.maps(x).mean((2, 3)) * p.w**2 * p.other).sum()
    grad, = torch.autograd.grad(numerator, x)
    expected = (grad * p.x)[:, 0].clamp(min=0)
    got = pp.METHODS["BiLRP-like"](p)
    assert torch.allclose(got, expected, atol=1e-5 * float(expected.max()))


def test_occlusion_sees_where_the_response_comes_from():
    class Corner(torch.nn.Module):
        def __init__(self): super().__init__(); self.maps = lambda x: x[:, :, :8, :8]
    x = torch.rand(2, 1, 42, 42, generator=gen()) + 1
    p = pp.PairMaps(Corner(), torch.ones(1), x, x.flip(0))
    m = pp.METHODS["occlusion"](p)
    assert (m[:, :8, :8].amin((1, 2)) > 0).all() and (m[:, 21:, 21:] == 0).all()


def test_unknown_map(pairs):
    with pytest.raises(ValueError, match="nope"):
        pp.pair_maps(pairs[0], "nope")


def test_deletion_of_an_honest_map(pairs):
    """A map that is the loss itself, spread over the parts, correlates perfectly."""
    p, out, _ = pairs
    result = pp.deletion(p, out.masks, ("gradient", "PBP"))
    assert set(result) == {f"{n}:{k}" for n in ("gradient", "PBP") for k in ("deletion", "top")}
    assert all(-1 <= v <= 1 for v in result.values())


def test_randomised_changes_the_last_layers_only(pairs):
    net = pairs[0].net
    new = pp.randomised(net, 1, 0)
    convolutions = lambda n: [m.weight for m in n.maps if isinstance(m, torch.nn.Conv2d)]
    changed = [not torch.equal(a, b) for a, b in zip(convolutions(net), convolutions(new))]
    assert changed == [False, False, False, True]
    assert all(not torch.equal(a, b) for a, b in zip(convolutions(net), convolutions(pp.randomised(net, 4, 1))))
    assert torch.equal(convolutions(new)[3], convolutions(pp.randomised(net, 1, 0))[3])


def test_gradient_equals_captum(pairs):
    pytest.importorskip("captum")
    from altbp.zoo import library

    attr, (p, _, _) = library("captum.attr"), pairs
    f = lambda x: p.net.maps(x).mean((2, 3)) @ p.w
    x = p.x.clone().requires_grad_()
    ours, theirs = p.scalar(lambda a: a @ p.w), attr.Saliency(f).attribute(x, abs=False)[:, 0].detach()
    assert torch.allclose(ours, theirs, atol=1e-6 * float(theirs.abs().max()))
    ig = attr.IntegratedGradients(f).attribute(x, n_steps=16, method="riemann_right")[:, 0].detach()
    ours = p.scalar(lambda a: a @ p.w, "ig") * p.x[:, 0]
    assert torch.allclose(ours, ig.float(), atol=1e-5 * float(ig.abs().max()))


# Training and experiments ----------------------------------------------------------------------------------------------

def test_training_is_reproducible():
    a, b = (pp.trained_net.__wrapped__("glyphs", 16, 0, 0.0, 200, 1) for _ in range(2))
    assert all(torch.equal(u, v) for u, v in zip(a[0].state_dict().values(), b[0].state_dict().values()))
    assert not a[0].training and a[1] == b[1]


def test_robust_rule_attacks():
    net, x, y = pp.PartNet(8, 10).eval(), torch.rand(4, 1, 42, 42), torch.rand(4, 10).round()
    plain, hard = (pp._robust_rule(r)(net, x, y) for r in (0.0, 0.4))
    assert hard > plain


def test_a_readout_finds_linear_responses():
    net = pp.seeded(lambda: pp.PartNet(64, 10), 0).eval().requires_grad_(False)
    n, = pp.neurons(1, 10, gen())
    f = pp.fit_neuron(net, "glyphs", n, gen(1), lam=1e-4, n=200)
    assert f.w.shape == (64,) and f.r_in > 0.3  # random features already see something


@pytest.mark.parametrize("name", sorted(set(NAMES) - {"parallel-digits"}))  # digits are not stored
def test_stored_results_are_current(name):
    path = RESULTS / f"{name}.json"
    results = load_results(path)
    assert results["fingerprint"] == fingerprint(REGISTRY[name])
    for run in results["runs"]:
        assert all(math.isfinite(x) for v in run["result"].values() for x in (v if isinstance(v, list) else [v]))
    if "accuracy" in results["runs"][0]["result"]:
        assert min(r["result"]["accuracy"] for r in results["runs"]) > 0.95  # labels: the networks know their parts
    assert "/work" not in json.dumps([r["command"] for r in results["runs"]])
