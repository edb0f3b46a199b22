"""Tests of altbp.stochastic_backprop_practice on networks of torchvision, timm and its own, against autograd with masked gradients."""
import copy
import datetime
import pickle
import subprocess
import sys
from functools import partial
from itertools import product

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import altbp.stochastic_backprop_practice as P
from altbp.training import fit, seeded
from altbp.zoo import library

F64 = torch.float64


def tv_vit():
    return library("torchvision.models").VisionTransformer(32, 8, 3, 2, 16, 32, num_classes=5)


def tv_convnext():
    c = library("torchvision.models.convnext")
    return c.ConvNeXt([c.CNBlockConfig(8, 12, 1), c.CNBlockConfig(12, None, 1)], layer_scale=1.0, num_classes=5)


def timm_vit(**options):
    make = library("timm").models.vision_transformer.VisionTransformer
    return make(img_size=32, patch_size=8, embed_dim=16, depth=3, num_heads=2, num_classes=5, **options)


def timm_convnext(**options):
    make = library("timm").models.convnext.ConvNeXt
    return make(depths=(1, 1, 3, 1), dims=(4, 8, 12, 16), num_classes=5, ls_init_value=1.0, **options)


def own_vit():
    return P.ViT(32, 8, 3, 5, embed_dim=16, depth=3, num_heads=2)


def own_convnext():
    return P.ConvNeXt(3, 5, dims=(8, 12), depths=(1, 1), patch_size=4)


VITS, CONVNEXTS = (tv_vit, timm_vit, own_vit), (tv_convnext, timm_convnext, own_convnext)
NETS = VITS + CONVNEXTS
every = pytest.mark.parametrize("make", NETS, ids=lambda f: f.__name__)


def network(make, seed=0, dtype=F64):
    """A network in training mode whose weights are all different from zero."""
    model = seeded(make, seed, dtype=dtype).train()
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            p += 0.1 * torch.randn(p.shape, generator=g, dtype=dtype)
    return model


def images(make, n=2, seed=1, dtype=F64):
    side = 128 if make is timm_convnext else 32
    return torch.randn(n, 3, side, side, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def gradients(model, x, y=None):
    """Logits and all gradients of a loss."""
    out = model(x)
    y = torch.arange(len(x)) % out.shape[1] if y is None else y
    return out, torch.autograd.grad(F.cross_entropy(out, y), list(model.parameters()))


def error(a, b):
    """Largest relative distance over pairs of tensors."""
    return max(((s - t).norm() / t.norm().clamp(min=1e-300)).item() for s, t in zip(a, b, strict=True))


class MaskGrad(torch.autograd.Function):
    """The definition: values pass, gradients are multiplied by a weight."""

    @staticmethod
    def forward(ctx, x, weight):
        ctx.weight = weight
        return x.clone()

    @staticmethod
    def backward(ctx, g):
        return g * ctx.weight, None


# The networks -----------------------------------------------------------------------------------------------------

def test_our_networks_fit_timms_parameters():
    for ours, theirs, x in ((own_vit, timm_vit, images(own_vit)), (
            lambda: P.ConvNeXt(3, 5, dims=(4, 8, 12, 16), depths=(1, 1, 3, 1), patch_size=4), timm_convnext, images(timm_convnext))):
        a, b = network(ours).eval(), network(theirs, 1).eval()
        b.load_state_dict(a.state_dict())
        assert torch.allclose(a(x), b(x), atol=1e-12)


def test_bad_networks():
    with pytest.raises(ValueError, match="patch_size: 3"): P.ViT(8, 3)
    with pytest.raises(ValueError, match="patch_size"): P.ViT(8, 2, embed_dim=10, num_heads=3)
    with pytest.raises(ValueError, match="dims"): P.ConvNeXt(dims=(8, 8), depths=(1, 1))
    with pytest.raises(ValueError, match="dims"): P.ConvNeXt(dims=(8,), depths=(1, 1))


# apply_sbp --------------------------------------------------------------------------------------------------------

@every
def test_nothing_changes_but_the_training_pass(make):
    model, x = network(make), images(make)
    keys, modules = list(model.state_dict()), [type(m) for m in model.modules()]
    dense, grads = gradients(model, x)
    state = torch.get_rng_state()
    handle = P.apply_sbp(model)
    assert list(model.state_dict()) == keys and [type(m) for m in model.modules()] == modules
    out, sparse = gradients(model, x)
    assert torch.allclose(out, dense, rtol=1e-12) and error(sparse, grads) > 1e-3
    assert torch.equal(torch.get_rng_state(), state) and model.training
    handle.enabled = False
    for context in (lambda: None, lambda: setattr(handle, "enabled", True) or setattr(handle, "keep_ratio", 1.0)):
        context()
        again, same = gradients(model, x)
        assert torch.equal(again, dense) and all(map(torch.equal, same, grads))
    handle.keep_ratio = 0.5
    with handle.dense():
        assert torch.equal(model(x), dense)
    assert handle.enabled
    handle.remove()
    handle.remove()
    again, same = gradients(model, x)
    assert torch.equal(again, dense) and all(map(torch.equal, same, grads))
    assert not any("forward" in vars(m) for m in model.modules()) and not model._forward_pre_hooks


@every
@pytest.mark.parametrize("mode", P.MODES)
def test_evaluation_is_dense_bit_for_bit(make, mode):
    model, x = network(make).eval(), images(make)
    dense, grads = gradients(model, x)
    with P.apply_sbp(model, mode=mode, mask="random") as handle:
        model.train()
        assert torch.allclose(model(x), dense, rtol=1e-12) == (mode != "qkv" or make in CONVNEXTS)
        model.eval()
        out, same = gradients(model, x)
        assert torch.equal(out, dense) and all(map(torch.equal, same, grads))
        assert handle.last_masks


def patch_mask(mask, prefix):
    return torch.cat([torch.ones(prefix, dtype=torch.bool), mask.flatten()])


@pytest.mark.parametrize("shared, rescale", [(True, False), (False, False), (False, True)])
@pytest.mark.parametrize("impl", P.IMPLEMENTATIONS)
def test_a_vit_has_the_gradient_of_the_definition(shared, rescale, impl):
    model, x = network(timm_vit), images(timm_vit)
    with P.apply_sbp(model, shared=shared, rescale=rescale, impl=impl, mask="random", keep_ratio=0.25) as handle:
        out, sparse = gradients(model, x)
        masks = handle.last_masks
    assert list(masks) == [f"blocks.{i}.{op}" for i in (1, 2) for op in ("attn", "mlp")]
    assert len({tuple(m.flatten().tolist()) for m in masks.values()}) == (1 if shared else 4)
    hooks = []
    for name, mask in masks.items():
        assert mask.shape == (4, 4) and mask.sum() == 4
        weight = torch.cat([torch.ones(1, dtype=F64), mask.flatten() * (4.0 if rescale else 1.0)])[:, None]
        block = model.get_submodule(name.rpartition(".")[0])
        part = block.attn.norm if name.endswith("attn") else block.mlp  # an Identity before the projection
        hooks.append(part.register_forward_hook(lambda m, a, y, w=weight: MaskGrad.apply(y, w)))
    for b in model.blocks: b.attn.fused_attn = False
    _, definition = gradients(model, x)
    assert error(sparse, definition) < 1e-11


@pytest.mark.parametrize("make, where", [(timm_convnext, "drop_path"), (tv_convnext, "stochastic_depth")])
def test_a_convnext_has_the_gradient_of_the_definition(make, where):
    model, x = network(make), images(make)
    plan = {n: r for n, r in P.paper_plan(model).items() if r == "block"}
    with P.apply_sbp(model, plan, mask="random") as handle:
        _, sparse = gradients(model, x)
        masks = handle.last_masks
    for name, mask in masks.items():
        part = getattr(model.get_submodule(name.removesuffix(".mlp")), where)
        part.register_forward_hook(lambda m, a, y, w=mask.double(): MaskGrad.apply(y, w))
    _, definition = gradients(model, x)
    assert len(masks) == (4 if make is timm_convnext else 2) and error(sparse, definition) < 1e-11


def test_torchvisions_vit_does_what_ours_does():
    theirs, ours, x = network(tv_vit), own_vit().double(), images(tv_vit)
    names = {"class_token": "cls_token", "encoder.pos_embedding": "pos_embed", "conv_proj.": "patch_embed.proj.",
             "encoder.layers.encoder_layer_": "blocks.", "encoder.ln.": "norm.", "heads.head.": "head.", "ln_1": "norm1",
             "ln_2": "norm2", "self_attention.in_proj_": "attn.qkv.", "self_attention.out_proj": "attn.proj",
             "mlp.0": "mlp.fc1", "mlp.3": "mlp.fc2"}
    def rename(key):
        for a, b in names.items(): key = key.replace(a, b)
        return key
    own = copy.deepcopy(ours)
    own.blocks = nn.Sequential(*(P.ViTBlock(16, 2) for _ in range(3)))
    for b in own.blocks: b.mlp = P.Mlp(16, 2.0)
    own.double().train().load_state_dict({rename(k): v for k, v in theirs.state_dict().items()})
    order = [rename(n) for n, _ in theirs.named_parameters()]
    for options in (dict(), dict(mode="qkv"), dict(mode="head"), dict(mode="query_detach_kv"), dict(shared=False, rescale=True)):
        with P.apply_sbp(theirs, seed=3, **options), P.apply_sbp(own, seed=3, **options):
            a, grads = gradients(theirs, x)
            b, same = gradients(own, x)
        same = dict(zip([n for n, _ in own.named_parameters()], same))
        assert torch.allclose(a, b, rtol=1e-12) and error(grads, [same[n] for n in order]) < 1e-11


@pytest.mark.parametrize("make", [tv_convnext, timm_convnext, own_convnext], ids=lambda f: f.__name__)
def test_downsampling_has_the_gradient_of_the_definition(make):
    model, x = network(make), images(make)
    plan = {n: r for n, r in P.paper_plan(model).items() if r == "downsample"}
    with P.apply_sbp(model, plan) as handle:
        _, sparse = gradients(model, x)
        masks = handle.last_masks
    assert len(masks) == (2 if make is timm_convnext else 1)
    for name, mask in masks.items():
        model.get_submodule(name).register_forward_hook(lambda m, a, y, w=mask.double(): MaskGrad.apply(y, w))
    assert error(sparse, gradients(model, x)[1]) < 1e-11


def test_the_tokens_rule_on_any_module():
    class Mixer(nn.Module):
        def __init__(self):
            super().__init__()
            self.mix, self.body = nn.Linear(6, 6, bias=False), nn.Sequential(nn.LayerNorm(4), nn.Linear(4, 4), nn.GELU())

        def forward(self, x): return x + self.body(self.mix(x.mT).mT.unflatten(1, (2, 3))).flatten(1, 2)

    model, x = Mixer().double(), torch.randn(3, 6, 4, dtype=F64)
    with P.apply_sbp(model, {"body": "tokens"}, mask="random", n_prefix=0) as handle:
        loss = model(x).square().sum()
        grads = torch.autograd.grad(loss, list(model.parameters()))
        mask = handle.last_masks["body"]
    assert mask.shape == (2, 3) and mask.sum() == 3
    model.body.register_forward_hook(lambda m, a, y: MaskGrad.apply(y, mask.double()[..., None]))
    assert error(grads, torch.autograd.grad(model(x).square().sum(), list(model.parameters()))) < 1e-12


def test_masks_of_one_call_agree_across_resolutions():
    model, x = network(timm_convnext), images(timm_convnext)
    with P.apply_sbp(model, mask="random") as handle:
        model(x)
        masks = handle.last_masks
        fine, coarse = masks["stages.0.blocks.0.mlp"], masks["stages.2.blocks.0.mlp"]
        assert fine.shape == (32, 32) and coarse.shape == (8, 8)
        assert torch.equal(fine, coarse.repeat_interleave(4, 0).repeat_interleave(4, 1))
        small = torch.randn(2, 3, 64, 64, dtype=F64)
        model(small)
        assert handle.last_masks["stages.2.blocks.0.mlp"].shape == (4, 4)


def test_masks_change_with_calls_and_can_be_held():
    model, x = network(own_vit), images(own_vit)
    with P.apply_sbp(model, mask="random") as handle:
        draws = [gradients(model, x)[1] for _ in range(2)]
        assert error(*draws) > 1e-3
        held = handle.last_masks
        with handle.masks(held):
            assert all(map(torch.equal, gradients(model, x)[1], draws[1]))
        with handle.masks({k: ~m for k, m in held.items()}):
            assert error(gradients(model, x)[1], draws[1]) > 1e-3
        assert handle.fixed is None
        state = handle.state_dict()
        a = gradients(model, x)[1]
        handle.load_state_dict(state)
        assert all(map(torch.equal, gradients(model, x)[1], a))
        with pytest.raises(ValueError, match="blocks.1.attn needs a mask of"), handle.masks({}): model(x)


@pytest.mark.parametrize("twin", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
@pytest.mark.parametrize("mode", ["query", "head"])
def test_copies_draw_for_themselves(twin, mode):
    model, x = network(own_vit), images(own_vit)
    handle = P.apply_sbp(model, mode=mode, mask="random")
    model(x)
    other = twin(model)
    a, b = gradients(model, x)[1], gradients(other, x)[1]
    assert all(map(torch.equal, a, b))
    handle.remove()
    assert "forward" in vars(other.blocks[2]) and "forward" not in vars(model.blocks[2])
    assert error(gradients(other, x)[1], gradients(model, x)[1]) > 1e-3


def test_a_run_that_fails_leaves_the_model_usable():
    model, x = network(own_vit), images(own_vit)
    handle = P.apply_sbp(model)
    with pytest.raises(RuntimeError): model(x[:, :2])
    assert model.training and not handle.probing
    model(x)
    with pytest.raises(RuntimeError, match="no masks"):
        with P.apply_sbp(twin := network(own_vit)): twin.blocks(torch.randn(2, 17, 16, dtype=F64))
    handle.remove()
    with pytest.raises(ZeroDivisionError), P.apply_sbp(model): 1 / 0
    assert not any("forward" in vars(m) for m in model.modules())


@pytest.mark.parametrize("make", [own_vit, timm_convnext], ids=lambda f: f.__name__)
def test_a_trial_run_that_fails_is_repeated(make):
    model, x = network(make), images(make)
    handle = P.apply_sbp(model)
    out, masks = model(x), handle.last_masks
    with pytest.raises(RuntimeError): model(x[..., :6, :6])
    assert torch.allclose(model(x), out, rtol=1e-11) and {k: m.shape for k, m in handle.last_masks.items()} == {k: m.shape for k, m in masks.items()}


def test_a_second_remove_leaves_what_came_later():
    model, x = network(own_vit), images(own_vit)
    first = P.checkpoint_blocks(model)
    first.remove()
    with P.apply_sbp(model) as handle:
        first.remove()
        assert all("forward" in vars(s.module) for s in handle.sites)
        sparse = gradients(model, x)[1]
    assert error(sparse, gradients(model, x)[1]) > 1e-3


@pytest.mark.parametrize("modes", [("query", "head"), ("head", "query")])
def test_a_state_of_another_mode_is_refused(modes):
    one, other = (P.apply_sbp(network(own_vit), mode=m) for m in modes)
    with pytest.raises(ValueError, match="state: .*needs"): other.load_state_dict(one.state_dict())


def test_options_that_do_not_fit():
    model = network(timm_vit)
    for error_type, match, options in (
            (ValueError, "keep_ratio", dict(keep_ratio=0.0)), (ValueError, "keep_ratio", dict(keep_ratio=1.5)),
            (TypeError, "keep_ratio", dict(keep_ratio="a")), (ValueError, "mask", dict(mask="nope")),
            (ValueError, "mode", dict(mode="kv")), (ValueError, "impl", dict(impl="fast")),
            (ValueError, "rescale", dict(mode="qkv", rescale=True)), (ValueError, "rescale", dict(mode="query_detach_kv", rescale=True)),
            (ValueError, "plan: no module", dict(plan={"nope.*": "block"})), (ValueError, "plan: 'x'", dict(plan={"blocks.0": "x"})),
            (ValueError, "plan: expected a dictionary", dict(plan=["blocks.0"])), (ValueError, "plan: expected", dict(plan={})),
            (ValueError, "does not fit blocks.0.mlp", dict(plan={"blocks.0.mlp": "block"})),
            (ValueError, "does not fit blocks.0", dict(plan={"blocks.0": "tokens"})),
            (ValueError, "does not fit patch_embed", dict(plan={"patch_embed": "downsample"})),
            (ValueError, "named twice", dict(plan={"blocks.0": "mlp", "blocks.*": "mlp"}))):
        with pytest.raises(error_type, match=match): P.apply_sbp(model, **options)
        assert not any("forward" in vars(m) for m in model.modules()) and not model._forward_pre_hooks
    handle = P.apply_sbp(model)
    with pytest.raises(ValueError, match="already replaced"): P.apply_sbp(model)
    with pytest.raises(ValueError, match="keep_ratio"): handle.keep_ratio = 0
    handle.keep_ratio = 0.4
    with pytest.raises(ValueError, match="0.4"): model(images(timm_vit))
    handle.remove()
    with pytest.raises(ValueError, match="no known block"): P.apply_sbp(nn.Linear(2, 2))


def test_modules_that_join_positions_are_refused():
    grn = timm_convnext(use_grn=True)
    with pytest.raises(TypeError, match="GlobalResponseNorm"): P.apply_sbp(grn)
    net = nn.Sequential(nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4)))
    with pytest.raises(TypeError, match="BatchNorm1d"): P.apply_sbp(net, {"0": "tokens"}, n_prefix=0)
    for options in (dict(attn_drop_rate=0.1), dict(scale_attn_norm=True)):
        with pytest.raises(ValueError, match="blocks.1"): P.apply_sbp(timm_vit(**options))
    P.apply_sbp(timm_vit(attn_drop_rate=0.1), {"blocks.*": "mlp"})
    net, x = network(own_vit), images(own_vit)
    with P.apply_sbp(net, {"blocks.1.attn": "tokens"}), pytest.raises(TypeError, match="blocks.1.attn: Attention joins positions"): net(x)
    for dtype in (F64, torch.float32, torch.bfloat16):
        with P.apply_sbp(net.to(dtype), {"blocks.1.mlp": "tokens"}): net(x.to(dtype))
    class Other(P.ViTBlock): pass
    net = nn.Sequential(Other(4, 2))
    with pytest.raises(ValueError, match="does not fit"): P.apply_sbp(net, {"0": "block"})


@pytest.mark.parametrize("options", [dict(reg_tokens=2), dict(qk_norm=True), dict(init_values=0.1), dict(global_pool="avg"),
                                     dict(class_token=False, global_pool="avg"), dict(drop_path_rate=0.1), dict(qkv_bias=False)],
                         ids=lambda o: next(iter(o)))
def test_variants_of_timms_vit(options):
    model, x = network(partial(timm_vit, **options)), images(timm_vit)
    torch.manual_seed(0)
    dense = model(x)
    with P.apply_sbp(model) as handle:
        torch.manual_seed(0)
        assert torch.allclose(model(x), dense, rtol=1e-11)
        assert handle.last_masks["blocks.1.mlp"].shape == (4, 4)
        ks = handle.sets["blocks.1.mlp"]
        prefix = model.num_prefix_tokens
        assert ks.keep[:prefix].tolist() == list(range(prefix)) and (ks.prob[:prefix] == 1).all()


def test_timm_convnext_with_1x1_convolutions():
    model, x = network(partial(timm_convnext, conv_mlp=True)), images(timm_convnext)
    dense, _ = gradients(model, x)
    with P.apply_sbp(model, mask="random"):
        assert torch.allclose(model(x), dense, rtol=1e-11)


@pytest.mark.parametrize("make", VITS, ids=lambda f: f.__name__)
def test_a_network_inside_another_keeps_its_class_token(make):
    model, x = network(make), images(make)
    whole = nn.Sequential(nn.Identity(), model)
    with P.apply_sbp(whole) as handle:
        whole(x)
        assert all(ks.keep[0] == 0 and len(ks.inverse) == 17 for ks in handle.sets.values())
    with P.drop_tokens(whole, 0.5):
        assert whole(x).shape == (2, 5)


def test_timms_own_checkpointing_meets_the_same_masks():
    model, x = network(timm_vit), images(timm_vit)
    with P.apply_sbp(model, shared=False, mask="random") as handle:
        state = handle.state_dict()
        plain = gradients(model, x)[1]
        model.set_grad_checkpointing()
        handle.load_state_dict(state)
        assert all(map(torch.equal, gradients(model, x)[1], plain))


def test_images_that_are_not_square():
    model = network(partial(timm_vit, dynamic_img_size=True))
    x = torch.randn(2, 3, 32, 64, dtype=F64)
    with P.apply_sbp(model, mask="random"), pytest.raises(ValueError, match="grid: 32 tokens"): model(x)
    with P.apply_sbp(model, grid=(4, 8)) as handle:
        model(x)
        assert handle.last_masks["blocks.1.mlp"].shape == (4, 8)


def test_autocast_and_accumulation_and_frozen_weights():
    model, x = network(own_vit, dtype=torch.float32), images(own_vit, dtype=torch.float32)
    model.patch_embed.requires_grad_(False)
    with P.apply_sbp(model) as handle:
        with torch.autocast("cpu", torch.bfloat16): out = model(x)
        out.float().square().sum().backward()
        assert out.dtype == torch.bfloat16 and model.blocks[2].mlp.fc1.weight.grad.abs().sum() > 0
        model.zero_grad()
        parts = []
        for z in (x[:1], x[1:]):
            with handle.masks(handle.last_masks):
                model(z).square().sum().backward()
        parts = [p.grad.clone() for p in model.parameters() if p.grad is not None]
        model.zero_grad()
        with handle.masks(handle.last_masks): model(x).square().sum().backward()
        assert error(parts, [p.grad for p in model.parameters() if p.grad is not None]) < 1e-4


# Plans ------------------------------------------------------------------------------------------------------------

def test_plans_of_the_paper():
    with torch.device("meta"):
        timm = library("timm")
        vit, tiny = timm.create_model("vit_tiny_patch16_224"), timm.create_model("convnext_tiny")
        base, tv = timm.create_model("convnext_base"), library("torchvision.models").convnext_tiny()
    assert list(P.paper_plan(vit)) == [f"blocks.{i}" for i in range(4, 12)]
    blocks = [f"stages.{s}.blocks.{i}" for s, n in enumerate((3, 3, 6)) for i in range(n)]
    assert list(P.paper_plan(tiny)) == blocks + ["stages.1.downsample", "stages.2.downsample"]
    assert len(P.paper_plan(base)) == 3 + 3 + 21 + 2
    assert list(P.paper_plan(tv)) == [f"features.{s}.{i}" for s, n in ((1, 3), (3, 3), (5, 6)) for i in range(n)] + ["features.2", "features.4"]


@given(st.lists(st.sampled_from(["a", "b1", "b2"]), min_size=1, max_size=3), st.lists(st.sampled_from(["*", "b?", "a", "b[12]"]), min_size=1, max_size=3))
def test_patterns_stay_between_dots(name, pattern):
    fits = {"*": lambda s: True, "b?": lambda s: s[0] == "b", "a": lambda s: s == "a", "b[12]": lambda s: s[0] == "b"}
    expected = len(name) == len(pattern) and all(fits[p](s) for s, p in zip(name, pattern))
    assert P._like(".".join(name), ".".join(pattern)) == expected


# Baselines --------------------------------------------------------------------------------------------------------

@every
def test_checkpointing_changes_no_gradient(make):
    model, x = network(make), images(make)
    out, grads = gradients(model, x)
    with P.checkpoint_blocks(model):
        again, same = gradients(model, x)
    assert torch.equal(out, again) and all(map(torch.equal, grads, same))
    assert not any("forward" in vars(m) for m in model.modules())


@pytest.mark.parametrize("make", VITS, ids=lambda f: f.__name__)
def test_the_released_vit_is_token_deletion(make):
    model, x = network(make), images(make)
    kind = type(model.blocks[0] if hasattr(model, "blocks") else model.encoder.layers[0])
    names = [n for n, m in model.named_modules() if type(m) is kind]
    for first in (0, 1):
        with P.apply_sbp(model, dict.fromkeys(names[first:], "block"), mode="qkv", seed=5):
            out, grads = gradients(model, x)
        with P.drop_tokens(model, 0.5, first, mask="grid", seed=5):
            again, same = gradients(model, x)
            assert model.eval()(x).shape == (2, 5) and model.train()
        assert torch.allclose(out, again, atol=1e-12) and error(same, grads) < 1e-10
    with P.apply_sbp(model, dict.fromkeys(names[1:], "block"), mode="query", seed=5):
        assert not torch.allclose(model(x), again, atol=1e-4)


def test_deletion_is_for_training_only():
    model, x = network(own_vit), images(own_vit)
    dense = model.eval()(x)
    with P.drop_tokens(model, 0.25) as handle:
        assert torch.equal(model(x), dense)
        assert not torch.allclose(model.train()(x), dense, atol=1e-4)
        handle.source.keep_ratio = 1.0
        assert torch.equal(model(x), dense)
    with pytest.raises(ValueError, match="at: 3"): P.drop_tokens(model, 0.5, 3)
    with pytest.raises(ValueError, match="keep_ratio"): P.drop_tokens(model, 0)


# Gradients and features -------------------------------------------------------------------------------------------

def test_independent_masks_and_reweighting_are_unbiased():
    model, x = network(lambda: P.ViT(4, 2, 1, 3, 8, 2, 2)), torch.randn(3, 1, 4, 4, dtype=F64)
    loss = lambda: F.cross_entropy(model(x), torch.tensor([0, 1, 2]))
    phases = [torch.tensor([[True, False], [False, True]]), torch.tensor([[False, True], [True, False]])]
    ops = [f"blocks.{i}.{op}" for i in (0, 1) for op in ("attn", "mlp")]
    every = [dict(zip(ops, c)) for c in product(phases, repeat=4)]
    for rescale, unbiased in ((True, True), (False, False)):
        with P.apply_sbp(model, {"blocks.*": "block"}, shared=False, rescale=rescale) as handle:
            report = P.gradient_report(model, handle, loss, masks=every)
        assert set(report) == {"patch_embed", "cls_token", "pos_embed", "blocks.0", "blocks.1", "norm", "head"}
        assert (max(r["bias"] for r in report.values()) < 1e-12) == unbiased


def test_the_last_block_is_exact_when_the_head_reads_the_class_token():
    model, x = network(own_vit), images(own_vit)
    loss = lambda: F.cross_entropy(model(x), torch.tensor([0, 1]))
    for mode, exact in (("query", True), ("qkv", False)):
        with P.apply_sbp(model, {"blocks.2": "block"}, mode=mode, mask="random") as handle:
            report = P.gradient_report(model, handle, loss, draws=4)
        assert all((r["bias"] + r["std"] < 1e-12) == exact for k, r in report.items() if k != "head")
    pooled = network(partial(timm_vit, global_pool="avg"))
    loss = lambda: F.cross_entropy(pooled(x), torch.tensor([0, 1]))
    with P.apply_sbp(pooled, {"blocks.2": "block"}, mask="random") as handle:
        assert P.gradient_report(pooled, handle, loss, draws=4)["blocks.2"]["std"] > 1e-2


def test_a_report_needs_enough_draws():
    model, x = network(own_vit), images(own_vit)
    loss = lambda: F.cross_entropy(model(x), torch.tensor([0, 1]))
    with P.apply_sbp(model, {"blocks.2": "mlp"}) as handle:
        for draws in (0, 1):
            with pytest.raises(ValueError, match=f"draws: .* got {draws}"): P.gradient_report(model, handle, loss, draws)
        with pytest.raises(ValueError, match="masks"): P.gradient_report(model, handle, loss, masks=[])
        one = P.gradient_report(model, handle, loss, masks=[{"blocks.2.mlp": torch.ones(4, 4, dtype=torch.bool)}])
        assert all(r["std"] == 0 for r in one.values())


def test_the_report_takes_noise_off_the_bias():
    torch.manual_seed(0)
    dense = torch.randn(50, dtype=F64)
    runs = dense + 3 * torch.randn(4000, 50, dtype=F64)
    free, raw = P._compare(dense, runs, False), P._compare(dense, runs, True)
    assert free["bias"] < 0.5 * raw["bias"] and abs(free["std"] * dense.norm() / (3 * 50**0.5) - 1) < 0.02
    same = P._compare(dense, dense.expand(3, 50), False)
    assert same["std"] < 1e-12 and abs(same["cosine"] - 1) < 1e-12 and abs(same["norm_ratio"] - 1) < 1e-12


# Training, resuming, compiling, DDP -------------------------------------------------------------------------------

@pytest.mark.parametrize("make", [tv_vit, tv_convnext], ids=lambda f: f.__name__)
def test_a_resumed_run_draws_the_same_masks(make, tmp_path):
    x = torch.rand(48, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    y = (x.mean((1, 2, 3)) > x.mean()).long()
    def run(epochs, file=None):
        model = seeded(make, 0)
        handle = P.apply_sbp(model, mask="random")
        adam = partial(torch.optim.AdamW, lr=3e-3)
        history = fit(model, (x, y), epochs, adam, batch_size=16, metrics=lambda m: {}, checkpoint=file, also={"sbp": handle})
        return model, history, handle.last_masks
    whole, history, masks = run(2)
    run(1, tmp_path / "fit.pt")
    resumed, again, same = run(2, tmp_path / "fit.pt")
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), resumed.parameters(), strict=True))
    assert history["loss"] == again["loss"] and all(torch.equal(masks[k], same[k]) for k in masks)
    assert sum(history["loss"][-3:]) < sum(history["loss"][:3])


@pytest.mark.parametrize("make", [tv_vit, tv_convnext], ids=lambda f: f.__name__)
def test_compiled_networks_have_the_same_gradients(make):
    torch._dynamo.reset()
    model, x = network(make, dtype=torch.float32), images(make, dtype=torch.float32)
    handle = P.apply_sbp(model, seed=1)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    for _ in range(2):
        state = handle.state_dict()
        out, grads = gradients(compiled, x)
        handle.load_state_dict(state)
        plain, same = gradients(model, x)
        assert torch.allclose(out, plain, atol=1e-6) and error(grads, same) < 1e-4
    dense = model.eval()(x)
    assert torch.allclose(compiled.eval()(x), dense, atol=1e-6)
    torch._dynamo.reset()


def test_the_import_does_not_load_the_compiler():
    code = "import sys, altbp.stochastic_backprop_practice; sys.exit('torch._dynamo' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def ddp_worker(rank, file, out):
    import torch.distributed as dist

    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{file}", rank=rank, world_size=2, timeout=datetime.timedelta(seconds=120))
    result = []
    for make in (tv_vit, tv_convnext):
        model = network(make)
        handle = P.apply_sbp(model, mask="random", seed=4)
        ddp = nn.parallel.DistributedDataParallel(model)
        opt = torch.optim.SGD(ddp.parameters(), lr=0.1)
        for step in range(3):
            opt.zero_grad()
            F.cross_entropy(ddp(images(make, seed=10 * step + rank)), torch.tensor([0, 1])).backward()
            if step == 0: first = [p.grad.clone() for p in model.parameters()], handle.last_masks
            opt.step()
        result.append((*first, [p.detach() for p in model.parameters()]))
    torch.save(result, f"{out}{rank}.pt")
    dist.barrier()  # none leaves while another waits for it
    dist.destroy_process_group()


def test_two_processes(tmp_path):
    import torch.multiprocessing as mp

    mp.spawn(ddp_worker, (tmp_path / "rendezvous", str(tmp_path / "out")), 2)
    a, b = (torch.load(tmp_path / f"out{r}.pt") for r in (0, 1))
    for make, (grads, masks, weights), (_, other, same) in zip((tv_vit, tv_convnext), a, b):
        assert all(map(torch.equal, weights, same))
        assert any(not torch.equal(masks[k], other[k]) for k in masks), "each rank draws its own masks"
        model = network(make)
        with P.apply_sbp(model, mask="random") as handle:
            parts = []
            for rank, m in enumerate((masks, other)):
                with handle.masks(m): parts.append(gradients(model, images(make, seed=rank), torch.tensor([0, 1]))[1])
        assert error(grads, [(s + t) / 2 for s, t in zip(*parts)]) < 1e-10
