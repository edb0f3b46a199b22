"""altbp.training: the loop against loops written out, checkpoints bit for bit, ensembles against single runs."""
import json
import math
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from altbp import training as T

MOMENTUM = partial(torch.optim.SGD, lr=0.05, momentum=0.9)
ADAM = partial(torch.optim.Adam, lr=0.01)


def mlp(width=8):
    return nn.Sequential(nn.Linear(5, width), nn.Tanh(), nn.Linear(width, 3))


def dropout():
    return nn.Sequential(nn.Linear(5, 8), nn.ReLU(), nn.Dropout(0.4), nn.Linear(8, 3))


def toy(n=50, n_val=20, dtype=torch.float32):
    """Three classes, linearly separable up to noise: x, y, x_val, y_val."""
    g = torch.Generator().manual_seed(0)
    x = torch.randn(n + n_val, 5, generator=g, dtype=dtype)
    y = (x[:, :3] + 0.1 * torch.randn(n + n_val, 3, generator=g, dtype=dtype)).argmax(1)
    return x[:n], y[:n], x[n:], y[n:]


def same(a, b):
    return all(torch.equal(p, q) for p, q in zip(a.state_dict().values(), b.state_dict().values()))


# Randomness -------------------------------------------------------------------------------------------------------

def test_seeded_is_a_function_of_the_seed_and_leaves_the_global_state():
    torch.manual_seed(99)
    before = torch.get_rng_state()
    a, b, c = T.seeded(mlp, 3), T.seeded(mlp, 3), T.seeded(mlp, 4)
    assert torch.equal(torch.get_rng_state(), before)
    assert same(a, b) and not same(a, c)
    torch.manual_seed(3)
    assert same(a, mlp())  # what torch itself draws under that seed
    assert T.seeded(mlp, 3, dtype=torch.float64)[0].weight.dtype == torch.float64


def test_global_state_survives_exceptions_and_fit():
    before = torch.get_rng_state()
    with pytest.raises(ZeroDivisionError), T.seeded_rng(0):
        torch.rand(3)
        1 / 0
    T.fit(T.seeded(dropout, 0), toy(), 2)
    T.fit_seeds(mlp, [0, 1], toy(), 1)
    assert torch.equal(torch.get_rng_state(), before)


@settings(max_examples=50, deadline=None)
@given(n=st.integers(1, 60), batch_size=st.one_of(st.none(), st.integers(1, 70)), seed=st.integers(0, 9))
def test_batches_cover_every_example_once(n, batch_size, seed):
    parts = list(T.batches(n, batch_size, torch.Generator().manual_seed(seed)))
    assert sorted(torch.cat(parts).tolist()) == list(range(n))
    assert all(len(p) == (batch_size or n) for p in parts[:-1]) and 1 <= len(parts[-1]) <= (batch_size or n)


def test_batches_refuse_nonsense():
    for n, size, name in ((0, 4, "data"), (5, 0, "batch_size"), (5, -1, "batch_size")):
        with pytest.raises(ValueError, match=name):
            T.batches(n, size, torch.Generator())


# The loop ---------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("optimizer", [T.SGD, MOMENTUM, ADAM])
@pytest.mark.parametrize("batch_size", [16, None])
def test_fit_is_the_loop_that_one_would_write(optimizer, batch_size):
    x, y, *_ = data = toy()
    model, losses = T.seeded(mlp, 1), []
    opt, g = optimizer(model.parameters()), torch.Generator().manual_seed(5)
    for _ in range(3):
        order = torch.randperm(50, generator=g) if batch_size else torch.arange(50)
        for i in range(0, 50, batch_size or 50):
            j = order[i : i + (batch_size or 50)]
            opt.zero_grad()
            loss = F.cross_entropy(model(x[j]), y[j])
            loss.backward()
            opt.step()
            losses.append(loss.item())
    ours = T.seeded(mlp, 1)
    h = T.fit(ours, data, 3, optimizer, batch_size=batch_size, seed=5)
    assert same(ours, model) and h["loss"] == losses and h["epoch"] == [1, 2, 3]


def test_custom_rule_with_numbers_of_its_own():
    x, y, *_ = toy()

    @torch.no_grad()
    def signs(model, x, y):
        with torch.enable_grad():
            g = torch.autograd.grad(F.cross_entropy(model(x), y), list(model.parameters()))
        for p, v in zip(model.parameters(), g):
            p.grad = v.sign()
        return {"loss": F.cross_entropy(model(x), y), "norm": sum(v.norm() for v in g)}

    model = T.seeded(lambda: nn.Linear(5, 3), 0)
    start = model.weight.detach().clone()
    h = T.fit(model, (x, y), 1, T.SGD, signs, batch_size=None)
    assert torch.allclose((model.weight - start).abs(), torch.full((3, 5), 0.1))
    assert len(h["norm"]) == len(h["loss"]) == 1 and h["norm"][0] > 0 and "val_loss" not in h


def test_rule_that_writes_nothing_is_refused():
    with pytest.raises(RuntimeError, match="gradients: the rule wrote no .grad"):
        T.fit(mlp(), toy(), 1, gradients=lambda m, x, y: 1.0)


def test_gradients_of_the_previous_step_are_cleared():
    """A rule that writes only on the first step: the second step must not reuse its gradients."""
    def once(model, x, y, calls=[]):
        calls.append(1)
        return T.by_autograd()(model, x, y) if len(calls) == 1 else 1.0
    with pytest.raises(RuntimeError, match="wrote no .grad"):
        T.fit(mlp(), toy(), 1, gradients=once, batch_size=25)


def test_data_follow_the_model():
    x, y, x_val, y_val = toy(dtype=torch.float32)
    model = T.seeded(mlp, 0, dtype=torch.float64)
    seen = []
    T.fit(model, (x, y, x_val, y_val), 1, gradients=lambda m, a, b: seen.append((a.dtype, b.dtype)) or T.by_autograd()(m, a, b))
    assert set(seen) == {(torch.float64, torch.int64)}
    reg = T.seeded(lambda: nn.Linear(5, 1), 0, dtype=torch.float64)
    h = T.fit(reg, (x, x[:, :1], x_val, x_val[:, :1]), 30, loss=F.mse_loss)
    assert h.last("val_loss") < 1e-2 and "val_accuracy" not in h


def test_dataset_like_objects_and_wrong_data():
    from altbp.data import digits
    h = T.fit(T.seeded(lambda: nn.Linear(64, 10), 0), digits(n_train=100, n_val=50, flat=True), 2)
    assert len(h["val_accuracy"]) == 2
    x, y, *_ = toy()
    for data, message in (((x, y[:-1]), "50 inputs and 49 targets"), ((x, y, x), "got 3 parts"), ((x[:0], y[:0]), "no training")):
        with pytest.raises(ValueError, match=message):
            T.fit(mlp(), data, 1)


def test_scheduler_steps_once_an_epoch():
    lrs = []
    opt = torch.optim.SGD((model := mlp()).parameters(), lr=1.0)
    T.fit(model, toy(), 4, opt, scheduler=partial(torch.optim.lr_scheduler.MultiStepLR, milestones=[2], gamma=0.1),
          metrics=lambda m: lrs.append(opt.param_groups[0]["lr"]) or {})
    assert lrs == pytest.approx([1, 1, 0.1, 0.1])


def test_frozen_parameters_stay():
    model = T.seeded(mlp, 0)
    model[0].weight.requires_grad_(False)
    start = model[0].weight.clone()
    T.fit(model, toy(), 1)
    assert torch.equal(model[0].weight, start)


# Measuring --------------------------------------------------------------------------------------------------------

def test_evaluate_agrees_with_the_definition_and_restores_modes():
    x, y, *_ = toy()
    model = T.seeded(dropout, 0)
    model[0].eval()
    r = T.evaluate(model, x, y, batch_size=7)
    assert [m.training for m in model] == [False, True, True, True] and model.training
    model.eval()
    logits = model(x)
    assert r["loss"] == pytest.approx(F.cross_entropy(logits, y).item(), abs=1e-6)
    assert r["accuracy"] == sum(int(l.argmax() == t) for l, t in zip(logits, y)) / 50
    assert not any(p.grad is not None for p in model.parameters())


def test_evaluate_restores_modes_after_an_error():
    model = mlp()
    with pytest.raises(RuntimeError):
        T.evaluate(model, torch.ones(2, 4), torch.zeros(2, dtype=torch.long))
    assert model.training
    with pytest.raises(ValueError, match="x: there is nothing"):
        T.evaluate(model, torch.ones(0, 5), torch.zeros(0))
    with pytest.raises(ValueError, match="model: it has no parameters"):
        T.evaluate(nn.ReLU(), torch.ones(1, 5), torch.zeros(1))


def test_history():
    h = T.History()
    for v in (3.0, math.nan, 1.0, 2.0):
        h.record(val_loss=v, test_accuracy=v)
    assert h.last("val_loss") == 2 and h.best("val_loss") == 1 and h.best("test_accuracy") == 3
    assert h.best("val_loss", "max") == 3 and h.best("test_accuracy", mode="min") == 1
    h.diverged = 7
    assert json.loads(h.to_json()) == {"diverged": 7, "stopped": None, "val_loss": [3, None, 1, 2], "test_accuracy": [3, None, 1, 2]}
    with pytest.raises(ValueError, match="no finite value"):
        T.History(a=[math.inf]).best("a")
    with pytest.raises(ValueError, match="mode"):
        h.best("val_loss", "least")


# Divergence and patience ------------------------------------------------------------------------------------------

def test_divergence_raises_or_marks_and_keeps_the_weights():
    def rule(model, x, y, limit=3):
        state["n"] += 1
        value = T.by_autograd()(model, x, y)
        if state["n"] > limit:
            return value * math.nan
        state["weights"] = [p.detach().clone() for p in model.parameters()]
        return value
    state = {"n": 0}
    with pytest.raises(T.Diverged, match="step 3: the loss is nan"):
        T.fit(mlp(), toy(), 5, gradients=rule, batch_size=10)
    state = {"n": 0}
    model = mlp()
    h = T.fit(model, toy(), 5, gradients=rule, batch_size=10, on_nan="stop")
    assert h.diverged == 3 and len(h["loss"]) == 4 and "epoch" not in h
    assert all(torch.isfinite(p).all() for p in model.parameters())
    assert not torch.equal(next(model.parameters()), state["weights"][0])  # the third, good step was taken
    with pytest.raises(ValueError, match="on_nan"):
        T.fit(mlp(), toy(), 1, on_nan="ignore")


@pytest.mark.parametrize("patience", [1, 3])
def test_patience_stops_and_restores_the_best_weights(patience):
    script = [0.5, 0.4, 0.3, 0.6, 0.35, 0.31, 0.2]
    seen = []
    def metrics(model):
        seen.append([p.detach().clone() for p in model.parameters()])
        return {"val_loss": script[len(seen) - 1]}
    model = mlp()
    h = T.fit(model, toy(), 7, metrics=metrics, patience=patience)
    assert h.stopped == 3 + patience and h["val_loss"] == script[: 3 + patience]
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), seen[2]))


def test_patience_for_accuracies_modes_and_ties():
    seen = []
    def metrics(model):
        seen.append([p.detach().clone() for p in model.parameters()])
        return {"val_accuracy": [0.5, 0.5, 0.5, 0.9][len(seen) - 1]}
    h = T.fit(model := mlp(), toy(), 4, metrics=metrics, patience=2, monitor="val_accuracy")
    assert h.stopped == 3 and all(torch.equal(p, q) for p, q in zip(model.parameters(), seen[0]))  # equal is not better
    values = iter([1.0, 2.0, 3.0])
    assert T.fit(mlp(), toy(), 3, metrics=lambda m: {"angle": next(values)}, patience=1, monitor="angle", mode="max").stopped is None
    values = iter([math.nan, math.nan, 1.0])
    assert T.fit(mlp(), toy(), 3, metrics=lambda m: {"val_loss": next(values)}, patience=2).stopped == 2
    with pytest.raises(ValueError, match="monitor: 'val_loss' is not measured"):
        T.fit(mlp(), toy()[:2], 2, patience=1)


# Checkpoints ------------------------------------------------------------------------------------------------------

class Stop(Exception):
    pass


def interrupted(at, **options):
    """Run until the rule's call number `at`, then raise."""
    calls = [0]
    def rule(model, x, y):
        calls[0] += 1
        if calls[0] == at:
            raise Stop
        return T.by_autograd()(model, x, y)
    with pytest.raises(Stop):
        T.fit(gradients=rule, **options)


@pytest.mark.parametrize("optimizer", [MOMENTUM, ADAM])
@pytest.mark.parametrize("at, every", [(2, 1), (7, 1), (12, 2), (19, 3)])
def test_resumed_runs_are_bitwise_the_same(tmp_path, optimizer, at, every):
    schedule = partial(torch.optim.lr_scheduler.StepLR, step_size=2, gamma=0.5)
    options = dict(data=toy(), epochs=5, optimizer=optimizer, batch_size=13, seed=3, scheduler=schedule)
    whole = T.seeded(dropout, 0)
    expected = T.fit(whole, **options)
    path = tmp_path / "run.pt"
    interrupted(at, model=T.seeded(dropout, 0), checkpoint=path, every=every, **options)
    assert path.exists() == (at > 4 * every)
    resumed = T.seeded(dropout, 0)
    h = T.fit(resumed, checkpoint=path, every=every, **options)
    assert same(resumed, whole) and dict(h) == dict(expected)
    assert [p.name for p in tmp_path.iterdir()] == ["run.pt"]
    other = T.seeded(dropout, 9)
    assert dict(T.fit(other, checkpoint=path, **options)) == dict(expected) and same(other, whole)  # nothing left to do


def test_checkpoint_of_rule_state(tmp_path):
    """A rule with a generator and a module of its own resumes if both are handed over as `also`."""
    def start():
        g, inverse = torch.Generator().manual_seed(1), T.seeded(lambda: nn.Linear(3, 5), 2)
        def rule(model, x, y):
            value = T.by_autograd()(model, x, y)
            for p in model.parameters():
                p.grad += 0.01 * torch.randn(p.shape, generator=g)
            with torch.no_grad():
                inverse.weight += 0.1 * torch.randn(inverse.weight.shape, generator=g)
            return value + inverse.weight.sum()
        return rule, dict(g=g, inverse=inverse), inverse
    options = dict(data=toy(), optimizer=MOMENTUM, batch_size=13)
    rule, also, inverse = start()
    whole = T.seeded(mlp, 0)
    expected = T.fit(whole, gradients=rule, epochs=4, **options)
    path = tmp_path / "run.pt"
    first, also, _ = start()
    T.fit(T.seeded(mlp, 0), gradients=first, epochs=2, checkpoint=path, also=also, **options)
    second, also, again = start()
    resumed = T.seeded(mlp, 7)
    h = T.fit(resumed, gradients=second, epochs=4, checkpoint=path, also=also, **options)
    assert same(resumed, whole) and same(again, inverse) and dict(h) == dict(expected)
    with pytest.raises(ValueError, match="of another run"):
        T.fit(mlp(), epochs=4, checkpoint=path, **options)
    with pytest.raises(ValueError, match="also: model names"):
        T.fit(mlp(), epochs=4, also={"model": mlp()}, **options)


def test_early_stopping_resumes_too(tmp_path):
    x, y, x_val, y_val = toy(n=15)
    options = dict(data=(x, torch.randint(3, (15,), generator=torch.Generator().manual_seed(0)), x_val, y_val),
                   optimizer=ADAM, patience=4)
    whole = T.seeded(partial(mlp, 64), 0)
    expected = T.fit(whole, epochs=200, **options)
    assert expected.stopped is not None
    path = tmp_path / "run.pt"
    T.fit(T.seeded(partial(mlp, 64), 0), epochs=expected.stopped - 2, checkpoint=path, **options)
    resumed = T.seeded(partial(mlp, 64), 5)
    h = T.fit(resumed, epochs=200, checkpoint=path, **options)
    assert h.stopped == expected.stopped and dict(h) == dict(expected) and same(resumed, whole)
    again = T.fit(again_model := mlp(64), epochs=400, checkpoint=path, **options)
    assert dict(again) == dict(expected) and same(again_model, whole)


def test_foreign_or_damaged_checkpoints_are_refused(tmp_path):
    path = tmp_path / "run.pt"
    T.fit(mlp(), toy(), 1, checkpoint=path)
    for change in (dict(seed=1), dict(batch_size=7)):
        with pytest.raises(ValueError, match="run.pt is of another run"):
            T.fit(mlp(), toy(), 2, checkpoint=path, **change)
    with pytest.raises(ValueError, match="of another run"):
        T.fit(mlp(), toy(n=49), 2, checkpoint=path)
    raw = path.read_bytes()
    for damaged in (raw[:500], b"", b"text"):
        path.write_bytes(damaged)
        with pytest.raises(ValueError, match="run.pt cannot be read"):
            T.fit(mlp(), toy(), 2, checkpoint=path)
        assert path.read_bytes() == damaged


# Ensembles --------------------------------------------------------------------------------------------------------

class Feedback(nn.Module):
    """A layer with a fixed random buffer of its own for each seed, and a frozen parameter."""
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(5, 8), nn.Linear(8, 3)
        self.register_buffer("scale", torch.rand(8))
        self.a.bias.requires_grad_(False)

    def forward(self, x):
        return self.b(torch.relu(self.a(x)) * self.scale)


@pytest.mark.parametrize("dtype, tol", [(torch.float32, 1e-6), (torch.float64, 1e-10)])
@pytest.mark.parametrize("optimizer", [MOMENTUM, ADAM, partial(torch.optim.RMSprop, lr=1e-3)])
@pytest.mark.parametrize("make", [mlp, Feedback])
def test_seeds_together_are_seeds_alone(make, optimizer, dtype, tol):
    data, seeds = toy(dtype=dtype), [0, 3, 8]
    schedule = partial(torch.optim.lr_scheduler.StepLR, step_size=2, gamma=0.5)
    models, histories = T.fit_seeds(make, seeds, data, 4, optimizer, batch_size=13, scheduler=schedule, dtype=dtype)
    for model, h, s in zip(models, histories, seeds):
        alone = T.seeded(make, s, dtype=dtype)
        expected = T.fit(alone, data, 4, optimizer, batch_size=13, seed=s, scheduler=schedule)
        for p, q in zip(model.parameters(), alone.parameters()):
            assert (p - q).abs().max() <= tol
        assert h.keys() == expected.keys()
        assert all(abs(a - b) <= 10 * tol for k in ("loss", "val_loss") for a, b in zip(h[k], expected[k], strict=True))
    assert not torch.allclose(models[0].state_dict()["b.weight" if make is Feedback else "2.weight"],
                              models[1].state_dict()["b.weight" if make is Feedback else "2.weight"])


def test_convolutions_regression_and_full_batches():
    make = lambda: nn.Sequential(nn.Unflatten(1, (1, 5)), nn.Conv1d(1, 4, 3), nn.Flatten(), nn.Linear(12, 1))
    x, *_ = toy(dtype=torch.float64)
    data = (x, x[:, :1] ** 2)
    models, histories = T.fit_seeds(make, [1, 2], data, 5, loss=F.mse_loss, batch_size=None, dtype=torch.float64)
    for m, s in zip(models, [1, 2]):
        T.fit(alone := T.seeded(make, s, dtype=torch.float64), data, 5, loss=F.mse_loss, batch_size=None, seed=s)
        assert all((p - q).abs().max() < 1e-12 for p, q in zip(m.parameters(), alone.parameters()))
    assert "val_loss" not in histories[0] and histories[0]["epoch"] == [1, 2, 3, 4, 5]


class Noisy(nn.Linear):
    def forward(self, x):
        return super().forward(x + torch.randn_like(x))


class Hidden(nn.Linear):
    def __init__(self):
        super().__init__(5, 3)
        self.B = torch.rand(3)

    def forward(self, x):
        return super().forward(x) * self.B


@pytest.mark.parametrize("make, optimizer, message", [
    (dropout, T.SGD, r"2 \(Dropout\) has random masks"),
    (lambda: nn.Sequential(nn.Linear(5, 3), nn.BatchNorm1d(3)), T.SGD, r"1 \(BatchNorm1d\) has running statistics"),
    (lambda: Noisy(5, 3), T.SGD, "draws random numbers"),
    (Hidden, T.SGD, r"the model \(Hidden\) keeps B as a plain tensor"),
    (mlp, torch.optim.LBFGS, "LBFGS may couple"),
])
def test_what_cannot_be_stacked_is_refused(make, optimizer, message):
    with pytest.raises(ValueError, match=message):
        T.fit_seeds(make, [0, 1], toy(), 1, optimizer)


def test_dropout_of_zero_and_norms_without_statistics_are_stacked():
    make = lambda: nn.Sequential(nn.Linear(5, 8), nn.LayerNorm(8), nn.Dropout(0.0), nn.Linear(8, 3))
    models, _ = T.fit_seeds(make, [4], toy(dtype=torch.float64), 2, dtype=torch.float64)
    T.fit(alone := T.seeded(make, 4, dtype=torch.float64), toy(dtype=torch.float64), 2, seed=4)
    assert all((p - q).abs().max() < 1e-12 for p, q in zip(models[0].parameters(), alone.parameters()))


def test_one_diverging_seed_leaves_the_others_alone():
    class Fuse(nn.Linear):
        """Blows up for one of the seeds."""
        def __init__(self):
            super().__init__(5, 3)
            self.register_buffer("fuse", (torch.initial_seed() == torch.tensor(1)).float() * 1e30)
        def forward(self, x):
            return super().forward(x) * (1 + self.fuse) ** 2
    models, h = T.fit_seeds(Fuse, [0, 1], toy(), 2, on_nan="stop")
    assert h[0].diverged is None and h[1].diverged == 0 and len(h[1]["loss"]) == 1 and "epoch" not in h[1]
    T.fit(alone := T.seeded(Fuse, 0), toy(), 2, seed=0)
    assert (models[0].weight - alone.weight).abs().max() < 1e-6
    with pytest.raises(T.Diverged, match="step 0: the loss of seed 1 is"):
        T.fit_seeds(Fuse, [0, 1], toy(), 2)
    with pytest.raises(ValueError, match="seeds: there are none"):
        T.fit_seeds(mlp, [], toy(), 2)


# Found by a hostile reader ----------------------------------------------------------------------------------------

def test_accuracy_wants_the_shapes_that_belong_together():
    logits = torch.eye(3)
    assert T.accuracy(logits, torch.arange(3)) == 1.0
    for y in (torch.arange(3)[:, None], torch.arange(1), torch.tensor(0), torch.eye(3).long()):
        with pytest.raises(ValueError, match=r"logits: \(3, 3\) do not fit labels"):
            T.accuracy(logits, y)
    with pytest.raises(ValueError, match="logits"):
        T.evaluate(nn.Linear(5, 3), torch.ones(4, 5), torch.zeros(4, 1, dtype=torch.int64), loss=lambda out, y: out.sum())


def test_rows_with_nan_are_wrong():
    logits = torch.eye(3)
    logits[0, 0] = logits[1, 2] = math.nan  # argmax would answer 0, which is right, and 2
    assert T.accuracy(logits, torch.arange(3)) == pytest.approx(1 / 3)
    assert T.accuracy(torch.full((4, 2), math.nan), torch.zeros(4, dtype=torch.int64)) == 0.0


def frozen_state(*objects):
    import copy
    return copy.deepcopy([o.get_state() if isinstance(o, torch.Generator) else o.state_dict() for o in objects])


def test_a_refused_checkpoint_changes_nothing(tmp_path):
    path, small = tmp_path / "run.pt", dict(data=toy(), batch_size=13)
    def also(): return dict(g=torch.Generator().manual_seed(4), net=T.seeded(lambda: nn.Linear(2, 2), 4))
    T.fit(mlp(), epochs=3, optimizer=MOMENTUM, checkpoint=path, also=also(), **small)
    saved = path.read_bytes()
    x, y, *val = toy()
    wide = lambda p: torch.optim.SGD([{"params": [q]} for q in p], lr=0.05, momentum=0.9)
    for change, message in [
        (dict(model=mlp(9)), "does not fit, its model"),                        # another shape
        (dict(model=nn.Sequential(*mlp(), nn.Tanh(), nn.Linear(3, 3))), "does not fit, its model"),  # other keys
        (dict(optimizer=wide), "does not fit, its optimizer"),                  # other groups
        (dict(optimizer=ADAM), "of another run.*SGD.*Adam"),                    # another kind
        (dict(also={**also(), "net": nn.Linear(3, 2)}), "does not fit, its net"),
        (dict(epochs=2), "3 epochs, epochs=2 is less"),
        (dict(data=(x + 1, y, *val)), "of another run"), (dict(data=(x, y.roll(1), *val)), "of another run"),
    ]:
        options = dict(model=mlp(), epochs=5, optimizer=MOMENTUM, also=also(), checkpoint=path, **small) | change
        kept = [options["model"], *options["also"].values()]
        before, rng = frozen_state(*kept), torch.get_rng_state()
        with pytest.raises(ValueError, match=f"(?s)checkpoint: .*run.pt.*{message}"):
            T.fit(**options)
        after = frozen_state(*kept)
        assert torch.equal(before[1], after[1]) and torch.equal(torch.get_rng_state(), rng)
        for a, b in zip((before[0], before[2]), (after[0], after[2])):
            assert all(torch.equal(a[k], b[k]) for k in a)
        assert path.read_bytes() == saved


@pytest.mark.parametrize("content", [
    {"weight": torch.ones(2)}, [1, 2], torch.ones(3),
    dict.fromkeys(("config", "epoch", "best", "rng", "cuda", "history", "diverged", "stopped", "parts")),
])
def test_what_is_no_checkpoint_is_refused(tmp_path, content):
    torch.save(content, tmp_path / "run.pt")
    with pytest.raises(ValueError, match="run.pt is not a checkpoint of fit"):
        T.fit(mlp(), toy(), 2, checkpoint=tmp_path / "run.pt")


def test_a_checkpoint_without_the_later_keys_still_resumes(tmp_path):
    """Checkpoints of before had neither the hash of the data nor the optimiser's name."""
    path, whole = tmp_path / "run.pt", T.seeded(mlp, 0)
    expected = T.fit(whole, toy(), 4)
    T.fit(T.seeded(mlp, 0), toy(), 2, checkpoint=path)
    saved = torch.load(path)
    assert saved["config"].keys() == {"seed", "batch_size", "n", "data", "optimizer"}
    del saved["config"]["data"], saved["config"]["optimizer"]
    torch.save(saved, path)
    assert dict(T.fit(model := T.seeded(mlp, 5), toy(), 4, checkpoint=path)) == dict(expected) and same(model, whole)


@pytest.mark.parametrize("options, error, message", [
    (dict(every=0), ValueError, "every: 0"), (dict(every=1.0), TypeError, "every"), (dict(epochs=-1), ValueError, "epochs: -1"),
    (dict(epochs=2.0), TypeError, "epochs"), (dict(seed="0"), TypeError, "seed"), (dict(seed=0.5), TypeError, "seed"),
    (dict(seed=True), TypeError, "seed"), (dict(mode="least"), ValueError, "mode: 'least'"),
    (dict(batch_size=0), ValueError, "batch_size"), (dict(batch_size=2.5), TypeError, "batch_size"),
    (dict(patience=0), ValueError, "patience: 0"), (dict(patience=1, monitor="loss"), ValueError, "monitor: 'loss'"),
    (dict(scheduler=torch.optim.lr_scheduler.ReduceLROnPlateau), ValueError, "scheduler: ReduceLROnPlateau"),
])
def test_wrong_arguments_are_found_before_the_first_step(tmp_path, options, error, message):
    def rule(model, x, y): raise AssertionError("a step was taken")
    with pytest.raises(error, match=message):
        T.fit(**dict(model=mlp(), data=toy(), epochs=2, gradients=rule, checkpoint=tmp_path / "run.pt") | options)
    assert not list(tmp_path.iterdir())


def test_numbers_of_numpy_and_no_epoch_at_all(tmp_path):
    import numpy as np
    model = T.seeded(mlp, np.int64(3))
    before = [p.clone() for p in model.parameters()]
    assert T.fit(model, toy(), 0) == {} and all(torch.equal(p, q) for p, q in zip(model.parameters(), before))
    a = T.fit(T.seeded(mlp, 3), toy(), np.int64(2), seed=np.int32(1), batch_size=np.int64(13), checkpoint=tmp_path / "a.pt")
    assert dict(a) == dict(T.fit(T.seeded(mlp, 3), toy(), 2, seed=1, batch_size=13, checkpoint=tmp_path / "a.pt"))


@pytest.mark.parametrize("found, error, message", [
    ({"loss": 1.0}, ValueError, "metrics: loss is"), ({"epoch": 1}, ValueError, "metrics: epoch is"), (0.5, TypeError, "metrics"),
])
def test_measurements_have_names_of_their_own(found, error, message):
    for run in (partial(T.fit, mlp(), toy(), 1), partial(T.fit_seeds, mlp, [0], toy(), 1)):
        with pytest.raises(error, match=message):
            run(metrics=lambda m: found)


def test_seeds_may_come_from_an_iterator_and_count_once():
    together, histories = T.fit_seeds(mlp, map(int, "3 1 3"[::2]), toy(), 2)
    assert len(together) == len(histories) == 2
    for s, m, h in zip((3, 1), together, histories):
        alone = T.fit(model := T.seeded(mlp, s), toy(), 2, seed=s)
        assert h["loss"] == pytest.approx(alone["loss"], abs=1e-5) and len(h["epoch"]) == 2
        assert all(torch.allclose(p, q, atol=1e-5) for p, q in zip(m.parameters(), model.parameters()))
    for seeds in ([0, 0.5], [True], ["0"], 3):
        with pytest.raises(TypeError, match="seeds"):
            T.fit_seeds(mlp, seeds, toy(), 1)
    with pytest.raises(ValueError, match="ReduceLROnPlateau"):
        T.fit_seeds(mlp, [0], toy(), 1, scheduler=torch.optim.lr_scheduler.ReduceLROnPlateau)


@pytest.mark.parametrize("returned, error, words", [
    (None, TypeError, "gradients: expected the loss.*got None"), ({}, TypeError, "gradients: .*keys"),
    ({"loss": 1.0, "epoch": 7.0}, ValueError, "gradients: epoch is the loop's"),
    ({"loss": 1.0, "val_loss": 7.0}, ValueError, "gradients: val_loss is the loop's")])
def test_what_a_rule_returns_is_checked(returned, error, words):
    def rule(model, x, y):
        model(x).sum().backward()
        return returned

    with pytest.raises(error, match=words):
        T.fit(nn.Linear(3, 2), (torch.ones(4, 3), torch.zeros(4, dtype=torch.long)), 1, torch.optim.SGD, rule)
