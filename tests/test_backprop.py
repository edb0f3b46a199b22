"""altbp.backprop against autograd, brute force and closed forms."""
import gc
import math
import weakref

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from altbp import backprop as bp

F64 = torch.float64
small = st.integers(1, 6)
seeds = st.integers(0, 2**31)


def randn(seed):
    gen = torch.Generator().manual_seed(seed)
    return lambda *shape: torch.randn(*shape, dtype=F64, generator=gen)


def close(ours, theirs, tol=1e-11):
    for a, b in zip(ours, theirs, strict=True):
        assert a.shape == b.shape
        torch.testing.assert_close(a, b, rtol=tol, atol=tol)


def vjp(f, g, *inputs):
    leaves = [x.clone().requires_grad_() for x in inputs]
    return torch.autograd.grad(f(*leaves), leaves, g)


# Layers -----------------------------------------------------------------------------------------------------------

@given(seeds, small, small, small)
def test_linear(seed, n, d_in, d_out):
    r = randn(seed)
    x, W, b, g = r(n, d_in), r(d_out, d_in), r(d_out), r(n, d_out)
    close(bp.linear_backward(g, x, W), vjp(F.linear, g, x, W, b))


@settings(max_examples=60)
@given(seeds, st.integers(1, 3), st.integers(1, 3), st.integers(1, 3), st.integers(0, 2), st.integers(0, 6), st.integers(0, 6))
def test_conv2d(seed, kh, kw, stride, padding, extra_h, extra_w):
    r = randn(seed)
    x, W = r(2, 3, kh + extra_h, kw + extra_w), r(2, 3, kh, kw)
    f = lambda x, W: F.conv2d(x, W, stride=stride, padding=padding)
    g = r(*f(x, W).shape)
    close(bp.conv2d_backward(g, x, W, stride, padding), vjp(f, g, x, W))


def test_conv2d_by_its_definition():
    r = randn(0)
    x, W, g = r(1, 1, 5, 4), r(1, 1, 2, 3), r(1, 1, 4, 2)
    dx, dW = bp.conv2d_backward(g, x, W)
    for a in range(2):
        for b in range(3):
            torch.testing.assert_close(dW[0, 0, a, b], (g[0, 0] * x[0, 0, a : a + 4, b : b + 2]).sum())
    want = torch.zeros(5, 4, dtype=F64)
    for i in range(4):
        for j in range(2):
            want[i : i + 2, j : j + 3] += g[0, 0, i, j] * W[0, 0]
    torch.testing.assert_close(dx[0, 0], want)


@given(seeds, small, st.integers(1, 7))
def test_softmax_cross_entropy(seed, n, c):
    z, y = randn(seed)(n, c), torch.randint(c, (n,), generator=torch.Generator().manual_seed(seed))
    close([bp.softmax_cross_entropy_backward(z, y)], vjp(lambda z: F.cross_entropy(z, y), None, z))


def test_softmax_cross_entropy_with_huge_logits():
    z = torch.tensor([[1e4, 0.0, -1e4]], dtype=F64)
    close([bp.softmax_cross_entropy_backward(z, torch.tensor([1]))], [torch.tensor([[1.0, -1.0, 0.0]], dtype=F64)])


@given(seeds, small, st.integers(2, 7), st.sampled_from([1e-5, 1e-2, 1.0]))
def test_layer_norm(seed, n, d, eps):
    r = randn(seed)
    x, w, b, g = r(n, d), r(d), r(d), r(n, d)
    close(bp.layer_norm_backward(g, x, w, eps), vjp(lambda x, w, b: F.layer_norm(x, (d,), w, b, eps), g, x, w, b), 1e-8)


@given(seeds, small, small, small, small, st.sampled_from([(), (2,), (2, 3)]))
def test_attention(seed, n, m, d, dv, batch):
    r = randn(seed)
    Q, K, V, g = r(*batch, n, d), r(*batch, m, d), r(*batch, m, dv), r(*batch, n, dv)
    f = lambda Q, K, V: (Q @ K.mT / math.sqrt(d)).softmax(-1) @ V
    close(bp.attention_backward(g, Q, K, V), vjp(f, g, Q, K, V))


@pytest.mark.parametrize("name", bp.ACTIVATIONS)
def test_slopes(name):
    phi, slope = bp.ACTIVATIONS[name]
    z = torch.tensor([-40.0, -3.0, -1e-8, 0.0, 1e-8, 0.5, 40.0], dtype=F64)
    close([slope(z)], vjp(phi, torch.ones_like(z), z))


# Networks ---------------------------------------------------------------------------------------------------------

@given(seeds, st.lists(small, min_size=2, max_size=6), small, st.sampled_from(list(bp.ACTIVATIONS)),
       st.sampled_from(["gaussian", "orthogonal"]))
def test_manual_gradients(seed, sizes, n, activation, init):
    r, gen = randn(seed), torch.Generator().manual_seed(seed)
    params = [(W, r(len(b))) for W, b in bp.mlp_init(sizes, init, generator=gen)]
    x, y = r(n, sizes[0]), torch.randint(sizes[-1], (n,), generator=gen)
    loss, grads = bp.manual_mlp_gradients(params, x, y, activation)

    def forward(*flat):
        h = x
        for i in range(0, len(flat), 2):
            h = F.linear(h if i == 0 else bp.ACTIVATIONS[activation][0](h), flat[i], flat[i + 1])
        return F.cross_entropy(h, y)

    flat = [p for layer in params for p in layer]
    torch.testing.assert_close(loss, forward(*flat))
    close([g for layer in grads for g in layer], vjp(forward, None, *flat))


def test_manual_gradients_in_float32():
    params = bp.mlp_init([5, 4, 3], dtype=torch.float32, generator=torch.Generator().manual_seed(0))
    _, grads = bp.manual_mlp_gradients(params, torch.ones(2, 5), torch.tensor([0, 2]))
    assert all(g.dtype == torch.float32 for layer in grads for g in layer)


def test_feedback_equal_to_the_weights_is_backpropagation_and_other_feedback_is_linear():
    r, gen = randn(1), torch.Generator().manual_seed(1)
    params = bp.mlp_init([4, 6, 5, 3], generator=gen)
    x, y = r(7, 4), torch.randint(3, (7,), generator=gen)
    run = lambda feedback: bp.manual_mlp_gradients(params, x, y, feedback=feedback)[1]
    same = [W for W, _ in params[1:]]
    close([g for l in run(same) for g in l], [g for l in run(None) for g in l], 0)
    B = [r(5, 6), r(3, 5)]
    doubled = run([B[0], 2 * B[1]])
    close([doubled[1][0]], [2 * run(B)[1][0]])
    torch.testing.assert_close(doubled[2][0], run(None)[2][0])


@pytest.mark.parametrize("sizes", [(3, 8), (8, 3), (5, 5)])
def test_orthogonal_init(sizes):
    (W, b), = bp.mlp_init(sizes, "orthogonal", generator=torch.Generator().manual_seed(0))
    small_side = W.T @ W if W.shape[0] > W.shape[1] else W @ W.T
    torch.testing.assert_close(small_side, torch.eye(min(sizes), dtype=F64))
    assert not b.any()


def test_init_is_seeded_and_leaves_the_global_generator_alone():
    before = torch.random.get_rng_state()
    a, b = (bp.mlp_init([50, 400], generator=torch.Generator().manual_seed(3)) for _ in range(2))
    assert torch.equal(a[0][0], b[0][0]) and torch.equal(before, torch.random.get_rng_state())
    assert abs(a[0][0].var().item() * 50 - 1) < 5 * (2 / 20000) ** 0.5  # five standard errors


@pytest.mark.parametrize("call, word", [
    (lambda: bp.mlp_init([3]), "sizes"), (lambda: bp.mlp_init([3, 0]), "sizes"),
    (lambda: bp.mlp_init([3, 2], "he"), "init"),
    (lambda: bp.mlp_forward([], torch.ones(1, 1), "swish"), "activation"),
    (lambda: bp.manual_mlp_gradients(bp.mlp_init([3, 2, 2]), torch.ones(1, 3).double(), torch.tensor([0]),
                                     feedback=[torch.ones(3, 2)]), "feedback"),
])
def test_errors_name_the_argument(call, word):
    with pytest.raises(ValueError, match=word):
        call()


# Measures ---------------------------------------------------------------------------------------------------------

@given(seeds, st.integers(2, 30), st.floats(1e-6, math.pi - 1e-6), st.floats(1e-200, 1e200), st.floats(1e-200, 1e200))
def test_angle_at_every_scale(seed, d, theta, s, t):
    u, w = torch.linalg.qr(randn(seed)(d, 2))[0].T
    v = math.cos(theta) * u + math.sin(theta) * w
    assert bp.angle(s * u, t * v, degrees=False) == pytest.approx(theta, rel=1e-8)


@given(seeds, st.integers(1, 30))
def test_angle_of_parallel_and_opposite(seed, d):
    u = randn(seed)(d)
    assert bp.angle(u, 3 * u) < 1e-6 and bp.angle(u, -u) == pytest.approx(180, abs=1e-6)
    assert bp.angle(u, u.float().double()) < 1e-5


def test_angle_reads_any_shape_and_type():
    u = torch.ones(2, 3, requires_grad=True)
    assert bp.angle(u, torch.ones(6, dtype=torch.bfloat16)) == 0
    assert bp.angle(torch.tensor([1, 0]), torch.tensor([0, 5])) == pytest.approx(90)


@pytest.mark.parametrize("u, v, word", [
    (torch.zeros(3), torch.ones(3), "u: needs"), (torch.ones(3), torch.tensor([1.0, math.nan, 0]), "v: needs"),
    (torch.ones(3), torch.tensor([1.0, math.inf, 0]), "v: needs"), (torch.ones(3), torch.ones(4), "entries"),
    (torch.ones(0), torch.ones(0), "u: needs"),
])
def test_angle_errors(u, v, word):
    with pytest.raises(ValueError, match=word):
        bp.angle(u, v)


@pytest.mark.parametrize("e", [torch.full((100,), 1e-25), torch.full((100,), 1e19), torch.full((10000,), 1000.0).half(),
                               torch.full((4,), 1e-200, dtype=F64), torch.full((4,), 1e300, dtype=F64),
                               torch.tensor([1, 2, 3])])
def test_relative_error_at_every_scale(e):
    assert bp.relative_error(2 * e, e) == pytest.approx(1) and bp.relative_error(e, e) == 0


def test_relative_error_of_nan_is_nan():
    nan = torch.tensor([math.nan])
    for a, e in [(nan, torch.ones(1)), (torch.ones(1), nan), (nan, torch.zeros(1))]:
        assert math.isnan(bp.relative_error(a, e))


@pytest.mark.parametrize("call, word", [
    (lambda: bp.linear_backward(torch.ones(2, 3, 4), torch.ones(2, 3, 5), torch.ones(4, 5)), "g: expected 2"),
    (lambda: bp.layer_norm_backward(torch.ones(2, 3, 4), torch.ones(2, 3, 4), torch.ones(4)), "g: expected 2"),
    (lambda: bp.softmax_cross_entropy_backward(torch.ones(4, 3), torch.tensor([0])), "y: 1 labels"),
    (lambda: bp.softmax_cross_entropy_backward(torch.ones(4, 3), torch.tensor(0)), "y: expected 1"),
    (lambda: bp.conv2d_backward(torch.ones(1, 2, 2, 2), torch.ones(1, 2, 3, 3), torch.ones(2, 1, 2, 2)), "W:"),
    (lambda: bp.attention_backward(torch.ones(2, 5, 4), torch.ones(2, 5, 3), torch.ones(6, 3), torch.ones(6, 4)), "Q, K, V"),
    (lambda: bp.mlp_deltas(bp.mlp_init([2, 2, 2]), [torch.ones(1, 2)], torch.ones(1, 2)), "zs"),
    (lambda: bp.mlp_deltas(bp.mlp_init([2, 2]), [torch.ones(1, 2)], torch.ones(1, 2), "swish"), "activation"),
    (lambda: bp.mlp_init([3.0, 2.0]), "sizes"),
])
def test_other_shapes_are_refused(call, word):
    with pytest.raises(ValueError, match=word):
        call()


def test_saved_bytes_on_meta():
    model = torch.nn.Sequential(torch.nn.Linear(4, 5), torch.nn.Tanh(), torch.nn.Linear(5, 2)).to("meta")
    stored = bp.saved_bytes(lambda: model(torch.ones(3, 4, device="meta")).sum(), exclude=model.parameters())
    assert stored == 4 * 3 * (4 + 5)


def test_relative_error():
    e = torch.tensor([3.0, 4.0])
    assert bp.relative_error(e, e) == 0 and bp.relative_error(2 * e, e) == 1
    assert bp.relative_error(0 * e, 0 * e) == 0 and bp.relative_error(e, 0 * e) == math.inf
    with pytest.raises(ValueError, match="approx"):
        bp.relative_error(e, e[:1])


# Saved bytes ------------------------------------------------------------------------------------------------------

def test_saved_bytes_keeps_nothing_alive():
    x, seen = torch.ones(3, 4, requires_grad=True), []

    def forward():
        y = x.softmax(-1)  # saves its own output
        seen.append(weakref.ref(y))
        return y

    gc.disable()  # what dies must die by itself
    try:
        assert bp.saved_bytes(forward) == 48
        assert seen[0]() is None
    finally:
        gc.enable()


def test_saved_bytes_of_a_forward_pass_that_differentiates():
    x = torch.tensor([1.0, 2.0], requires_grad=True)
    found = []

    def forward():
        g, = torch.autograd.grad(x.pow(3).sum(), x, create_graph=True)
        found.append(torch.autograd.grad(g.sum(), x)[0])

    assert bp.saved_bytes(forward) > 0
    torch.testing.assert_close(found[0], torch.tensor([6.0, 12.0]))


def test_saved_bytes_counts_each_storage_once_and_parameters_not():
    x, w = torch.ones(10, requires_grad=True), torch.ones(10, requires_grad=True)
    assert bp.saved_bytes(lambda: x * x) == 40
    assert bp.saved_bytes(lambda: x * w) == 80
    assert bp.saved_bytes(lambda: x * w, exclude=[w]) == 40
    assert bp.saved_bytes(lambda: x[:2] * w[:2]) == 80, "a view keeps its whole storage alive"
    assert bp.saved_bytes(lambda: x + w) == 0
    with torch.no_grad():
        assert bp.saved_bytes(lambda: x * w) == 0


def test_saved_bytes_of_temporaries_that_share_an_address():
    x = torch.ones(1000, requires_grad=True)
    assert bp.saved_bytes(lambda: [torch.exp(x) for _ in range(5)]) == 5 * 4000


def test_saved_bytes_leaves_the_backward_pass_right():
    x = torch.ones(3, requires_grad=True)
    kept = []
    bp.saved_bytes(lambda: kept.append((x * x).sum()))
    kept[0].backward()
    assert torch.equal(x.grad, 2 * torch.ones(3))


@settings(max_examples=30)
@given(st.lists(st.integers(1, 20), min_size=2, max_size=6), st.integers(1, 9), st.sampled_from([torch.nn.Tanh, torch.nn.ReLU]))
def test_saved_bytes_of_an_mlp(widths, n, act):
    layers = [m for a, b in zip(widths, widths[1:]) for m in (torch.nn.Linear(a, b), act())][:-1]
    model = torch.nn.Sequential(*layers)
    stored = bp.saved_bytes(lambda: model(torch.ones(n, widths[0])).sum(), exclude=model.parameters())
    assert stored == 4 * n * sum(widths[:-1])


@pytest.mark.parametrize("call, words", [
    (lambda: bp.linear_backward(torch.ones(2, 3), torch.ones(2, 5), torch.ones(3, 7)), r"x \(2, 5\) do not fit W \(3, 7\)"),
    (lambda: bp.linear_backward(torch.ones(1, 3), torch.ones(2, 5), torch.ones(3, 5)), r"g \(1, 3\)"),
    (lambda: bp.layer_norm_backward(torch.ones(1, 3), torch.ones(2, 3), torch.ones(3)), r"g \(1, 3\).*x is \(2, 3\)"),
    (lambda: bp.layer_norm_backward(torch.ones(2, 3), torch.ones(2, 3), torch.ones(1)), r"weight \(1,\)"),
    (lambda: bp.mlp_deltas(p := bp.mlp_init([3, 4, 2]), bp.mlp_forward(p, torch.ones(5, 3).double())[0],
                           torch.ones(1, 2).double()), r"delta: \(1, 2\) is not \(5, 2\)")])
def test_shapes_that_would_broadcast(call, words):
    with pytest.raises(ValueError, match=words): call()
