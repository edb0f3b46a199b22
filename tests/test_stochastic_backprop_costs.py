"""Tests of altbp.stochastic_backprop_costs: bytes counted by hooks against the formulas, features, and the stored results."""
import math
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import altbp.stochastic_backprop_costs as C
import altbp.stochastic_backprop_practice as P
from altbp.experiments import REGISTRY, fingerprint, load_results
from altbp.zoo import library
from test_stochastic_backprop_practice import F64, every, images, network, own_vit

RESULTS = Path(__file__).resolve().parent.parent / "nbs" / "results"
NAMES = sorted(n for n, e in REGISTRY.items() if e.module == "altbp.stochastic_backprop_costs")


# Memory -----------------------------------------------------------------------------------------------------------

def kept_bytes(model, x, **options):
    """Bytes saved by a model without parameters and index tensors."""
    held = {p.untyped_storage()._cdata for p in model.parameters()}
    kept = {}
    def pack(t):
        s = t.untyped_storage()
        if s._cdata not in held and t.dtype != torch.int64: kept[s._cdata] = s
        return t
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t): out = model(x)
    del out
    return sum(s.nbytes() for s in kept.values())


def vit_blocks():
    timm, tv = library("timm").models.vision_transformer, library("torchvision.models.vision_transformer")
    return [P.ViTBlock(32, 2), timm.Block(32, 2, qkv_bias=True), tv.EncoderBlock(2, 32, 128, 0.0, 0.0)]


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("mode", ["dense", "query", "query_detach_kv", "qkv", "checkpoint"])
@pytest.mark.parametrize("batch", [1, 3])
def test_bytes_of_vit_blocks(fused, mode, batch):
    if batch == 1 and not fused: pytest.skip("without copies for batched products, storages are shared")
    N, n = 17, 5
    x = torch.randn(batch, N, 32, requires_grad=True)
    for block in vit_blocks()[: 3 if fused else 2]:
        if hasattr(block, "attn"): block.attn.fused_attn = fused
        model = nn.Sequential(block)
        if mode == "checkpoint": P.checkpoint_blocks(model, {"0": "block"})
        elif mode != "dense": P.apply_sbp(model, {"0": "block"}, 0.25, mode=mode, n_prefix=1)
        expected = C.block_memory("vit", mode, N, 32, n, 2, fused)
        assert kept_bytes(model, x) == 4 * batch * expected


@pytest.mark.parametrize("mode, impl", [("dense", "split"), ("query", "split"), ("query", "recompute"), ("checkpoint", "split")])
def test_bytes_of_convnext_blocks(mode, impl):
    c, t = library("torchvision.models.convnext"), library("timm").models.convnext
    x = torch.randn(2, 8, 6, 6, requires_grad=True)
    for block in (P.ConvNeXtBlock(8), c.CNBlock(8, 1.0, 0.0), t.ConvNeXtBlock(8, ls_init_value=1.0)):
        model = nn.Sequential(block)
        if mode == "checkpoint": P.checkpoint_blocks(model, {"0": "block"})
        elif mode != "dense": P.apply_sbp(model, {"0": "block"}, impl=impl)
        assert kept_bytes(model, x) == 4 * 2 * C.block_memory("convnext", mode, 36, 8, 18, impl=impl)


def test_the_memory_model_names_its_arguments():
    assert C.block_memory("vit", "drop", 17, 8, 5, 2, False) == C.block_memory("vit", "dense", 5, 8, None, 2, False)
    for options, match in ((("rnn", "dense", 4, 4), "kind"), (("vit", "fast", 4, 4), "mode"), (("vit", "query", 4, 4, 5), "n:"), (("vit", "query", 4, 4, 0), "n:")):
        with pytest.raises(ValueError, match=match): C.block_memory(*options)
    with pytest.raises(ValueError, match="2 examples"): C.bytes_per_example(nn.Linear(2, 2), torch.ones(1, 2))


def test_bytes_of_a_whole_vit_follow_the_block_formula():
    model, x = network(own_vit, dtype=torch.float32), images(own_vit, dtype=torch.float32)
    dense = C.bytes_per_example(model, x, list(model.parameters()))
    for mode in ("query", "qkv"):
        with P.apply_sbp(model, mode=mode):
            saved = dense - C.bytes_per_example(model, x, list(model.parameters()))
        formula = C.block_memory("vit", "dense", 17, 16, heads=2) - C.block_memory("vit", mode, 17, 16, 9, 2)
        assert saved == 2 * 4 * formula


def test_a_budget_is_met_with_as_little_as_possible():
    model, x = network(own_vit, dtype=torch.float32), images(own_vit, dtype=torch.float32)
    dense = C.bytes_per_example(model, x, list(model.parameters()))
    assert C.fit_budget(model, x, dense) == ({}, 1.0, dense, dense)
    found = C.fit_budget(model, x, 0.8 * dense, ratios=(0.5, 0.25))
    assert found.bytes <= 0.8 * dense and found.keep_ratio in (0.5, 0.25)
    few = C.fit_budget(model, x, 0.95 * dense, ratios=(0.5,))
    assert len(few.plan) == 1 and few.bytes <= 0.95 * dense
    assert not any("forward" in vars(m) for m in model.modules())
    with pytest.raises(ValueError, match="this plan reaches"): C.fit_budget(model, x, 0.1 * dense, ratios=(0.5, 0.25))
    with pytest.raises(ValueError, match="evaluation mode"): C.fit_budget(model.eval(), x, dense)


def test_budget_says_what_is_reached_when_a_grid_would_be_empty():
    model, x = P.ViT(16, 4, 3, embed_dim=48, depth=4), torch.randn(2, 3, 16, 16)
    with pytest.raises(ValueError, match="budget: 1 bytes per example; this plan reaches"): C.fit_budget(model, x, 1)
    with pytest.raises(ValueError, match="this plan reaches"): C.fit_budget(model, x, 1e5, ratios=())
    for wrong in (math.nan, 0, -1.0):
        with pytest.raises(ValueError, match="is not a positive number"): C.fit_budget(model, x, wrong)
    with torch.no_grad(): assert C.fit_budget(model, x, 1e9).dense > 1e5


@pytest.mark.parametrize("options", [dict(C=-4), dict(n=2.5), dict(heads=-3), dict(impl="hook"), dict(N=0)])
def test_block_memory_refuses_what_is_no_count(options):
    with pytest.raises(ValueError, match="are not counts|impl: 'hook'"):
        C.block_memory(**dict(kind="vit", mode="query", N=16, C=4) | options)



# Features ---------------------------------------------------------------------------------------------------------

@settings(deadline=None, max_examples=20)
@given(st.integers(3, 12), st.integers(1, 6), st.integers(0, 1000))
def test_cka_is_invariant_to_rotation_and_scale(n, d, seed):
    g = torch.Generator().manual_seed(seed)
    x, y = torch.randn(n, d, generator=g, dtype=F64), torch.randn(n, 2, 3, generator=g, dtype=F64)
    q, _ = torch.linalg.qr(torch.randn(d, d, generator=g, dtype=F64))
    value = C.linear_cka(x, y)
    assert 0 <= value <= 1 + 1e-12 and math.isclose(C.linear_cka(x, x), 1, rel_tol=1e-12)
    assert math.isclose(C.linear_cka(-2.5 * x @ q + 3, y), value, rel_tol=1e-9)
    centred = lambda t: t.flatten(1) - t.flatten(1).mean(0)
    a, b = centred(x), centred(y)
    classic = (b.mT @ a).square().sum() / ((a.mT @ a).norm() * (b.mT @ b).norm())
    assert math.isclose(value, classic.item(), rel_tol=1e-9)


def test_cka_needs_matching_features_that_vary():
    with pytest.raises(ValueError, match="3 and 4"): C.linear_cka(torch.ones(3, 2), torch.ones(4, 2))
    with pytest.raises(ValueError, match="vary"): C.linear_cka(torch.ones(3, 2), torch.randn(3, 2))
    with pytest.raises(ValueError, match="vary"): C.linear_cka(torch.full((5, 3), 0.1).double(), torch.randn(5, 3))
    with pytest.raises(ValueError, match="not finite"): C.linear_cka(torch.full((3, 2), math.nan), torch.randn(3, 2))


@every
def test_block_features(make):
    model, x = network(make), images(make)
    found = C.block_features(model, x)
    assert list(found) == [n for n, m in model.named_modules() if P._family(m)] and model.training
    assert all(len(f) == 2 for f in found.values()) and not any(m._forward_hooks for m in model.modules())


# Experiments ------------------------------------------------------------------------------------------------------

def test_methods_by_name():
    model = network(own_vit)
    assert C.sbp_method(model, "dense") is None
    for method in ("sbp", "unbiased", "patchdropout", "deletion", "checkpoint"):
        C.sbp_method(model, method, 0.5).remove()
        assert not any("forward" in vars(m) for m in model.modules())
    with pytest.raises(ValueError, match="method: 'nope'"): C.sbp_method(model, "nope")


def test_there_are_experiments(): assert NAMES == ["sbp-cifar", "sbp-digits", "sbp-memory", "sbp-similarity"]


@pytest.mark.parametrize("net", ["vit", "convnext"])
def test_small_networks_for_colour_images(net):
    model = C.cifar_network(net)
    assert model(torch.randn(2, 3, 32, 32)).shape == (2, 10)
    wide = [m.weight.std().item() for m in model.modules() if isinstance(m, nn.Linear)]
    assert min(wide) > 0.03, "PyTorch's own initial weights"
    with P.apply_sbp(model, mask="random") as handle: model(torch.randn(2, 3, 32, 32))
    assert handle.plan


@pytest.mark.parametrize("keep, kept", [(0.25, (48, 49, 50)), (0.75, (146, 147, 148))])
def test_stored_bytes_are_of_one_draw(keep, kept):
    """The phases of a grid on 14 × 14 patches keep different numbers; all passes of a measurement must see the same one."""
    runs = {str(r["case"]): 1e6 * r["result"]["float32"] for r in load_results(RESULTS / "sbp-memory.json")["runs"]}
    case = {"net": "ViT-Tiny", "method": "dense"}
    saved = (runs[str(case)] - runs[str(case | {"method": "sbp", "keep": keep})]) / (8 * 4)
    formula = {C.block_memory("vit", "dense", 197, 192, heads=3) - C.block_memory("vit", "query", 197, 192, 1 + n, 3) for n in kept}
    assert round(saved) in formula


@pytest.mark.parametrize("name", NAMES)
def test_stored_results_are_of_this_code(name):
    e, results = REGISTRY[name], load_results(RESULTS / f"{name}.json")
    assert results["fingerprint"] == fingerprint(e)
    stored = {str(sorted(r["case"].items())) for r in results["runs"]}
    assert stored == {str(sorted(c.items())) for c in e.cases}
