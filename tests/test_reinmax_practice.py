"""Tests of altbp.reinmax_practice against hand-made examples, enumeration and closed forms."""
import json
import math
import statistics
from itertools import product
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st_

import altbp.reinmax_practice as rp
from altbp.experiments import REGISTRY, fingerprint, load_results, run_experiment
from altbp.reinmax import expectation, reinmax, st
from altbp.training import seeded, seeded_rng

RESULTS = Path(__file__).resolve().parent.parent / "nbs" / "results"
NAMES = sorted(n for n, e in REGISTRY.items() if e.module == "altbp.reinmax_practice")


# Estimators by name ------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("name", rp.SAMPLERS)
def test_samplers_draw_one_hot_with_a_gradient(name):
    logits = torch.randn(6, 3, 5, requires_grad=True)
    D = rp.make_sampler(name)(logits)
    assert set(D.unique().tolist()) == {0.0, 1.0} and (D.sum(-1) == 1).all()
    (D * torch.randn(6, 3, 5)).sum().backward()
    assert logits.grad.abs().sum() > 0


@pytest.mark.parametrize("name", [*rp.SAMPLERS, *rp.MULTI, "exact"])
def test_estimators_return_the_mean_value(name):
    logits, table = torch.randn(4, 2, 3), torch.randn(2, 3)
    f = lambda D: (D * table).sum((-2, -1))
    exact = expectation(f, logits)
    with seeded_rng(0):
        values = torch.stack([rp.make_estimator(name)(f, logits.clone().requires_grad_()) for _ in range(400)])
    assert values.shape == (400, 4)
    error = (values.mean(0) - exact).abs() / (values.std(0) / 400**0.5 + 1e-5)
    assert error.max() < 5


@pytest.mark.parametrize("name", ["debiased", "rloo", "reinforce", "exact"])
def test_unbiased_estimators(name):
    logits, w = torch.tensor([[0.3, -0.5, 0.1], [0.0, 0.4, -1.0]], dtype=torch.float64), torch.randn(2, 3).double()
    f = lambda D: torch.tanh(3 * (D * w).sum((-2, -1)) + 0.3)
    leaf = logits.clone().requires_grad_()
    exact = torch.autograd.grad(expectation(f, leaf), leaf)[0]
    with seeded_rng(1):
        leaf = logits.expand(20000, 2, 3).clone().requires_grad_()
        g = torch.autograd.grad(rp.make_estimator(name)(f, leaf).sum(), leaf)[0]
    z = (g.mean(0) - exact).abs() / (g.std(0) / 20000**0.5 + 1e-12)
    assert z.max() < 5


@pytest.mark.parametrize("args, word", [
    (("nope",), "name"), (([],), "name"), (("darn", 2.0), "tau"), (("st", 1.0, 3), "k"), (("exact", 2.0), "tau"),
    (("rloo", 0.5), "tau"), (("rloo", 1.0, 0), "k"), (("rloo", 1.0, 1), "k"), (("debiased", 1.0, 1), "k"),
    (("exact", 1.0, 3), "k"), (("gr", 1.0, 0), "k"), (("st", -1.0), "tau"), (("reinmax", math.nan), "tau")])
def test_bad_estimators(args, word):
    with pytest.raises(ValueError, match=f"^{word}:"): rp.make_estimator(*args)


def test_number_of_samples():
    seen = []
    f = lambda D: seen.append(len(D)) or D.sum((-2, -1))
    for name in rp.MULTI:
        rp.make_estimator(name)(f, torch.randn(2, 3, 4))
        rp.make_estimator(name, k=3)(f, torch.randn(2, 3, 4))
    rp.make_estimator("reinforce", k=1)(f, torch.randn(2, 3, 4))
    assert seen == [4, 3] * len(rp.MULTI) + [1]


# Polynomial programming --------------------------------------------------------------------------------------------

@pytest.mark.parametrize("p", [1.5, 2, 3])
def test_limits_are_fixed_points(p):
    limits = rp.polynomial_limits(p)
    for q, update in ((limits["st_probability"], True), (0.5, False)):
        leaf = torch.tensor([[math.log(1 - q), math.log(q)]], dtype=torch.float64).requires_grad_()
        states = torch.eye(2, dtype=torch.float64)[:, None]
        wide = leaf.expand(2, 1, 2)
        values = rp.polynomial_loss(st(wide, sample=states), p)
        grad = torch.autograd.grad((torch.tensor([1 - q, q], dtype=torch.float64) * values).sum(), leaf)[0]
        assert (grad.abs().max() < 1e-12) == update
    zero, one = (rp.polynomial_loss(torch.eye(2)[[i]], p).item() for i in (0, 1))
    assert limits["optimum"] == pytest.approx(zero)
    assert limits["start"] == pytest.approx((zero + one) / 2)
    q = limits["st_probability"]
    assert limits["st_loss"] == pytest.approx(q * one + (1 - q) * zero)


# The autoencoder ---------------------------------------------------------------------------------------------------

@settings(max_examples=15, deadline=None)
@given(latents=st_.integers(1, 4), categories=st_.integers(2, 5), seed=st_.integers(0, 99))
def test_kl_is_the_sum_over_states(latents, categories, seed):
    g = torch.Generator().manual_seed(seed)
    logits = 2 * torch.randn(3, latents, categories, generator=g, dtype=torch.float64)
    logp = logits.log_softmax(-1)
    total = torch.zeros(3, dtype=torch.float64)
    for state in product(range(categories), repeat=latents):
        joint = sum(logp[:, l, i] for l, i in enumerate(state))
        total += joint.exp() * (joint + latents * math.log(categories))
    torch.testing.assert_close(rp.uniform_kl(logits), total, rtol=1e-12, atol=1e-12)


def test_kl_vanishes_at_the_prior():
    assert rp.uniform_kl(torch.zeros(2, 4, 8)).abs().max() < 1e-5


def test_reconstruction_and_shapes():
    model, x = seeded(lambda: rp.CategoricalVAE(10, (6,), 3, 2), 0), torch.rand(4, 10)
    D = F.one_hot(torch.randint(3, (7, 4, 2)), 3).float()
    out = model.reconstruction(D, x)
    assert model.logits(x).shape == (4, 2, 3) and out.shape == (7, 4)
    p = model.decoder(D[3, 1].flatten()).sigmoid()
    by_hand = -(x[1] * p.log() + (1 - x[1]) * (1 - p).log()).sum()
    assert out[3, 1].item() == pytest.approx(by_hand.item(), rel=1e-5)
    assert [m.out_features for m in model.decoder if hasattr(m, "out_features")] == [6, 10]


def test_exact_training_follows_the_enumerated_loss():
    model, x = seeded(lambda: rp.CategoricalVAE(6, (5,), 2, 2), 1), torch.rand(3, 6)
    logits = model.logits(x)
    q, loss = logits.softmax(-1), 0
    for a, b in product(range(2), repeat=2):
        D = torch.stack([torch.eye(2)[a], torch.eye(2)[b]]).expand(3, 2, 2)
        loss = loss + q[:, 0, a] * q[:, 1, b] * model.reconstruction(D, x)
    torch.testing.assert_close(model(x, rp.make_estimator("exact")), loss + rp.uniform_kl(logits))
    torch.testing.assert_close(*(torch.autograd.grad(v.sum(), model.encoder[0].weight, retain_graph=True)[0]
                                 for v in (model(x, expectation), loss + rp.uniform_kl(logits))))


@pytest.mark.parametrize("config", ["8", "8×4", "8x4x2", "0x4", "8x-1", 84])
def test_bad_configurations(config):
    with pytest.raises(ValueError, match="^config:"): rp.digits_model(config, 0)


def test_training_resumes(tmp_path):
    x, estimator = torch.rand(250, 6), rp.make_estimator("reinmax")
    make = lambda: seeded(lambda: rp.CategoricalVAE(6, (5,), 2, 2), 0)
    whole = make()
    curve = rp.train_vae(whole, x, estimator, 4, seed=3)
    part = make()
    rp.train_vae(part, x, estimator, 2, seed=3, checkpoint=tmp_path / "fit.pt")
    again = make()
    assert rp.train_vae(again, x, estimator, 4, seed=3, checkpoint=tmp_path / "fit.pt") == curve
    for a, b in zip(whole.parameters(), again.parameters()): assert torch.equal(a, b)
    assert len(curve) == 4 and curve[-1] < curve[0]


@pytest.mark.parametrize("name", [*rp.SAMPLERS, *rp.MULTI, "exact"])
def test_the_autoencoder_trains_under_autocast(name):
    model, x = seeded(lambda: rp.CategoricalVAE(6, (5,), 3, 2), 0), torch.rand(4, 6)
    with torch.autocast("cpu", torch.bfloat16): loss = model(x, rp.make_estimator(name)).mean()
    loss.backward()
    for p in model.parameters(): assert p.grad.isfinite().all() and p.grad.abs().sum() > 0


def test_evaluation_is_seeded():
    model, x = rp.digits_model("4x3", 0), rp.digits_images()
    assert rp.evaluate_elbo(model, x) == rp.evaluate_elbo(model, x) != rp.evaluate_elbo(model, x, seed=1)
    assert x.shape == (1797, 64) and x.min() == 0 and x.max() == 1


def test_gradient_stats_of_an_unbiased_and_a_biased_estimator():
    model, x = rp.digits_model("4x3", 0), rp.digits_images()[:4]
    with torch.no_grad(): model.decoder[-1].weight *= 10
    with seeded_rng(0): report = rp.gradient_stats(model, x, ("rloo", "st"), n=256)
    rloo = report["rloo"]
    assert rloo["raw_bias"] == pytest.approx(rloo["std"] / 16, rel=0.5) and rloo["n"] == 256
    assert rloo["bias"] < 0.7 * rloo["raw_bias"] and report["st"]["std"] < rloo["std"]
    with pytest.raises(ValueError, match="^names:"): rp.gradient_stats(model, x, ("nope",), n=2)


# ListOps -----------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("text, value", [
    ("4", 4), ("[MAX 2 9 [MIN 4 7 ] 0 ]", 9), ("[MIN 4 7 ]", 4), ("[SM 9 8 5 ]", 2), ("[MED 1 4 9 ]", 4),
    ("[MED 1 4 9 2 ]", 3), ("[MED 5 2 ]", 3), ("[MED 9 [SM 5 6 ] 0 ]", 1), ("[SM [MAX 1 2 ] [MIN 8 9 ] 5 ]", 5)])
def test_listops_by_hand(text, value):
    assert rp.listops_value(text.split()) == value


@pytest.mark.parametrize("text", ["", "2 3", "[MAX 2", "]", "[MAX ]", "[MAX 2 ] ]", "[FOO 1 ]", "12", "<pad>", "²", "٣",
                                  "] 2"])
def test_listops_refuses(text):
    with pytest.raises(ValueError, match="^tokens:"): rp.listops_value(text.split())
    with pytest.raises(ValueError, match="^tokens:"): rp.gold_merges(text.split())


@pytest.mark.parametrize("kwargs, word", [(dict(n=0), "n"), (dict(n=-1), "n"), (dict(n=2, max_tokens=3), "max_tokens"),
                                          (dict(n=2, depth=0), "depth")])
def test_listops_data_refuses_what_it_could_not_draw(kwargs, word):
    with pytest.raises(ValueError, match=f"^{word}:"): rp.listops_data(seed=0, **kwargs)
    tokens, lengths, _, merges = rp.listops_data(3, 0, max_tokens=4)
    assert (lengths == 4).all() and merges.tolist() == [[0, 0, 0]] * 3


def test_split_shares_no_expression():
    train, test = rp.listops_split(2000, 300, seed=0)
    rows = [set(map(tuple, part[0].tolist())) for part in (train, test)]
    assert len(rows[1]) == 300 and not rows[0] & rows[1] and (test[1].diff() >= 0).all()
    plain = rp.listops_data(2000, 1)
    assert all(torch.equal(a, b) for a, b in zip(train, plain))
    assert rows[0] & set(map(tuple, rp.listops_data(300, 0)[0].tolist())), "without the split they overlap"
    for row, n, value, merges in zip(*(v.tolist() for v in test)):
        words = [rp.TOKENS[i] for i in row[:n]]
        assert rp.listops_value(words) == value and rp.gold_merges(words) == merges[: n - 1]
    with pytest.raises(ValueError, match="^n_test:"): rp.listops_split(2000, 50, seed=-1)


def evaluate_recursively(tokens):
    """Evaluate an expression from its front, in another way than the module; return value and rest."""
    head, rest = tokens[0], tokens[1:]
    if head.isdigit(): return int(head), rest
    values = []
    while rest[0] != "]":
        v, rest = evaluate_recursively(rest)
        values.append(v)
    by = {"[MIN": min(values), "[MAX": max(values), "[SM": sum(values) % 10, "[MED": int(statistics.median(values))}
    return by[head], rest[1:]


def test_listops_generator():
    tokens, lengths, values, merges = rp.listops_data(300, seed=5)
    assert tokens.shape == (300, 30) and merges.shape == (300, 29) and (lengths.diff() >= 0).all()
    again = rp.listops_data(300, seed=5)
    assert all(torch.equal(a, b) for a, b in zip((tokens, lengths, values, merges), again))
    assert not torch.equal(tokens, rp.listops_data(300, seed=6)[0])
    for row, n, value in zip(tokens.tolist(), lengths.tolist(), values.tolist()):
        words = [rp.TOKENS[i] for i in row]
        assert set(words[n:]) <= {"<pad>"} and evaluate_recursively(words[:n]) == (value, [])
        depth, deepest, counts = 0, 0, []
        for w in words[:n]:
            if w in rp.OPERATORS:
                if counts: counts[-1] += 1
                depth += 1
                counts.append(0)
            elif w == "]":
                assert 2 <= counts.pop() <= 5
                depth -= 1
            else: counts[-1] += 1
            deepest = max(deepest, depth)
        assert deepest <= 3


def test_gold_merges_build_the_true_tree():
    text = "[MAX 2 9 [MIN 4 7 ] 0 ]".split()
    items = list(text)
    for position in rp.gold_merges(text):
        items[position : position + 2] = [f"({items[position]} {items[position + 1]})"]
    assert items == ["((((([MAX 2) 9) ((([MIN 4) 7) ])) 0) ])"]


def test_merge_equals_list_surgery():
    s, parents = torch.randn(2, 5, 3), torch.randn(2, 4, 3)
    for k in range(4):
        D = F.one_hot(torch.tensor([k, k]), 4).float().requires_grad_()
        out = rp.merge(s, parents, D)
        torch.testing.assert_close(out, torch.cat([s[:, :k], parents[:, k : k + 1], s[:, k + 2 :]], 1))
    assert (torch.autograd.grad(out.square().sum(), D)[0] != 0).all()


@pytest.mark.parametrize("tree", ["greedy", "right", "gold"])
def test_parser_does_not_depend_on_the_batch(tree):
    data, model = rp.listops_data(30, seed=1), seeded(rp.TreeParser, 0)
    together = rp.parser_logits(model, data, tree)
    alone = torch.cat([rp.parser_logits(model, [t[i : i + 1] for t in data], tree) for i in range(30)])
    torch.testing.assert_close(together, alone, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(together, rp.parser_logits(model, data, "right" if tree != "right" else "gold"))


@pytest.mark.parametrize("tree", ["st", "reinmax", "stgs", "random"])
def test_sampled_trees_train_the_query(tree):
    data, model = rp.listops_data(8, seed=1), seeded(rp.TreeParser, 0)
    F.cross_entropy(rp.parser_logits(model, data, tree), data[2]).backward()
    got = model.query.grad is not None and model.query.grad.abs().sum() > 0
    assert got == (tree != "random")
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)


def test_parser_names_bad_arguments():
    data, model = rp.listops_data(5, seed=1), seeded(rp.TreeParser, 0)
    with pytest.raises(ValueError, match="^merges:"): rp.tree_choice("gold")
    with pytest.raises(ValueError, match="^tree:"): rp.tree_choice("nope")
    with pytest.raises(ValueError, match="^data:"): rp.parser_logits(model, [t[:0] for t in data], "right")


def test_masked_leaves_existing_pairs():
    out = rp.masked(torch.ones(3, 4), torch.tensor([4, 2, -1]))
    assert out.isfinite().sum(1).tolist() == [4, 2, 1]


def test_best_takes_the_first_of_ties():
    scores = torch.tensor([[0.1, 0.3, 0.3 + 1e-8, -math.inf], [0.0, -1.0, 2.0, 2.0]])
    assert rp.best(scores).argmax(-1).tolist() == [1, 2] and rp.best(scores).sum() == 2


# Codebook and architectures ----------------------------------------------------------------------------------------

def test_codebook_gives_all_codes_a_gradient():
    book, x = seeded(lambda: rp.Codebook(12, 3), 0), torch.randn(5, 2, 3, requires_grad=True)
    z, D = book(x)
    torch.testing.assert_close(z, book.codes[D.argmax(-1)])
    (z * torch.randn(5, 2, 3)).sum().backward()
    assert (book.codes.grad.norm(dim=-1) > 0).all() and x.grad.abs().sum() > 0
    near = rp.Codebook(2, 1)
    with torch.no_grad(): near.codes.copy_(torch.tensor([[0.0], [100.0]]))
    assert near(torch.full((50, 1), 99.0))[1].argmax(-1).min() == 1


@pytest.mark.parametrize("name", ["reinmax", "st", "stgs"])
def test_every_single_draw_reaches_every_code(name):
    book, rows = seeded(lambda: rp.Codebook(12, 3, name), 0), torch.randn(20, 3, generator=torch.Generator().manual_seed(7))
    for x in rows:
        z, _ = book(x)
        g, = torch.autograd.grad(z.square().sum(), book.codes)
        assert (g.abs().amax(-1) > 0).all()
    far = seeded(lambda: rp.Codebook(12, 3, name, scale=1 / 400), 0)
    z, _ = far(20 * rows[0])
    assert (torch.autograd.grad(z.square().sum(), far.codes)[0].abs().amax(-1) > 0).all()


def test_codebook_names_bad_arguments():
    with pytest.raises(ValueError, match="^x:"): rp.Codebook(8, 4)(torch.randn(3, 1))
    with pytest.raises(ValueError, match="^codes:"): rp.Codebook(0, 4)
    assert "reinmax, tau=1.5" in repr(rp.Codebook(8, 4, tau=1.5))


def test_code_autoencoder_takes_the_nearest_codes():
    model, x = seeded(lambda: rp.CodeAutoencoder(rp.Codebook(6, 3), 2), 0), torch.rand(5, 64)
    loss, D = model(x, nearest=True)
    e = model.encoder(x).unflatten(-1, (2, 3))
    index = (e[:, :, None] - model.book.codes).square().sum(-1).argmin(-1)
    assert torch.equal(D.argmax(-1), index) and (D.sum(-1) == 1).all()
    p = model.decoder(model.book.codes[index].flatten(1)).sigmoid()
    torch.testing.assert_close(loss, -(x * p.log() + (1 - x) * (1 - p).log()).sum(-1))


def test_perplexity():
    assert rp.perplexity(torch.eye(8)) == pytest.approx(8)
    assert rp.perplexity(torch.eye(8, dtype=torch.int64)) == pytest.approx(8)
    assert rp.perplexity(torch.eye(8)[3]) == pytest.approx(1)
    for bad in (torch.zeros(0, 4), torch.tensor(1.0)):
        with pytest.raises(ValueError, match="^D:"): rp.perplexity(bad)
    assert rp.perplexity(torch.eye(8)[[3, 3, 3]]) == pytest.approx(1)


def test_cell_mixes_its_operations():
    cell, x = seeded(rp.Cell, 0), torch.rand(2, 1, 8, 8)
    assert rp.ARCHITECTURES.shape == (64, 3, 4) and len(rp.ARCHITECTURES.flatten(1).unique(dim=0)) == 64
    none = cell(x, rp.ARCHITECTURES[0])
    torch.testing.assert_close(none, cell.head.bias.expand(2, -1))
    zero = cell.stem(x).relu()
    index = 16 * 3 + 4 * 1 + 2 # convolution 0→1, identity 0→2, mean 1→2
    one = cell.edges[0].convolution(zero).relu()
    two = zero + F.avg_pool2d(one, 3, 1, 1)
    torch.testing.assert_close(cell(x, rp.ARCHITECTURES[index]), cell.head(F.adaptive_avg_pool2d(two, 2).flatten(1)))


def test_cell_keeps_its_choice():
    cell, other, x = seeded(rp.Cell, 0), seeded(rp.Cell, 1), torch.rand(2, 1, 8, 8)
    cell.choice = rp.ARCHITECTURES[27]
    other.load_state_dict(cell.state_dict())
    torch.testing.assert_close(other(x), cell(x))
    torch.testing.assert_close(cell(x), cell(x, rp.ARCHITECTURES[27]))
    assert cell.double().choice.dtype == torch.float64 and cell(x.double()).dtype == torch.float64
    assert cell.to("meta").choice.device.type == "meta"
    for bad in (torch.eye(4), torch.ones(3, 5)):
        with pytest.raises(ValueError, match="^choice:"): rp.Cell()(x, bad)


def test_checks_leave_the_text_that_dates_runs():
    import inspect
    for fn in (rp.listops_data, rp.tree_choice, rp.parser_logits, rp.digits_model):
        assert f"def {fn.__name__}(" in inspect.getsource(fn) and list(inspect.signature(fn).parameters)


# Experiments and stored results ------------------------------------------------------------------------------------

def test_every_vae_setting_is_complete():
    for config, table in rp.VAE_SETTINGS.items():
        assert set(table) == {"reinmax", "st", "stgs", "gr", "gst"} and math.prod(map(int, config.split("x"))) > 1
        for lr, tau, optimizer in table.values():
            assert 1e-4 < lr < 1e-2 and 0.2 < tau <= 2 and optimizer in rp.OPTIMIZERS


def test_quick_runs_and_resume(tmp_path):
    e = REGISTRY["reinmax-digits-vae"]
    run = lambda seeds: run_experiment(e, seeds, "cpu", tmp_path, quick=True, cases=e.quick[1:], show=False)
    assert run((0,)) == (2, 0) and run((0,)) == (0, 0)
    runs = load_results(tmp_path / "reinmax-digits-vae.json")["runs"]
    assert all(len(r["result"]["curve"]) == 5 for r in runs)


@pytest.mark.parametrize("name", NAMES)
def test_stored_results(name):
    path = RESULTS / f"{name}.json"
    if not path.exists(): pytest.skip("not run yet")
    stored, e = load_results(path), REGISTRY[name]
    assert stored["fingerprint"] == fingerprint(e)
    cases = [json.loads(json.dumps(c)) for c in e.cases + e.quick]
    seen = set()
    for r in stored["runs"]:
        key = json.dumps([r["case"], r["seed"], r["quick"]], sort_keys=True)
        assert r["case"] in cases and key not in seen and r["command"] and r["versions"] and r["seconds"] > 0
        seen.add(key)
        for v in r["result"].values(): assert v is not None


def test_new_experiments_run_quickly(tmp_path):
    for name in ("reinmax-codebook", "reinmax-listops"):
        e = REGISTRY[name]
        assert run_experiment(e, (0,), "cpu", tmp_path, quick=True, cases=e.quick[:1], show=False) == (1, 0)
    book, = load_results(tmp_path / "reinmax-codebook.json")["runs"]
    assert 1 <= book["result"]["perplexity"] <= book["result"]["used"] <= 64
