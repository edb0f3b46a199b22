"""Feedback alignment: layers, conversion, direct feedback, Kolen–Pollack, metrics."""
from datetime import timedelta
from collections import OrderedDict
from functools import partial
import copy
import io
import math
import subprocess
import sys
import warnings

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import altbp.feedback_alignment as fa
from altbp.backprop import angle, manual_mlp_gradients, mlp_init, relative_error

RANDOM = ("fa", "usf", "frsf", "brsf", "kp")
ALL = (*RANDOM, "dfa")
DDP = ("fa", "brsf", "kp", "dfa")
LAYERS = {  # class: (arguments, shape of one input)
    "Linear": ((6, 4), (6,)),
    "Conv1d": ((4, 6, 3, 2, 1), (4, 9)),
    "Conv2d": ((4, 6, (3, 2), (2, 1), (1, 0), 2, 2), (4, 9, 7)),
    "Conv3d": ((2, 3, 2), (2, 4, 3, 3)),
    "ConvTranspose1d": ((4, 6, 3, 2, 1, 1), (4, 5)),
    "ConvTranspose2d": ((4, 6, 3, 2, 1, 1, 2), (4, 5, 4)),
    "ConvTranspose3d": ((2, 3, 2), (2, 3, 2, 2)),
}


def pair(kind, rule, dtype=torch.float64, **options):
    """A layer of torch's and ours with the same parameters, and a batch."""
    args, shape = LAYERS[kind]
    plain = getattr(nn, kind)(*args, dtype=dtype, **options)
    ours = getattr(fa, kind)(*args, dtype=dtype, rule=rule, generator=1, **options)
    missing, unexpected = ours.load_state_dict(plain.state_dict(), strict=False)
    assert not unexpected and not any("weight" in k or "bias" in k for k in missing)
    return plain, ours, torch.randn(5, *shape, dtype=dtype, requires_grad=True)


def gradients(layer, x, g, W=None):
    """Gradients of sum(g * layer(x)) by x and the parameters; with the weight replaced by W if given."""
    old = layer.weight.data
    if W is not None:
        layer.weight.data = W
    out = torch.autograd.grad((g * layer(x)).sum(), [x, *layer.parameters()])
    layer.weight.data = old
    return out


def cnn(act=nn.ReLU):
    return nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), act(inplace=True), nn.MaxPool2d(2),
                         nn.Conv2d(8, 8, 3, stride=2, padding=1), act(), nn.Flatten(), nn.Linear(32, 4))


def batch(n=6, dtype=torch.float32):
    g = torch.Generator().manual_seed(7)
    return torch.randn(n, 3, 8, 8, generator=g, dtype=dtype), torch.randint(4, (n,), generator=g)


def grads(model, x, y):
    return torch.autograd.grad(F.cross_entropy(model(x), y), list(model.parameters()))


# The layers ---------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("kind", LAYERS)
@pytest.mark.parametrize("rule", RANDOM)
def test_layer_goes_up_as_torch_and_down_through_the_feedback(kind, rule):
    plain, ours, x = pair(kind, rule)
    torch.testing.assert_close(ours(x), plain(x), rtol=0, atol=0)
    g = torch.randn_like(plain(x))
    down, *rest = gradients(ours, x, g)
    B = ours.effective_feedback()
    exact, replaced = gradients(plain, x, g), gradients(plain, x, g, W=B)
    torch.testing.assert_close(down, replaced[0], rtol=1e-12, atol=1e-12)  # the delta uses B …
    for a, b in zip(rest, exact[1:]):                                     # … weights and bias do not
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)
    assert relative_error(down, exact[0]) > 0.1


@pytest.mark.parametrize("kind", LAYERS)
def test_feedback_equal_to_the_weight_is_backpropagation(kind):
    plain, ours, x = pair(kind, "fa")
    ours.feedback.copy_(ours.weight.detach())
    g = torch.randn_like(plain(x))
    for a, b in zip(gradients(ours, x, g), gradients(plain, x, g)):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


@settings(max_examples=25)
@given(st.integers(0, 4), st.integers(1, 5), st.integers(1, 5), st.lists(st.integers(1, 3), max_size=2), st.booleans())
def test_linear_of_any_shape(n, d_in, d_out, more, bias):
    layer = fa.Linear(d_in, d_out, bias=bias, generator=0, dtype=torch.float64)
    x = torch.randn(n, *more, d_in, dtype=torch.float64, requires_grad=True)
    out = layer(x)
    g = torch.randn_like(out)
    dx, dW = torch.autograd.grad(out, [x, layer.weight], g)
    torch.testing.assert_close(dx, g @ layer.feedback)
    torch.testing.assert_close(dW, torch.einsum("...o,...i->oi", g, x))


def test_single_examples_without_a_batch_dimension():
    for kind, (args, shape) in LAYERS.items():
        layer = getattr(fa, kind)(*args, generator=0)
        x = torch.randn(shape)
        torch.testing.assert_close(layer(x), layer(x[None])[0])


@settings(max_examples=25)
@given(st.sampled_from([1, 2, 3]), st.integers(1, 2), st.integers(1, 2), st.sampled_from([1, 2]),
       st.sampled_from([0, 1, "valid"]), st.sampled_from(["zeros", "circular", "reflect", "replicate"]))
def test_convolutions_of_any_kind_against_torch(space, stride, dilation, groups, padding, mode):
    args = (4, 6, 2, stride, padding, dilation, groups, True, mode)
    name = f"Conv{space}d"
    if mode == "reflect" and padding == "valid":
        return
    plain, ours = getattr(nn, name)(*args).double(), getattr(fa, name)(*args, generator=0).double()
    x = torch.randn(2, 4, *[5] * space, dtype=torch.float64, requires_grad=True)
    ours.load_state_dict(plain.state_dict() | {"feedback": plain.weight.detach().clone()})
    g = torch.randn_like(plain(x))
    for a, b in zip(gradients(ours, x, g), gradients(plain, x, g)):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)


def test_output_size_of_transposed_convolutions():
    layer = fa.ConvTranspose2d(2, 3, 3, stride=2, generator=0)
    assert layer(torch.ones(1, 2, 4, 4), output_size=[10, 9]).shape[2:] == (10, 9)


def test_gradients_of_gradients_are_those_of_the_backward_pass():
    layer = fa.Linear(3, 2, generator=0, dtype=torch.float64)
    x, g = (torch.randn(4, d, dtype=torch.float64, requires_grad=True) for d in (3, 2))
    assert torch.autograd.gradcheck(lambda g: torch.autograd.grad(layer(x), x, g, create_graph=True)[0], [g])
    conv = fa.Conv2d(2, 3, 3, generator=0, dtype=torch.float64)
    x = torch.randn(2, 2, 4, 4, dtype=torch.float64, requires_grad=True)
    g = torch.randn(2, 3, 2, 2, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda g: torch.autograd.grad(conv(x), conv.weight, g, create_graph=True)[0], [g])


def test_second_derivatives_go_through_the_feedback_as_documented():
    layer = fa.Linear(4, 3, generator=0, dtype=torch.float64)
    x = torch.randn(2, 4, dtype=torch.float64, requires_grad=True)
    first, = torch.autograd.grad((layer(x) ** 2).sum() / 2, x, create_graph=True)
    second, = torch.autograd.grad(first.sum(), x)
    B, W = layer.feedback, layer.weight.detach()
    torch.testing.assert_close(second, torch.ones(2, 4).double() @ B.T @ B)
    with fa.exact(layer):
        first, = torch.autograd.grad((layer(x) ** 2).sum() / 2, x, create_graph=True)
        true, = torch.autograd.grad(first.sum(), x)
    torch.testing.assert_close(true, torch.ones(2, 4).double() @ W.T @ W)


def test_feedback_has_the_spread_of_torchs_weights():
    W = torch.empty(400, 300)
    for init in ("uniform", "normal"):
        B = fa.draw_feedback(W, init=init, generator=torch.Generator().manual_seed(0))
        assert B.std().item() == pytest.approx(1 / math.sqrt(900), rel=0.01)
        assert abs(B.mean().item()) < 5 / math.sqrt(900 * B.numel())
    assert fa.draw_feedback(W, scale=3).abs().max() <= 3 / math.sqrt(300)
    assert nn.Linear(300, 400).weight.std().item() == pytest.approx(1 / math.sqrt(900), rel=0.01)


def test_zero_weights_have_zero_sign_feedback():
    W = torch.tensor([[1.0, 0.0, -2.0]])
    assert fa.backward_weight(W, torch.tensor(0.5), "sign").tolist() == [[0.5, 0.0, -0.5]]


def test_fresh_magnitudes_change_with_every_training_step_and_only_there():
    layer = fa.Linear(50, 40, rule="brsf", generator=0)
    x = torch.randn(2, 50)
    seen = []
    for _ in range(3):
        layer(x)
        seen.append(layer.effective_feedback())
    assert not torch.equal(seen[0], seen[1]) and not torch.equal(seen[1], seen[2])
    with torch.no_grad():
        layer(x)
    torch.testing.assert_close(layer.effective_feedback(), seen[2], rtol=0, atol=0)
    assert all(torch.equal(B.sign(), layer.weight.detach().sign()) for B in seen)


def test_backward_of_fresh_magnitudes_is_that_of_its_own_forward():
    layer = fa.Linear(5, 4, rule="brsf", generator=0)
    x = torch.randn(2, 5, requires_grad=True)
    first = layer(x)
    B = layer.effective_feedback()
    layer(x)  # a later call moves on to the next draw
    torch.testing.assert_close(torch.autograd.grad(first.sum(), x)[0], torch.ones(2, 4) @ B)


@pytest.mark.parametrize("law", ["uniform", "normal"])
def test_fresh_magnitudes_are_an_operator_that_torch_accepts(law):
    result = torch.library.opcheck(fa._operator, (torch.tensor(0.1), torch.tensor([3, 4]), [5, 4], law))
    assert result and set(result.values()) == {"SUCCESS"}


def test_the_module_may_be_loaded_again():
    """As when the cell that defines the operator is run twice, or the notebook beside the package."""
    code = """if True:
        import importlib, runpy, sys, torch, altbp.feedback_alignment as fa
        step = lambda fa: fa.Linear(3, 2, rule="brsf", generator=0)(torch.ones(4, 3, requires_grad=True)).sum().backward()
        step(fa)
        fa = importlib.reload(fa)
        step(fa)
        del sys.modules["altbp.feedback_alignment"]
        step(importlib.import_module("altbp.feedback_alignment"))
        again = runpy.run_module("altbp.feedback_alignment", run_name="__main__")
        step(__import__("types").SimpleNamespace(**again))
    """
    subprocess.run([sys.executable, "-W", "ignore", "-c", code], check=True, timeout=300)


def test_magnitudes_and_feedback_are_the_same_whatever_the_default_dtype():
    layers = []
    for dtype in (torch.float32, torch.float64):
        torch.set_default_dtype(dtype)
        try: layers.append(fa.Linear(3, 2, rule="brsf", generator=0, dtype=torch.float32))
        finally: torch.set_default_dtype(torch.float32)
    with torch.no_grad(): layers[1].weight.copy_(layers[0].weight)
    expected = layers[0].effective_feedback()
    torch.set_default_dtype(torch.float64)
    try: found, drawn = layers[1].effective_feedback(), fa.draw_feedback(layers[0].weight, generator=3)
    finally: torch.set_default_dtype(torch.float32)
    assert torch.equal(found, expected) and torch.equal(drawn, fa.draw_feedback(layers[0].weight, generator=3))


def test_the_operator_and_the_plain_draw_agree():
    args = torch.tensor(0.1), torch.tensor([3, 4]), [5, 4], "uniform"
    assert torch.equal(fa._operator(*args), fa._magnitudes(*args))


@pytest.mark.parametrize("rule", RANDOM)
def test_input_that_outlived_a_transform(rule):
    layer, kept = fa.Linear(3, 2, rule=rule, generator=0), []

    def f(x):
        kept.append(x.sin())
        return kept[0].sum()

    x = torch.randn(4, 3)
    torch.func.grad(f)(x)
    layer(kept[0]).sum().backward()
    torch.testing.assert_close(layer.weight.grad, x.sin().sum(0).expand(2, 3))
    torch.func.grad(lambda b: kept.append(b.cos()) or kept[1].sum())(layer.bias.detach())
    out = fa.fa_linear(x, layer.weight, layer.weight.detach(), kept[1])
    torch.testing.assert_close(out, F.linear(x, layer.weight, layer.bias.cos()))
    out.sum().backward()


@pytest.mark.parametrize("rule", RANDOM)
def test_a_symbolic_trace_sends_back_the_same(rule):
    net = fa.convert(nn.Sequential(nn.Conv2d(1, 2, 3), nn.ReLU(), nn.Flatten(), nn.Linear(18, 3)), rule, generator=0).eval()
    traced, x, y = torch.fx.symbolic_trace(net), torch.randn(2, 1, 5, 5), torch.tensor([0, 2])
    for a, b in zip(grads(net, x, y), grads(traced, x, y), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0)


@pytest.mark.parametrize("make, shape", [(fa.Linear, (4, 3)), (partial(fa.Conv2d, kernel_size=2), (4, 3, 5, 5))])
def test_layers_on_meta(make, shape):
    assert make(3, 2, device="meta")(torch.empty(shape, device="meta")).device.type == "meta"


def test_an_angle_to_zero_is_nan_and_the_others_are_measured():
    net = fa.convert(nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 2)), generator=0)
    with torch.no_grad(): net[2].weight.zero_()
    weights = fa.weight_alignment(net)
    assert math.isnan(weights["2"]) and 0 < weights["0"] < 180
    updates = fa.update_alignment(net, torch.randn(5, 4), torch.tensor([0, 1, 0, 1, 1]))
    assert math.isnan(updates["0.weight"]) and updates["2.weight"] < 1e-3


@pytest.mark.parametrize("rule", ["fa", "usf", "frsf", "bp"])
def test_kolen_pollack_leaves_layers_that_got_another_rule(rule):
    net = fa.convert(nn.Linear(2, 3), "kp", generator=0)
    optimizer = torch.optim.SGD(net.parameters(), 0.1, weight_decay=0.1)
    fa.kolen_pollack(net, optimizer)
    fa.convert(net, rule, inplace=True, generator=3)
    before = copy.deepcopy(net.feedback)
    net(torch.randn(4, 2)).sum().backward()
    optimizer.step()
    assert before is net.feedback is None or torch.equal(net.feedback, before)


# Bad input ------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("call, words", [
    (lambda: fa.Linear(3, 2)(torch.ones(4, 3, dtype=torch.int64)), "x: dtype torch.int64"),
    (lambda: fa.Linear(3, 2)(torch.ones(4, 5)), r"x: shape \(4, 5\) .* 3 columns"),
    (lambda: fa.Linear(3, 2)(torch.tensor(1.0)), r"x: shape \(\)"),
    (lambda: fa.fa_linear(torch.ones(4, 3), torch.ones(2, 3), torch.ones(3, 2)), r"\(3, 2\) is not the weight's \(2, 3\)"),
    (lambda: fa.fa_linear(torch.ones(4, 3), torch.ones(2, 3), torch.tensor(1.0)), r"feedback: shape \(\)"),
    (lambda: fa.fa_linear(torch.ones(4, 3), torch.ones(2, 3), torch.ones(2, 3), mode="x"), "mode: 'x'"),
    (lambda: fa.fa_linear(torch.ones(4, 3), torch.ones(2, 3), torch.tensor(1.0), mode="uniform"), "key: mode"),
    (lambda: fa.backward_weight(torch.ones(2, 3), torch.tensor(1.0), "normal"), "key: mode 'normal'"),
    (lambda: fa.fa_conv(torch.ones(1, 1, 4), torch.ones(1, 1, 2), torch.ones(1, 1, 2), stride=1.5), "stride: 1.5"),
    (lambda: fa.convert(nn.Linear(2, 2), init=""), "init: ''"),
    (lambda: fa.fa_linear(torch.ones(4, 3), torch.ones(2, 3), torch.ones(2, 3, requires_grad=True)), "requires grad"),
    (lambda: fa.Conv2d(3, 2, 3)(torch.ones(1, 4, 8, 8)), r"x: shape \(1, 4, 8, 8\)"),
    (lambda: fa.Conv2d(3, 2, 3)(torch.ones(1, 1, 3, 8, 8)), "2 dimensions of space"),
    (lambda: fa.Linear(3, 2, rule="x"), "rule: 'x' is not one of bp, fa, kp"),
    (lambda: fa.Linear(3, 2, init="x"), "init: 'x'"),
    (lambda: fa.Linear(3, 2, scale=-1.0), "scale: -1.0"),
    (lambda: fa.Linear(3, 2, scale=math.nan), "scale: nan"),
    (lambda: fa.convert(nn.Sequential(nn.ReLU())), "nothing to convert"),
    (lambda: fa.convert(nn.Linear(2, 2), "x"), "rule: 'x'"),
    (lambda: fa.convert(nn.Linear(2, 2), skip=["head"]), r"skip: no modules \['head'\]"),
    (lambda: fa.convert(nn.Sequential(nn.LazyLinear(2), nn.Linear(2, 2))), "lazy layers"),
    (lambda: fa.convert(nn.Sequential(nn.Linear(2, 2)), "dfa"), "example: rule 'dfa'"),
    (lambda: fa.convert(nn.Sequential(nn.Linear(2, 2)), "dfa", example=torch.ones(1, 2), skip=["0"]), "skip: rule 'dfa'"),
    (lambda: fa.convert(cnn(nn.ReLU)[:7], "dfa", example=torch.ones(1, 3, 8, 8))(torch.ones(1, 3, 12, 12)),
     r"x: a block returns \(8, 6, 6\) .* 128 features"),
    (lambda: fa.convert(nn.Linear(2, 2), "dfa", example=torch.ones(1, 2)), "blocks: needs an nn.Sequential, got Linear"),
    (lambda: fa.weight_alignment(nn.Linear(2, 2)), "no converted layer"),
    (lambda: fa.kolen_pollack(nn.Linear(2, 2), None), "no layer with the rule 'kp'"),
    (lambda: fa.fa_linear(torch.ones(4, 3), torch.ones(2, 3), None), "feedback: is None"),
    (lambda: fa.fa_linear(torch.ones(4, 3), torch.ones(2, 3), torch.ones(2, 3).double()), "feedback: dtype torch.float64"),
    (lambda: fa.fa_conv(torch.ones(1, 2, 5, 5), *torch.ones(2, 3, 2, 3, 3), padding="same"), "padding: 'same'"),
    (lambda: fa.fa_conv(torch.ones(1, 2, 5, 5), *torch.ones(2, 3, 2, 3, 3), stride=(1, 1, 1)), r"stride: \(1, 1, 1\)"),
    (lambda: fa.backward_weight(torch.ones(2, 3), torch.tensor(1.0), "foo", torch.tensor([1, 2])), "mode: 'foo'"),
    (lambda: fa.convert(nn.Sequential(nn.LazyLinear(3))), "lazy layers"),
    (lambda: fa.small_net("cnn", (1, 8, 8)), "kind: 'cnn'"),
])
def test_bad_input(call, words):
    with pytest.raises(ValueError, match=words):
        call()


def test_seeds_are_integers_of_any_kind():
    seed = np.int64(3)
    assert torch.equal(fa.Linear(4, 3, generator=seed).feedback, fa.Linear(4, 3, generator=3).feedback)
    with pytest.raises(TypeError, match="generator: float"):
        fa.Linear(4, 3, generator=3.0)


def test_a_refused_conversion_changes_nothing():
    model = nn.Sequential(nn.Linear(3, 3), nn.ReLU())
    for options in (dict(rule="x"), dict(scale=-1), dict(init="x"), dict(skip=["0"]), dict(skip=["y"])):
        with pytest.raises(ValueError):
            fa.convert(model, inplace=True, **options)
        assert type(model[0]) is nn.Linear and not list(model.buffers())


# Conversion -----------------------------------------------------------------------------------------------------------

class Residual(nn.Module):
    """A net as torchvision writes them: BatchNorm, a shortcut, in-place ReLU, one module used twice."""

    def __init__(self):
        super().__init__()
        self.conv1 = nn.Conv2d(3, 6, 3, padding=1, bias=False)
        self.bn1, self.bn2 = nn.BatchNorm2d(6), nn.BatchNorm2d(6)
        self.relu = nn.ReLU(inplace=True)
        self.twice = nn.Conv2d(6, 6, 3, padding=1, bias=False)
        self.down = nn.Sequential(nn.Conv2d(6, 8, 1, stride=2), nn.BatchNorm2d(8))
        self.fc = nn.Linear(8, 4)

    def forward(self, x):
        x = self.relu(self.bn1(self.conv1(x)))
        x = self.relu(self.bn2(self.twice(self.twice(x))) + x)
        return self.fc(self.down(x).mean((2, 3)))


@pytest.mark.parametrize("rule", RANDOM)
def test_converted_residual_net(rule):
    model, (x, y) = Residual(), batch()
    ours = fa.convert(model, rule, generator=0)
    assert [k for k, _ in ours.named_parameters()] == [k for k, _ in model.named_parameters()]
    assert {k: v.shape for k, v in ours.state_dict().items() if "feedback" not in k} == \
           {k: v.shape for k, v in model.state_dict().items()}
    torch.testing.assert_close(ours(x), model(x), rtol=0, atol=0)
    mine, true = (dict(zip(dict(m.named_parameters()), grads(m, x, y))) for m in (ours, model))
    torch.testing.assert_close(mine["fc.weight"], true["fc.weight"], rtol=0, atol=0)
    assert relative_error(mine["conv1.weight"], true["conv1.weight"]) > 0.1
    with fa.exact(ours):
        for a, b in zip(grads(ours, x, y), grads(model, x, y)):
            torch.testing.assert_close(a, b, rtol=0, atol=0)
    assert ours.fc.rule == rule


def test_convert_in_place_keeps_the_objects_that_others_hold():
    model = Residual()
    opt, parts = torch.optim.SGD(model.parameters(), 0.1), dict(model.named_modules())
    assert fa.convert(model, inplace=True) is model
    assert dict(model.named_modules()) == parts and opt.param_groups[0]["params"] == list(model.parameters())
    assert isinstance(model.twice, fa.Conv2d) and isinstance(model.twice, nn.Conv2d)


def test_convert_can_change_the_rule_and_skip_layers():
    model = fa.convert(Residual(), "fa", skip=["fc"])
    assert type(model.fc) is nn.Linear
    again = fa.convert(model, "brsf", generator=0)
    assert again.twice.rule == "brsf" and again.twice.feedback.dim() == 0 and model.twice.rule == "fa"


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)
        self.alias = self.b

    def forward(self, x):
        return self.b(self.a(x))


def test_skipping_a_container_skips_what_is_in_it():
    net = nn.Sequential(OrderedDict(body=Block(), head=nn.Linear(4, 2)))
    ours = fa.convert(net, skip=["body"])
    assert type(ours.body.a) is type(ours.body.b) is nn.Linear and type(ours.head) is fa.Linear
    ours = fa.convert(net, skip=["body.alias"])  # a module has as many names as it is used
    assert type(ours.body.b) is nn.Linear and type(ours.body.a) is fa.Linear
    with pytest.raises(ValueError, match="nothing to convert"):
        fa.convert(net, skip=["body", "head"])


def test_models_that_cannot_be_copied_are_named():
    net = nn.Sequential(nn.Linear(4, 3))
    net.cache = net(torch.ones(1, 4))  # not a leaf, as the weight of torch's old weight_norm
    with pytest.raises(ValueError, match="model: cannot be copied .* inplace=True"):
        fa.convert(net)
    assert type(fa.convert(net, inplace=True)[0]) is fa.Linear


def test_conversion_within_inference_mode_can_be_trained():
    plain = nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 2))
    with torch.inference_mode():
        model = fa.convert(plain, generator=0)
    model(torch.ones(2, 4)).sum().backward()
    assert model[0].weight.grad.any()


def test_convert_warns_of_what_it_leaves():
    model = nn.ModuleDict({"a": nn.MultiheadAttention(4, 2), "b": nn.Linear(4, 4), "c": nn.Embedding(3, 4)})
    with pytest.warns(UserWarning, match="left in MultiheadAttention, NonDynamicallyQuantizableLinear$"):
        fa.convert(model)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fa.convert(nn.Sequential(nn.Embedding(3, 4), nn.Linear(4, 4)))


def test_same_seed_same_feedback():
    a, b, c = (fa.convert(cnn(), generator=s) for s in (5, 5, 6))
    assert all(torch.equal(m.feedback, n.feedback) for m, n in zip(a, b) if hasattr(m, "feedback"))
    assert not torch.equal(a[0].feedback, c[0].feedback)
    layers = [m.feedback for m in a if hasattr(m, "feedback")]
    assert len({B.flatten()[0].item() for B in layers}) == len(layers)


@pytest.mark.parametrize("rule", ["fa", "frsf"])
def test_a_seed_shared_with_the_weights_gives_independent_feedback(rule):
    torch.manual_seed(5)
    layer = fa.convert(nn.Linear(300, 200), rule, generator=5)
    W, B = layer.weight.detach().abs(), layer.feedback.abs()
    assert abs(torch.corrcoef(torch.stack([W.flatten(), B.flatten()]))[0, 1]) < 5 / math.sqrt(W.numel())


def test_explicit_seed_leaves_the_global_generator_alone():
    state = torch.get_rng_state()
    fa.convert(fa.convert(nn.Linear(3, 3, device="meta").to_empty(device="cpu"), "brsf", generator=1), generator=2)
    assert torch.equal(torch.get_rng_state(), state)


# Robustness -----------------------------------------------------------------------------------------------------------

def made(rule, **options):
    x, y = batch()
    torch.manual_seed(3)
    return fa.convert(cnn(), rule, generator=0, example=x, **options), x, y


@pytest.mark.parametrize("rule", ALL)
def test_copies_have_the_same_gradients_to_the_bit(rule):
    model, x, y = made(rule)
    model(x)  # brsf: not at its first draw
    saved = io.BytesIO()
    torch.save(model.state_dict(), saved)
    saved.seek(0)
    other = fa.convert(cnn(), rule, generator=99, example=x)
    other.load_state_dict(torch.load(saved))
    whole = io.BytesIO()
    torch.save(model, whole)
    whole.seek(0)
    copies = [copy.deepcopy(model), other, torch.load(whole, weights_only=False), copy.deepcopy(model).to("cpu"),
              copy.deepcopy(model).to(torch.float64).to(torch.float32)]
    first = grads(model, x, y)
    for m in copies:
        assert all(torch.equal(a, b) for a, b in zip(grads(m, x, y), first))


@pytest.mark.parametrize("rule", ALL)
def test_bf16_autocast(rule):
    model, x, y = made(rule)
    full = grads(copy.deepcopy(model), x, y)
    with torch.autocast("cpu", torch.bfloat16):
        out = model(x)
        assert out.dtype == torch.bfloat16
        loss = F.cross_entropy(out, y)
    half = torch.autograd.grad(loss, list(model.parameters()))
    assert all(g.dtype == torch.float32 for g in half)
    assert angle(torch.cat([g.flatten() for g in half]), torch.cat([g.flatten() for g in full])) < 5
    assert angle(half[0], full[0]) < 12


@pytest.mark.parametrize("rule", ["fa", "usf", "brsf", "dfa"])
def test_compile_fullgraph(rule):
    model, x, y = made(rule)
    expected = grads(copy.deepcopy(model), x, y)
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    for a, b in zip(grads(compiled, x, y), expected):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("rule", ALL)
def test_torch_func_per_example_gradients(rule):
    model, x, y = made(rule)
    model.eval()
    params, buffers = dict(model.named_parameters()), dict(model.named_buffers())

    def loss(p, x, y):
        return F.cross_entropy(torch.func.functional_call(model, (p, buffers), (x[None],)), y[None])

    each = torch.func.vmap(torch.func.grad(loss), (None, 0, 0))(params, x, y)
    for i in range(len(x)):
        for a, b in zip(each.values(), grads(model, x[i:i + 1], y[i:i + 1])):
            torch.testing.assert_close(a[i], b, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("rule", ALL)
def test_torch_func_ensembles(rule):
    x, y = batch()
    x = x.flatten(1)[:, :6]
    make = lambda s: fa.convert(nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 4)), rule, generator=s, example=x)
    models = [make(s) for s in range(3)]
    params, buffers = torch.func.stack_module_state(models)
    call = lambda p, b: F.cross_entropy(torch.func.functional_call(models[0], (p, b), (x,)), y)
    with torch.no_grad():
        before = {k: v.clone() for k, v in buffers.items()}
    stacked = torch.func.vmap(torch.func.grad(call))(params, before)
    for i, m in enumerate(models):
        for a, b in zip(stacked.values(), grads(m, x, y)):
            torch.testing.assert_close(a[i], b, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("rule", ALL)
def test_empty_batches(rule):
    model, x, y = made(rule)
    model.eval()
    out = model(x[:0])
    assert out.shape == (0, 4)
    for g in torch.autograd.grad(out.sum(), list(model.parameters())):
        assert not g.any()


@pytest.mark.parametrize("rule", ALL)
def test_gradient_accumulation(rule):
    model, x, y = made(rule)
    model.eval()
    whole = grads(model, x, y)
    for half in (slice(0, 3), slice(3, 6)):
        (F.cross_entropy(model(x[half]), y[half]) / 2).backward()
    if rule != "brsf":  # in evaluation mode its draw stays, so it would agree as well; in training it must not
        for p, g in zip(model.parameters(), whole):
            torch.testing.assert_close(p.grad, g, rtol=1e-4, atol=1e-6)


def test_fresh_magnitudes_under_torch_func_in_training():
    layer = fa.Linear(4, 1, rule="brsf", generator=0)
    p, b = dict(layer.named_parameters()), {k: v.clone() for k, v in layer.named_buffers()}
    x = torch.randn(5, 4)
    call = lambda p, b, x: torch.func.functional_call(layer, (p, b), (x,)).sum()
    new = torch.func.grad(call)(p, b, x)  # the buffers are passed, and counted on
    assert torch.equal(new["weight"], x.sum(0)[None]) and not torch.equal(b["feedback_key"], layer.feedback_key)
    with pytest.raises(RuntimeError):  # as for BatchNorm: a captured buffer is not changed under a transform
        torch.func.vmap(torch.func.grad(lambda p, x: torch.func.functional_call(layer, p, (x,)).sum()), (None, 0))(p, x)


def test_gradient_checkpointing():
    model, x, y = made("fa")
    expected = grads(copy.deepcopy(model), x, y)
    out = torch.utils.checkpoint.checkpoint_sequential(model, 2, x, use_reentrant=False)
    for a, b in zip(torch.autograd.grad(F.cross_entropy(out, y), list(model.parameters())), expected):
        torch.testing.assert_close(a, b)


def _rank(rank, file, out):
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{file}", rank=rank, world_size=2,
                                         timeout=timedelta(seconds=120))
    results = {}
    for rule in DDP:
        torch.manual_seed(rank)  # ranks start out different: DDP must make weights and feedback agree
        x, y = batch(8)
        model = fa.convert(cnn(), rule, example=x)
        ddp = nn.parallel.DistributedDataParallel(model)
        opt = torch.optim.SGD(ddp.parameters(), 0.1, weight_decay=0.1)
        if rule == "kp":
            fa.kolen_pollack(model, opt)
        for _ in range(2):
            opt.zero_grad()
            F.cross_entropy(ddp(x[rank::2]), y[rank::2]).backward()
            opt.step()
        state = {k: v for k, v in model.state_dict().items() if "running" not in k}
        effective = {k: m.effective_feedback() for k, m in model.named_modules() if isinstance(m, fa.AlignedLayer)}
        results[rule] = {**state, **{f"effective {k}": v for k, v in effective.items()}}
    torch.save(results, f"{out}.{rank}")
    torch.distributed.barrier()  # none leaves while another waits for it
    torch.distributed.destroy_process_group()


def test_ddp_two_processes_agree(tmp_path):
    torch.multiprocessing.spawn(_rank, (str(tmp_path / "rendezvous"), str(tmp_path / "out")), nprocs=2)
    a, b = (torch.load(tmp_path / f"out.{r}") for r in (0, 1))
    for rule in DDP:
        assert any("feedback" in k for k in a[rule])
        for k, v in a[rule].items():
            assert torch.equal(v, b[rule][k]), (rule, k)


def _shard(rank, file):
    """Train beside a copy that one process holds whole; each process puts in half of the examples."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    torch.set_num_threads(1)
    torch.manual_seed(0)
    torch.distributed.init_process_group("gloo", init_method=f"file://{file}", rank=rank, world_size=2,
                                         timeout=timedelta(seconds=120))
    mesh, (x, y) = init_device_mesh("cpu", (2,)), batch(8)
    for rule in DDP:
        whole = fa.convert(cnn(), rule, generator=0, example=x)
        for layer in whole.modules():
            if isinstance(layer, nn.BatchNorm2d):
                layer.eval()  # else each process normalises by its own half
        split = copy.deepcopy(whole)
        for layer in [m for m in split.modules() if isinstance(m, (nn.Linear, nn.Conv2d))]:
            fully_shard(layer, mesh=mesh)
        fully_shard(split, mesh=mesh)
        for net, part in ((whole, slice(None)), (split, slice(rank, None, 2))):
            opt = torch.optim.SGD(net.parameters(), 0.1, weight_decay=0.1)
            if rule == "kp":
                fa.kolen_pollack(net, opt)
            for _ in range(2):
                opt.zero_grad()
                F.cross_entropy(net(x[part]), y[part]).backward()
                opt.step()
        for (k, p), q in zip(split.named_parameters(), whole.parameters()):
            torch.testing.assert_close(p.full_tensor(), q.detach(), msg=lambda m: f"{rule} {k}: {m}")
        for (k, b), c in zip(split.named_buffers(), whole.buffers()):
            torch.testing.assert_close(b, c, msg=lambda m: f"{rule} {k}: {m}")
    torch.distributed.barrier()  # none leaves while another waits for it
    torch.distributed.destroy_process_group()


def test_fsdp_two_processes_train_as_one(tmp_path):
    torch.multiprocessing.spawn(_shard, (str(tmp_path / "rendezvous"),), nprocs=2)


# Direct feedback ------------------------------------------------------------------------------------------------------

def test_direct_feedback_is_the_formula():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 6), nn.Tanh(), nn.Linear(6, 3)).double()
    x, y = torch.randn(9, 5).double(), torch.randint(3, (9,))
    model = fa.convert(net, "dfa", generator=0, example=x)
    h1 = net[1](net[0](x)); h2 = net[3](net[2](h1)); out = net[4](h2)
    q = (out.softmax(-1) - F.one_hot(y, 3)) / 9
    d2, d1 = (q @ model.feedback_1) * (1 - h2**2), (q @ model.feedback_0) * (1 - h1**2)
    expected = [d1.T @ x, d1.sum(0), d2.T @ h1, d2.sum(0), q.T @ h2, q.sum(0)]
    for a, b in zip(grads(model, x, y), expected):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


def test_direct_feedback_with_one_hidden_layer_is_feedback_alignment():
    params = mlp_init([5, 7, 3], generator=torch.Generator().manual_seed(0))
    x, y = torch.randn(9, 5).double(), torch.randint(3, (9,))
    net = nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 3)).double()
    with torch.no_grad():
        for p, v in zip(net.parameters(), sum(params, ())): p.copy_(v)
    model = fa.convert(net, "dfa", generator=0, example=x)
    _, manual = manual_mlp_gradients(params, x, y, feedback=[model.feedback_0])
    for a, b in zip(grads(model, x, y), sum(manual, ())):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


def test_direct_feedback_around_any_block():
    block = lambda i, o: nn.Sequential(nn.Conv2d(i, o, 3, padding=1), nn.BatchNorm2d(o), nn.ReLU(inplace=True))
    net = nn.Sequential(block(3, 4), nn.MaxPool2d(2), Residual_(4), nn.Dropout(0.5), nn.Flatten(), nn.Linear(64, 4))
    x, y = batch()
    model = fa.DirectFeedback(net, x, generator=0)
    assert model.names == [["0", "1"], ["2", "3", "4"], ["5"]]
    torch.manual_seed(0)
    F.cross_entropy(model(x), y).backward()
    torch.manual_seed(0)
    h1 = net[1](net[0](x)); h2 = net[4](net[3](net[2](h1.detach()))); out = net[5](h2.detach())
    q, = torch.autograd.grad(F.cross_entropy(out, y), out, retain_graph=True)
    expected = torch.autograd.grad([h1, h2, out], list(net.parameters()),
                                   [(q @ model.feedback_0).view_as(h1), q @ model.feedback_1, q])
    for p, g in zip(net.parameters(), expected):
        torch.testing.assert_close(p.grad, g)


class Residual_(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.conv = nn.Conv2d(c, c, 3, padding=1)

    def forward(self, x):
        return x + F.relu(self.conv(x))


def test_direct_feedback_keeps_names_modes_statistics_and_repeated_modules():
    relu = nn.ReLU()
    net = nn.Sequential(nn.Linear(3, 4), relu, nn.BatchNorm1d(4), nn.Linear(4, 4), relu, nn.Linear(4, 2))
    net[2].eval()
    model = fa.convert(net, "dfa", example=torch.randn(5, 3), generator=0)
    assert {k for k in model.state_dict() if "feedback_" not in k} == set(net.state_dict())
    assert not getattr(model, "2").training and getattr(model, "0").training
    assert getattr(model, "2").num_batches_tracked == 0
    torch.testing.assert_close(model(torch.ones(2, 3)), net(torch.ones(2, 3)))
    assert [len(n) for n in model.names] == [3, 2, 1]


def test_direct_feedback_of_one_number_an_example():
    net = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1), nn.Flatten(0))
    model = fa.convert(net, "dfa", example=torch.randn(5, 3), generator=0)
    x = torch.randn(5, 3)
    dW = torch.autograd.grad(model(x).sum(), getattr(model, "0").weight)[0]
    h = torch.tanh(net[0](x))
    torch.testing.assert_close(dW, ((torch.ones(5, 1) @ model.feedback_0) * (1 - h**2)).T @ x)


def test_direct_feedback_of_tokens():
    net = nn.Sequential(nn.Embedding(10, 4), nn.Flatten(), nn.Linear(12, 6), nn.ReLU(), nn.Linear(6, 2))
    x = torch.randint(10, (5, 3))
    model = fa.convert(net, "dfa", example=x, generator=0)
    assert all(b.dtype == torch.float32 and b.any() for b in model.buffers())
    F.cross_entropy(model(x), torch.zeros(5).long()).backward()
    assert all(p.grad.any() for p in model.parameters())


def test_direct_feedback_is_unwrapped_and_wraps_exact_layers():
    net, (x, y) = cnn(), batch()
    direct = fa.convert(fa.convert(net, "fa", generator=0), "dfa", example=x, generator=1)
    assert {m.rule for m in direct.modules() if hasattr(m, "rule")} == {"bp", "dfa"}
    reference = fa.convert(net, "dfa", example=x, generator=1)
    for a, b in zip(grads(direct, x, y), grads(reference, x, y)):
        torch.testing.assert_close(a, b)
    assert len(direct) == 8 and [type(m) for m in reference] == [type(m) for m in net]
    for rule in ("bp", "fa"):
        back = fa.convert(direct, rule, generator=0)
        assert type(back) is nn.Sequential and list(back.state_dict())[0] == "0.weight"
        true = grads(net if rule == "bp" else fa.convert(net, "fa", generator=0), x, y)
        for a, b in zip(grads(back, x, y), true):
            torch.testing.assert_close(a, b)
    again = fa.convert(direct, "dfa", example=x, generator=1)
    assert again is not direct and torch.equal(again.feedback_0, reference.feedback_0)
    with pytest.raises(ValueError, match="DirectFeedback inside"):
        fa.convert(nn.Sequential(direct, nn.Linear(4, 2)), "fa")


def test_direct_feedback_takes_both_laws():
    net, (x, _) = cnn(), batch()
    uniform = fa.convert(net, "dfa", example=x, generator=1, init="uniform")
    normal = fa.convert(net, "dfa", example=x, generator=1)
    N = normal.feedback_0.shape[1]
    assert uniform.feedback_0.abs().max() <= math.sqrt(3 / N) < normal.feedback_0.abs().max()
    assert uniform.feedback_0.std().item() == pytest.approx(1 / math.sqrt(N), rel=0.15)


@pytest.mark.parametrize("name", ["rule", "names", "forward", "training", "feedback_0", "items"])
def test_direct_feedback_refuses_names_of_its_own(name):
    net = nn.Sequential()
    net._modules.update({name: nn.Linear(4, 3), "out": nn.Linear(3, 2)})
    with pytest.raises(ValueError, match=f"names \\['{name}'\\] are those of DirectFeedback"):
        fa.DirectFeedback(net, torch.ones(1, 4))


@pytest.mark.parametrize("net, words", [
    (lambda: nn.Sequential(nn.ReLU()), "none has a weight matrix"),
    (lambda: nn.Sequential(nn.LSTM(4, 5), nn.Linear(5, 2)), "'0' returns a <class 'tuple'>"),
])
def test_direct_feedback_refuses_blocks_it_cannot_feed(net, words):
    net = net().train()
    with pytest.raises(ValueError, match=words):
        fa.convert(net, "dfa", example=torch.ones(1, 7, 4))
    assert net.training


@given(st.integers(2, 40), st.integers(1, 30))
@settings(max_examples=10)
def test_direct_feedback_deltas_do_not_grow_with_the_feature_count(d, k):
    net = nn.Sequential(nn.Linear(2, 100 * d), nn.Linear(100 * d, k))
    model = fa.DirectFeedback(net, torch.ones(1, 2), generator=0)
    raw = fa.DirectFeedback(net, torch.ones(1, 2), normalise=False, generator=0)
    norms = model.feedback_0.norm(dim=1)
    assert torch.all((norms - 1).abs() < 5 / math.sqrt(2 * 100 * d))
    torch.testing.assert_close(raw.feedback_0, model.feedback_0 * math.sqrt(100 * d))


# Kolen–Pollack --------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("make", [
    lambda p: torch.optim.SGD(p, 0.1, weight_decay=0.05),
    lambda p: torch.optim.SGD(p, 0.1, momentum=0.9, nesterov=True, weight_decay=0.05),
    lambda p: torch.optim.AdamW(p, 0.1, weight_decay=0.05),
])
def test_kolen_pollack_gap_shrinks_geometrically(make):
    model = fa.convert(nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 3)).double(), "kp", generator=0)
    opt = make(model.parameters())
    stop = fa.kolen_pollack(model, opt)
    gap = [m.feedback - m.weight.detach() for m in (model[0], model[2])]
    x, y = torch.randn(8, 4).double(), torch.randint(3, (8,))

    def step():
        opt.zero_grad()
        F.cross_entropy(model(x), y).backward()
        opt.step()

    for _ in range(40):
        step()
    for m, start in zip((model[0], model[2]), gap):
        torch.testing.assert_close(m.feedback - m.weight.detach(), start * (1 - 0.005) ** 40, rtol=1e-10, atol=1e-12)
    stop()
    B = model[0].feedback.clone()
    step()
    assert torch.equal(B, model[0].feedback)


def test_kolen_pollack_is_the_same_update_for_both():
    model = fa.convert(nn.Linear(4, 3).double(), "kp", generator=0)
    opt = torch.optim.SGD(model.parameters(), 0.2, weight_decay=0.1)
    fa.kolen_pollack(model, opt)
    W, B = model.weight.detach().clone(), model.feedback.clone()
    model(torch.randn(5, 4).double()).pow(2).sum().backward()
    G = model.weight.grad.clone()
    opt.step()
    torch.testing.assert_close(model.weight.detach(), W - 0.2 * (G + 0.1 * W))
    torch.testing.assert_close(model.feedback, B - 0.2 * (G + 0.1 * B))


def test_kolen_pollack_is_the_rule_as_written_for_both_synapses():
    model = fa.convert(nn.Linear(4, 3).double(), "kp", generator=0)
    opt = torch.optim.SGD(model.parameters(), 0.1, weight_decay=0.2)
    fa.kolen_pollack(model, opt)
    W, B = model.weight.detach().clone(), model.feedback.clone()
    for _ in range(30):
        opt.zero_grad()
        (model(torch.randn(5, 4).double()) - 1).tanh().pow(2).sum().backward()
        opt.step()
        W, B = W - 0.1 * (model.weight.grad + 0.2 * W), B - 0.1 * (model.weight.grad + 0.2 * B)
    torch.testing.assert_close(model.weight.detach(), W)
    torch.testing.assert_close(model.feedback, B)


def test_kolen_pollack_refuses_what_cannot_shrink_and_changes_nothing():
    model = fa.convert(nn.Linear(4, 3), "kp", generator=0)
    with pytest.raises(ValueError, match="lr × weight_decay = 2.0 is not below 1"):
        fa.kolen_pollack(model, torch.optim.SGD(model.parameters(), 2.0, weight_decay=1.0))
    with pytest.raises(ValueError, match="lacks the weights"):
        fa.kolen_pollack(model, torch.optim.SGD([model.bias], 0.1))
    opt = torch.optim.SGD(model.parameters(), 0.1, weight_decay=1.0)
    fa.kolen_pollack(model, opt)
    opt.param_groups[0]["lr"] = 1.5
    before = {k: v.clone() for k, v in model.state_dict().items()}
    model(torch.ones(1, 4)).sum().backward()
    with pytest.raises(ValueError, match="is not below 1"):
        opt.step()
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


# Measures -------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("rule", ALL)
def test_update_alignment_against_two_models_and_no_trace(rule):
    model, x, y = made(rule)
    plain = copy.deepcopy(cnn())
    plain.load_state_dict({k: v for k, v in model.state_dict().items() if "feedback" not in k})
    state = {k: v.clone() for k, v in model.state_dict().items()}
    rng = torch.get_rng_state()
    found = fa.update_alignment(model, x, y)
    assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())
    assert torch.equal(rng, torch.get_rng_state()) and all(p.grad is None for p in model.parameters())
    ours = dict(zip(dict(model.named_parameters()), grads(model, x, y)))
    true = dict(zip(dict(plain.named_parameters()), grads(plain, x, y)))
    assert list(found) == ["0.weight", "4.weight", "7.weight"]
    for k, degrees in found.items():
        assert degrees == pytest.approx(angle(ours[k], true[k]), abs=1e-4)
    assert found["7.weight"] < 1e-3


class Unused(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.unused, self.c = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 2)

    def forward(self, x):
        return self.c(self.a(x).relu())


def test_update_alignment_of_what_gets_gradients():
    model, x, y = fa.convert(Unused(), generator=0), torch.randn(6, 4), torch.randint(2, (6,))
    found = fa.update_alignment(model, x, y)
    assert list(found) == ["a.weight", "c.weight"]
    with torch.no_grad():
        assert fa.update_alignment(model, x, y) == found
    with pytest.raises(ValueError, match="no converted layer"):
        fa.update_alignment(Unused(), x, y)
    with pytest.raises(ValueError, match="no weight matrix of it requires a gradient"):
        fa.update_alignment(model.requires_grad_(False), x, y)


def test_dropout_is_the_same_in_both_passes():
    model = fa.convert(nn.Sequential(nn.Linear(5, 8), nn.Dropout(0.5), nn.Linear(8, 3)), "bp")
    x, y = torch.randn(6, 5), torch.randint(3, (6,))
    assert max(fa.update_alignment(model, x, y).values()) < 1e-3


def test_exact_restores_the_rules_after_an_error():
    model, x, y = made("frsf")
    with pytest.raises(ZeroDivisionError), fa.exact(model):
        1 / 0
    assert model[0].rule == "frsf"


# BioTorch's fifteen defects (at commit 74fad0d), each with what holds here ------------------------------------------------

@pytest.mark.parametrize("rule", RANDOM)
def test_biotorch_01_constrained_weights_still_train(rule):
    layer = fa.Linear(6, 5, rule=rule, generator=0)
    nn.utils.parametrizations.weight_norm(layer)
    start, opt = layer.weight.detach().clone(), torch.optim.SGD(layer.parameters(), 0.1)
    for _ in range(5):
        opt.zero_grad()
        layer(torch.ones(2, 6)).pow(2).sum().backward()
        opt.step()
    assert not torch.allclose(start, layer.weight)
    plain = fa.Linear(6, 5, rule=rule, generator=0)
    W = plain.weight
    plain(torch.ones(2, 6)).sum().backward()
    assert plain.weight is W, "the weight is never rebound"


@pytest.mark.parametrize("init", ["uniform", "normal"])
@pytest.mark.parametrize("rule", RANDOM)
def test_biotorch_02_every_rule_takes_every_init(rule, init):
    for layer in (fa.Linear(30, 20, rule=rule, init=init), fa.Conv2d(3, 4, 3, rule=rule, init=init)):
        x = torch.randn(2, 30) if isinstance(layer, nn.Linear) else torch.randn(2, 3, 5, 5)
        layer(x.requires_grad_()).sum().backward()
        assert torch.isfinite(x.grad).all()


@pytest.mark.parametrize("rule, degrees", [("usf", 30.0), ("frsf", 41.41), ("brsf", 41.41), ("fa", 90.0)])
def test_biotorch_03_angles_are_those_of_the_effective_feedback(rule, degrees):
    layer = fa.Linear(300, 300, rule=rule, generator=0)
    x = torch.zeros(1, 300, requires_grad=True)
    rows = torch.autograd.functional.jacobian(layer, x)[0, :, 0]  # what backward really uses
    assert angle(layer.weight, rows) == pytest.approx(fa.weight_alignment(layer)[""], abs=1e-3)
    assert angle(layer.weight, rows) == pytest.approx(degrees, abs=0.7)


@pytest.mark.parametrize("rule", RANDOM)
def test_biotorch_04_three_dimensions_and_a_single_output(rule):
    layer = fa.Linear(6, 1, rule=rule, generator=0)
    x = torch.randn(2, 3, 6, requires_grad=True)
    layer(x).sum().backward()
    assert x.grad.shape == x.shape and layer.bias.grad.item() == 6


@pytest.mark.filterwarnings("ignore:Using padding='same'")
@pytest.mark.parametrize("options", [dict(padding="same"), dict(padding=1, padding_mode="circular"),
                                     dict(padding="same", padding_mode="circular", dilation=2)])
def test_biotorch_05_same_padding_and_padding_modes(options):
    for size in (2, 3):
        plain, ours = nn.Conv2d(2, 3, size, **options), fa.Conv2d(2, 3, size, **options)
        ours.load_state_dict(plain.state_dict() | {"feedback": plain.weight.detach()})
        x = torch.randn(2, 2, 6, 6, requires_grad=True)
        g = torch.randn_like(plain(x))
        torch.testing.assert_close(ours(x), plain(x))
        for a, b in zip(gradients(ours, x, g), gradients(plain, x, g)):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("rule", RANDOM)
def test_biotorch_06_autocast_casts_layers(rule):
    for layer, x in ((fa.Linear(4, 3, rule=rule), torch.randn(2, 4)), (fa.Conv2d(4, 3, 3, rule=rule), torch.randn(2, 4, 5, 5))):
        with torch.autocast("cpu", torch.bfloat16):
            out = layer(x.requires_grad_())
        out.sum().backward()
        assert out.dtype == torch.bfloat16 and x.grad.dtype == layer.weight.grad.dtype == torch.float32


def test_biotorch_07_direct_feedback_with_groups_and_default_options():
    net = nn.Sequential(nn.Conv2d(4, 4, 3, groups=2), nn.ReLU(), nn.Flatten(), nn.Linear(36, 3))
    x, y = torch.randn(2, 4, 5, 5), torch.tensor([0, 1])
    model = fa.convert(net, "dfa", example=x)
    assert all(torch.isfinite(g).all() for g in grads(model, x, y))


@pytest.mark.parametrize("rule", RANDOM)
def test_biotorch_08_a_single_layer_is_converted(rule):
    assert type(fa.convert(nn.Linear(3, 2), rule)) is fa.Linear
    assert type(fa.convert(nn.Conv1d(3, 2, 1), rule)) is fa.Conv1d


def test_biotorch_09_sign_feedback_is_right_before_the_first_forward():
    torch.manual_seed(0)
    model = fa.convert(nn.Sequential(nn.Linear(200, 200)), "usf")
    assert fa.weight_alignment(model)["0"] == pytest.approx(30, abs=0.5)
    with torch.no_grad():
        model[0].weight.mul_(-1)
    assert fa.weight_alignment(model)["0"] == pytest.approx(30, abs=0.5)


def test_biotorch_10_layers_share_no_configuration():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 8), nn.Linear(8, 4))
    skip = ["2"]
    ours = fa.convert(model, "usf", skip=skip)
    assert skip == ["2"] and ours[0].feedback is not ours[1].feedback
    ours[0].set_feedback("fa", 2.0)
    assert ours[1].rule == "usf" and ours[1].feedback.dim() == 0


@pytest.mark.parametrize("rule", RANDOM)
def test_biotorch_11_compile_and_vmap(rule):
    layer = fa.Linear(4, 3, rule=rule, generator=0).eval()
    x = torch.randn(5, 4, requires_grad=True)
    torch._dynamo.reset()
    torch.compile(layer, fullgraph=True, backend="aot_eager")(x).sum().backward()
    one = torch.func.vmap(torch.func.grad(lambda x: layer(x).sum()))(x.detach())
    torch.testing.assert_close(x.grad, one)


@pytest.mark.parametrize("rule", ALL)
def test_biotorch_12_feedback_is_no_parameter(rule):
    model, *_ = made(rule)
    assert sum(p.numel() for p in model.parameters()) == sum(p.numel() for p in cnn().parameters())
    assert any("feedback" in k for k in model.state_dict())


@pytest.mark.parametrize("rule", RANDOM)
def test_biotorch_13_nothing_is_stored_for_the_bias(rule):
    extra = fa.Linear(4, 3, rule=rule).state_dict().keys() - {"weight", "bias"}
    assert extra == {"feedback"} | ({"feedback_key"} if rule == "brsf" else set())


def test_biotorch_14_evaluation_draws_nothing():
    model, x, y = made("brsf")
    model(x)
    model.eval()
    first, state = grads(model, x, y), torch.get_rng_state()
    assert all(torch.equal(a, b) for a, b in zip(grads(model, x, y), first))
    assert torch.equal(torch.get_rng_state(), state)


def test_biotorch_15_measures_hide_no_error():
    model, x, y = made("fa")
    model[0].feedback.fill_(math.nan)
    with pytest.raises(ValueError, match="needs finite entries"):
        fa.weight_alignment(model)

    def interrupted(out, y):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fa.update_alignment(model, x, y, interrupted)
