"""altbp.side_by_side: the shared start, the rules' gradients against autograd and enumeration, and the protocol."""
import itertools
import math
from functools import partial
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from altbp import side_by_side as side
from altbp.data import Dataset
from altbp.reinmax_practice import make_estimator

PAIRS = [(network, rule) for network, rules in side.CASES.items() for rule in rules]
SHAPES = {"square": (64,), "tanh": (64,), "pixel": (1, 8, 8), "choice": (64,)}


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def batch(network, n=24, seed=0):
    g = torch.Generator().manual_seed(seed)
    return torch.rand(n, *SHAPES[network], generator=g), torch.arange(n) % 10


def small_data(network, n=64):
    """A task that can be learned: the class is in the brightness of one input."""
    x, y = batch(network, n)
    x.flatten(1)[torch.arange(n), y] += 3
    return Dataset("small", tuple("0123456789"), x, y, x[:20], y[:20], x[20:40], y[20:40])


def logits_of(setup, x):
    with torch.no_grad():
        return setup.model.eval()(x)


# Networks -----------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("network", side.NETWORKS)
def test_all_rules_start_from_the_same_function(network):
    x, _ = batch(network)
    scores = [logits_of(side.ready(rule, network, x, seed=3), x) for rule in side.CASES[network]]
    for other in scores[1:]:
        torch.testing.assert_close(other, scores[0], rtol=1e-4, atol=1e-5)
    assert not torch.allclose(logits_of(side.ready(side.CASES[network][0], network, x, seed=4), x), scores[0], atol=1e-3)


@pytest.mark.parametrize("shape", [(1, 8, 8), (1, 28, 28), (1, 31, 29), (3, 32, 32)])
def test_pixel_net_fits_its_images(shape):
    assert side.pixel_net(shape)(torch.rand(2, *shape)).shape == (2, 10)


def test_choice_net_is_a_mixture_over_all_draws():
    net, (x, y) = side.ChoiceNet(6, 5, 2, 3, 4).double(), (torch.rand(3, 6).double(), torch.tensor([0, 3, 1]))
    pi, prob, loss = net.logits(x).softmax(-1), torch.zeros(3, 4).double(), torch.zeros(3).double()
    for i, j in itertools.product(range(3), repeat=2):
        D = torch.stack([F.one_hot(torch.tensor(k), 3) for k in (i, j)]).double()
        answer = net.decoder(D.flatten()).softmax(-1)
        chance = pi[:, 0, i] * pi[:, 1, j]
        prob += chance[:, None] * answer
        loss -= chance * answer[y].log()
    torch.testing.assert_close(net(x), prob.log())
    torch.testing.assert_close(net.losses(x, y, make_estimator("exact")), loss)


# Rules --------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("network, rule", PAIRS)
def test_every_rule_writes_finite_gradients_and_knows_the_exact_ones(network, rule):
    x, y = batch(network)
    setup = side.ready(rule, network, x, seed=1)
    assert math.isfinite(float(setup.gradients(setup.model, x, y)))
    assert all(torch.isfinite(p.grad).all() for p in setup.parameters)
    if network == "choice":
        return
    for p in setup.model.parameters():
        p.grad = None
    setup.truth(setup.model, x, y)
    found = [p.grad[:10] if p.grad.shape[0] == 64 and p is setup.weights[-1] else p.grad for p in setup.weights]
    plain = side.ready("bp", network, x, seed=1)
    F.cross_entropy(plain.model(x), y).backward()
    for ours, theirs in zip(found, plain.weights, strict=True):
        torch.testing.assert_close(ours, theirs.grad, rtol=1e-3, atol=1e-6)
    assert setup.model.training


def test_unbiased_thinning_has_the_gradient_as_its_mean_and_plain_thinning_has_not():
    x, y = batch("pixel", 2)
    errors = {}
    for rule in ("sbp-0.5-unbiased", "sbp-0.5"):
        setup, draws, n = side.ready(rule, "pixel", x), [], 100
        for _ in range(n):
            setup.model.zero_grad()
            setup.gradients(setup.model, x, y)
            draws.append(setup.weights[1].grad.flatten().clone())
        setup.model.zero_grad()
        setup.truth(setup.model, x, y)
        draws, exact = torch.stack(draws), setup.weights[1].grad.flatten()
        spread = (draws - draws.mean(0)).norm(dim=1).square().mean().sqrt() / n**0.5
        errors[rule] = float((draws.mean(0) - exact).norm() / spread)
    assert errors["sbp-0.5-unbiased"] < 3 < 5 < errors["sbp-0.5"]


def test_angles_are_those_of_the_rule():
    x, y = batch("square")
    found = {rule: side.angles(side.ready(rule, "square", x), x, y) for rule in ("bp", "fa", "usf", "gait", "itp")}
    assert max(found["bp"]) < 1e-4 and max(found["gait"]) < 0.2
    assert found["fa"][-1] < 1e-3 and found["fa"][0] > 60
    assert 20 < found["usf"][0] < 60 and found["itp"][0] > 20


def test_a_penalty_is_no_part_of_the_angle():
    x, y = batch("square")
    setup = side.ready("bp-penalty", "square", x)
    with torch.no_grad():
        for p in setup.weights:
            p += 0.1 * torch.randn(p.shape, generator=torch.Generator().manual_seed(0))
    assert max(side.angles(setup, x, y)) < 1e-3
    setup.update = None
    assert max(side.angles(setup, x, y)) > 1


@pytest.mark.parametrize("optimizer", side.OPTIMISERS)
def test_kolen_pollack_follows_the_optimiser(optimizer):
    data = small_data("square")
    setup = side.ready("kp", "square", data.x_train)
    gap = lambda: (setup.model[2].weight.detach() - setup.model[2].feedback).norm()
    before, decay, lr = gap(), {"sgd": 1e-3, "adam": 1e-2}[optimizer], 0.01
    history = side.train(setup, data, (optimizer, lr), 3)
    assert float(gap() / before) == pytest.approx((1 - lr * decay) ** len(history["loss"]), rel=1e-4)


def test_an_error_in_training_leaves_no_hooks():
    data = small_data("square")
    setup = side.ready("kp", "square", data.x_train)
    kept = []
    before, setup.follow = setup.follow, lambda optimizer: (kept.append(optimizer), before(optimizer))[1]
    with pytest.raises(ZeroDivisionError):
        side.train(setup, data, ("sgd", 0.01), 2, metrics=lambda m: 1 / 0)
    assert not kept[0]._optimizer_step_pre_hooks and not kept[0]._optimizer_step_post_hooks


@pytest.mark.parametrize("network, rule", [("pixel", "sbp-0.5-unbiased"), ("pixel", "brsf"), ("choice", "reinmax"),
                                           ("tanh", "dtp")])
def test_measuring_changes_nothing(network, rule):
    data = small_data(network)
    x, y = data.x_train, data.y_train
    losses = []
    for look in (False, True):
        setup = side.ready(rule, network, x)
        state = torch.get_rng_state()
        if look:
            setup.model.eval()
            setup.parameters[0].grad = marked = torch.ones_like(setup.parameters[0])
            a = side.angles(setup, x, y)
            assert a == side.angles(setup, x, y)
            side.kept_bytes(setup, x, y)
            assert setup.parameters[0].grad is marked and not any(m.training for m in setup.model.modules())
            setup.model.train()
        assert torch.equal(state, torch.get_rng_state())
        losses.append(side.train(setup, data, ("sgd", 0.01), 1)["loss"])
    assert losses[0] == losses[1]


def test_measuring_noise_changes_nothing_that_is_drawn():
    x, y = batch("pixel")
    setup = side.ready("sbp-0.5-unbiased", "pixel", x)
    state = torch.get_rng_state()
    found = [side.gradient_noise(setup, x, y, 8, draws=3) for _ in range(2)]
    assert found[0] == found[1] > 0 and torch.equal(state, torch.get_rng_state())


def test_an_overflow_ends_a_run_without_an_error():
    data = small_data("square")
    setup = side.ready("itp", "square", data.x_train)
    with torch.no_grad():
        setup.weights[0].fill_(1e30)
    history = side.train(setup, data, ("sgd", 0.1), 2)
    assert history.diverged is not None
    assert side.score(setup, history, data.x_test, data.y_test) == {"loss": math.inf, "accuracy": 0.1}


# Measurements -------------------------------------------------------------------------------------------------------

def test_kept_bytes_by_arithmetic():
    x, y = batch("square", 16)
    kept = {rule: side.kept_bytes(side.ready(rule, "square", x), x, y) for rule in ("bp", "fa", "usf", "dfa", "gait")}
    layers = 4 * 16 * 64  # bytes of a layer's activations
    assert kept["gait"] == {"step": 12 * layers, "state": 0}  # x; z, y, slope of three layers; at the top y is z
    loss = kept["bp"]["step"] - 7 * layers  # x, and z and y of three layers; the rest belongs to the cross-entropy
    assert 0 < loss <= 4 * 16 * 10 * 2 + 8 * 16 + 8
    assert kept["fa"] == {"step": kept["bp"]["step"], "state": 4 * (3 * 64 * 64 + 640)}
    assert kept["usf"]["state"] == 4 * 4 and kept["dfa"]["state"] == 4 * 3 * 640


def test_thinning_keeps_fewer_bytes():
    x, y = batch("pixel", 16)
    steps = [side.kept_bytes(side.ready(rule, "pixel", x), x, y)["step"] for rule in ("bp", "sbp-0.5", "sbp-0.25")]
    assert steps[0] > 1.2 * steps[1] > 1.4 * steps[2]


@given(seed=st.integers(0, 1000), size=st.integers(1, 24))
@settings(max_examples=10, deadline=None)
def test_noise_of_a_batch_is_that_of_its_sample(seed, size):
    x, y = batch("square")
    setup = side.ready("bp", "square", x)
    noise = side.gradient_noise(setup, x, y, size, draws=4, seed=seed)
    assert noise < 1e-9 if size == 24 else noise > 1e-3


# Tuning and the protocol --------------------------------------------------------------------------------------------

def test_tuning_is_the_same_twice_and_finds_the_best():
    data = small_data("square")
    found = [side.tune("usf", "square", data, 3, seed=5) for _ in range(2)]
    assert found[0] == found[1] and len(found[0]) == len(side.SETTINGS)
    best = side.choose(found[0])
    assert found[0][best]["accuracy"] == max(f["accuracy"] for f in found[0]) > 0.3


def test_choose_passes_over_what_has_no_value():
    assert side.choose([{"accuracy": math.nan, "loss": 0.0}, {"accuracy": 0.9, "loss": 1.0}]) == 1


@given(st.lists(st.tuples(st.integers(0, 3), st.floats(0, 2)), min_size=1, max_size=8))
def test_choose_prefers_accuracy_and_then_a_low_loss(pairs):
    found = [{"accuracy": a / 4, "loss": l} for a, l in pairs]
    best = found[side.choose(found)]
    assert all((f["accuracy"], -f["loss"]) <= (best["accuracy"], -best["loss"]) for f in found)


def test_a_rule_of_ones_own_enters_the_comparison():
    def lazy(net, x, seed):
        setup = side.plain(net, x, seed)
        def gradients(model, x, y):
            loss = side.backprop(model, x, y)
            for p in setup.weights[:-1]:
                p.grad = torch.zeros_like(p)
            return loss
        setup.gradients = gradients
        return setup
    rule = side.Rule("top layer only", ("square",), lazy, "nothing")
    found = side.compete(rule, "square", "digits", 0, quick=True)
    assert 0.5 < found["test"][0] < 0.95 and len(found["tuning"]) == 2
    assert len(found["angles"]) == 7 and math.isnan(found["angles"][0][0]) and found["angles"][0][-1] < 1e-4


@pytest.mark.parametrize("network, rule, extra", [("square", "gait", "predicted"), ("square", "kp", "weight_angles")])
def test_the_protocol_records_what_theory_wants(network, rule, extra):
    found = side.compete(rule, network, "digits", 0, quick=True)
    assert len(found[extra]) == len(found["angles"]) == 7
    assert found["kept"]["step"] > 0 and 0 <= found["setting"] < 2 and found["test"][0] > 0.5


def test_a_diverged_run_counts_as_chance_and_leaves_no_course(monkeypatch):
    monkeypatch.setattr(side, "train", lambda *a, **k: SimpleNamespace(diverged=3))
    found = side.compete("bp", "square", "digits", 0, quick=True)
    assert found["test"] == [0.1] and "angles" not in found


@pytest.mark.parametrize("network", side.CASES)
def test_tasks_give_the_shape_that_the_network_reads(network):
    data = side.task_data("digits", network)
    assert data.x_train.shape == (1077, *SHAPES[network]) and len(data.x_val) == len(data.x_test) == 360


def test_pooling_averages_pixels(monkeypatch):
    x = torch.arange(16.0).reshape(1, 1, 4, 4)
    parts = {k: x for k in ("x_train", "x_val", "x_test")} | {k: torch.zeros(1).long() for k in ("y_train", "y_val", "y_test")}
    monkeypatch.setattr(side, "load", lambda *a, **k: Dataset("toy", ("0",), **parts))
    assert side.task_data("mnist", "square").x_test.tolist() == [[2.5, 4.5, 10.5, 12.5]]


def test_entries_without_a_value_are_left_out_of_a_mean():
    assert side.mean_of([[1.0, math.nan], [3.0, 5.0]]) == [2.0, 5.0]


@pytest.mark.parametrize("call, message", [
    (lambda x: side.ready("bp", "pixel", x), "x: pixel reads float32 of shape"),
    (lambda x: side.ready("bp", "square", x.double()), "x: square reads float32"),
    (lambda x: side.ready("bp", "square", x[:0]), "x: square reads float32"),
    (lambda x: side.ready(None, "square", x), "rule: None is not one of"),
    (lambda x: side.Rule("mine", "square", side.plain, "nothing"), "networks: 'square' is not a tuple"),
    (lambda x: side.train(side.ready("bp", "square", x), None, ("lion", 0.1), 1), "setting: 'lion' is not one of sgd, adam"),
    (lambda x: side.tune("bp", "square", None, 1, 0, settings=()), "settings: there is none"),
    (lambda x: side.choose([]), "found: there is nothing"),
    (lambda x: side.task_data("imagenet", "square"), "name: 'imagenet' is not one of digits"),
    (lambda x: side.task_data("cifar10", "square"), "network: 'square' is not one of pixel"),
    (lambda x: side.compete("bp", "square", "digits", 0, repeats=0), "repeats: 0"),
    (lambda x: side.gradient_noise(side.ready("bp", "square", x), x, None, batch=9), "batch: 9 is not from 1 to 2"),
    (lambda x: side.gradient_noise(side.ready("bp", "square", x), x, None, batch=1, draws=0), "draws: 0"),
    (lambda x: side.kept_bytes(side.Setup(nn.Linear(64, 10), None, []), x, None), "setup: needs a loss")])
def test_bad_input_is_named(call, message):
    with pytest.raises(ValueError, match=message):
        call(torch.rand(2, 64))


@pytest.mark.parametrize("args, message", [
    (("fa", "round"), "network: 'round' is not one of square"),
    (("hebb", "square"), "rule: 'hebb' is not one of bp"),
    (("gait", "pixel"), "network: GAIT-prop works on square, not on pixel")])
def test_errors_name_the_argument(args, message):
    with pytest.raises(ValueError, match=message):
        side.ready(*args, torch.rand(2, 64))


def test_experiments_cover_every_rule():
    cases = {(c["network"], c["rule"]) for name in ("side-digits", "side-discrete")
             for c in side.experiment.__globals__["REGISTRY"][name].cases}
    assert cases == set(PAIRS)
    assert {rule for _, rule in PAIRS} == set(side.RULES)
