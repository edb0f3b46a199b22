"""altbp.data: IDX files, checked downloads, splits, the four sources, synthetic sets. No real data, no network."""
import gzip
import hashlib
import http.server
import importlib.util
import io
import math
import struct
import tarfile
import threading

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from altbp import data as D

FILES = ("train-images-idx3-ubyte", "train-labels-idx1-ubyte", "t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte")


@pytest.fixture(autouse=True)
def places(tmp_path, monkeypatch):
    """Look for data below tmp_path only, and let no test reach a mirror."""
    monkeypatch.setenv("ALTBP_DATA", str(tmp_path / "data"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(D, "MIRRORS", {"mnist": (), "fashion_mnist": ()})


def idx_bytes(a):
    """An IDX file written by hand: an oracle that shares nothing with write_idx."""
    return struct.pack(f">BBBB{a.ndim}I", 0, 0, 8, a.ndim, *a.shape) + a.astype(np.uint8).tobytes()


def arrays(n_train=40, n_test=20):
    rng = np.random.default_rng(0)
    for n in (n_train, n_test):
        yield rng.integers(0, 256, (n, 28, 28), dtype=np.uint8)
        yield (np.arange(n) % 10).astype(np.uint8)


@pytest.fixture
def tiny(tmp_path):
    """A small MNIST, two of its files compressed; its folder and arrays."""
    folder, made = tmp_path / "data" / "mnist", list(arrays())
    folder.mkdir(parents=True)
    for i, (name, a) in enumerate(zip(FILES, made)):
        raw = idx_bytes(a)
        (folder / (name + (".gz" if i % 2 else ""))).write_bytes(gzip.compress(raw) if i % 2 else raw)
    return folder, made


# IDX --------------------------------------------------------------------------------------------------------------

@settings(max_examples=60, deadline=None)
@given(shape=st.lists(st.integers(0, 4), max_size=4), code=st.sampled_from(sorted(D.IDX_DTYPES)),
       seed=st.integers(0, 99), suffix=st.sampled_from(["", ".gz"]))
def test_idx_round_trip(tmp_path_factory, shape, code, seed, suffix):
    path = tmp_path_factory.mktemp("idx") / f"a{suffix}"
    a = np.random.default_rng(seed).normal(size=shape, scale=50).astype(D.IDX_DTYPES[code])
    D.write_idx(path, torch.from_numpy(np.asarray(a)))
    b = D.read_idx(path)
    assert b.dtype == torch.from_numpy(np.asarray(a)).dtype and tuple(b.shape) == tuple(shape)
    assert np.array_equal(b.numpy(), a)
    raw = path.read_bytes()
    assert (raw[:2] == b"\x1f\x8b") == bool(suffix)
    content = gzip.decompress(raw) if suffix else raw
    assert content[:4] == bytes([0, 0, code, len(shape)])
    assert len(content) == 4 + 4 * len(shape) + a.nbytes


def test_idx_agrees_with_the_format_written_by_hand(tmp_path):
    a = np.arange(24, dtype=np.uint8).reshape(2, 3, 4)
    (tmp_path / "a").write_bytes(idx_bytes(a))
    assert np.array_equal(D.read_idx(tmp_path / "a").numpy(), a)
    D.write_idx(tmp_path / "b", torch.from_numpy(a))
    assert (tmp_path / "b").read_bytes() == idx_bytes(a)


@settings(max_examples=40, deadline=None)
@given(cut=st.integers(1, 35), compressed=st.booleans())
def test_every_truncation_is_reported_with_the_name(tmp_path_factory, cut, compressed):
    path = tmp_path_factory.mktemp("idx") / "victim"
    raw = idx_bytes(np.ones((2, 3, 4), dtype=np.uint8))
    raw = gzip.compress(raw) if compressed else raw
    path.write_bytes(raw[:-min(cut, len(raw) - 2 if compressed else len(raw))])
    with pytest.raises(D.DataCorrupt, match="victim"):
        D.read_idx(path)


@pytest.mark.parametrize("content, message", [
    (b"", "not an IDX file"), (b"<html>", "not an IDX file"), (b"\0\0\x07\x01" + b"\0" * 9, "not an IDX file"),
    (b"\0\0\x08\x03\0\0", "ends within its header"), (idx_bytes(np.ones(3)) + b"x", "announces 3 bytes, 4 follow"),
    (b"\0\0\x08\x02" + b"\xff" * 8 + b"abc", "announces"), (b"\x1f\x8bgarbage", "damaged gzip"),
])
def test_damage_is_named(tmp_path, content, message):
    (tmp_path / "victim").write_bytes(content)
    with pytest.raises(D.DataCorrupt, match=f"victim.*{message}"):
        D.read_idx(tmp_path / "victim")


def test_flipped_bit_in_gzip_is_reported(tmp_path):
    raw = bytearray(gzip.compress(idx_bytes(np.arange(200, dtype=np.uint8))))
    raw[len(raw) // 2] ^= 4
    (tmp_path / "a.gz").write_bytes(raw)
    with pytest.raises(D.DataCorrupt, match="a.gz"):
        D.read_idx(tmp_path / "a.gz")


def test_write_refuses_types_without_a_code(tmp_path):
    with pytest.raises(TypeError, match="torch.int64"):
        D.write_idx(tmp_path / "a", torch.ones(2, dtype=torch.int64))
    assert not list(tmp_path.iterdir())


def test_atomic_leaves_the_old_file_and_no_litter(tmp_path):
    path = tmp_path / "deep" / "a.txt"
    with D.atomic(path) as temp:
        temp.write_text("old")
    with pytest.raises(KeyboardInterrupt), D.atomic(path) as temp:
        temp.write_text("half")
        raise KeyboardInterrupt
    assert [p.name for p in path.parent.iterdir()] == ["a.txt"] and path.read_text() == "old"


# Finding, verifying, downloading ----------------------------------------------------------------------------------

def test_missing_names_folders_variable_and_source(tmp_path):
    with pytest.raises(D.DataNotFound) as e:
        D.load("mnist", download=False)
    text = str(e.value)
    assert isinstance(e.value, FileNotFoundError)
    for part in (str(tmp_path / "data" / "mnist"), str(tmp_path / "cache" / "altbp" / "mnist"), "ALTBP_DATA",
                 FILES[0], D.SOURCES["mnist"]):
        assert part in text
    assert "is not set" not in text


def test_missing_says_that_the_variable_is_not_set(monkeypatch):
    monkeypatch.setenv("ALTBP_DATA", "")
    with pytest.raises(D.DataNotFound, match="ALTBP_DATA is not set"):
        D.mnist(download=False)
    monkeypatch.delenv("ALTBP_DATA")
    with pytest.raises(D.DataNotFound, match="ALTBP_DATA is not set"):
        D.fashion_mnist(download=False)
    assert len(D.data_folders("mnist")) == 1


def test_cifar_missing_explains_the_layout():
    with pytest.raises(D.DataNotFound, match=r"cifar10-jpeg.tar.gz, or its content \{train,test\}/CLASS/NNNN.jpg"):
        D.cifar10()


def test_checksums_are_those_of_the_published_files():
    """The table has four files for each set, with distinct SHA-256 sums of the right form."""
    sums = [v for files in D.SHA256.values() for v in files.values()]
    assert len(set(sums)) == 8 and all(len(bytes.fromhex(v)) == 32 for v in sums)
    assert all(tuple(files) == FILES for files in D.SHA256.values())


def test_other_content_is_refused_unless_asked_for(tiny):
    folder, made = tiny
    with pytest.raises(D.DataCorrupt, match="train-images-idx3-ubyte: the uncompressed content has SHA-256"):
        D.mnist()
    d = D.mnist(verify=False, split="ordered")
    assert torch.equal(d.x_train, torch.from_numpy(made[0][:, None]).float() / 255)
    assert torch.equal(d.x_test, torch.from_numpy(made[2][:, None]).float() / 255)
    assert torch.equal(d.y_train, torch.from_numpy(made[1]).long())
    assert d.classes == tuple("0123456789") and d.name == "MNIST"


def test_known_content_is_accepted(tiny, monkeypatch):
    monkeypatch.setitem(D.SHA256, "mnist", {n: hashlib.sha256(idx_bytes(a)).hexdigest() for n, a in zip(FILES, tiny[1])})
    assert len(D.mnist().y_train) == 40 and D.available("mnist")


def test_truncated_file_is_never_half_used(tiny):
    path = tiny[0] / FILES[0]
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(D.DataCorrupt, match=FILES[0]):
        D.mnist(verify=False)


def test_files_that_do_not_belong_together(tiny):
    (tiny[0] / f"{FILES[1]}.gz").write_bytes(gzip.compress(idx_bytes(np.ones(7))))
    with pytest.raises(D.DataCorrupt, match="do not belong together"):
        D.mnist(verify=False)
    (tiny[0] / f"{FILES[1]}.gz").write_bytes(gzip.compress(idx_bytes(np.full(40, 10))))
    with pytest.raises(D.DataCorrupt, match="labels less than 0, greater than 9"):
        D.mnist(verify=False)


def test_first_folder_wins_and_files_may_be_spread(tiny, tmp_path):
    cache = tmp_path / "cache" / "altbp" / "mnist"
    cache.mkdir(parents=True)
    (tiny[0] / FILES[0]).rename(cache / FILES[0])
    (cache / f"{FILES[1]}.gz").write_bytes(b"never read, since the other folder has the file")
    assert D.available("mnist") and len(D.mnist(verify=False).y_train) == 40
    (cache / FILES[0]).unlink()
    assert not D.available("mnist")


@pytest.fixture
def mirror(tmp_path, monkeypatch):
    """A mirror on the loopback interface that serves tmp_path/mirror."""
    root = tmp_path / "mirror"
    root.mkdir()
    made = list(arrays())
    for name, a in zip(FILES, made):
        (root / f"{name}.gz").write_bytes(gzip.compress(idx_bytes(a)))
    monkeypatch.setitem(D.SHA256, "mnist", {n: hashlib.sha256(idx_bytes(a)).hexdigest() for n, a in zip(FILES, made)})

    class Quiet(http.server.SimpleHTTPRequestHandler):
        def __init__(self, *args): super().__init__(*args, directory=str(root))
        def log_message(self, *args): pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Quiet)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.setitem(D.MIRRORS, "mnist", (f"http://127.0.0.1:{server.server_port}/",))
    yield root
    server.shutdown()
    server.server_close()


def test_download_goes_to_the_cache_once(mirror, tmp_path):
    first = D.mnist()
    cache = tmp_path / "cache" / "altbp" / "mnist"
    assert sorted(p.name for p in cache.iterdir()) == sorted(f"{n}.gz" for n in FILES)
    for p in mirror.iterdir():
        p.unlink()  # the second load cannot download
    assert torch.equal(D.mnist().x_train, first.x_train)


@pytest.mark.parametrize("spoil", ["truncated", "other", "missing"])
def test_bad_mirror_is_followed_by_the_next(mirror, tmp_path, monkeypatch, spoil):
    bad = tmp_path / "bad"
    bad.mkdir()
    for n in FILES:
        raw = (mirror / f"{n}.gz").read_bytes()
        if spoil != "missing":
            (bad / f"{n}.gz").write_bytes(raw[:-20] if spoil == "truncated" else gzip.compress(b"other"))
    good, = D.MIRRORS["mnist"]
    monkeypatch.setitem(D.MIRRORS, "mnist", (bad.as_uri() + "/", good))
    assert len(D.mnist().y_test) == 20
    monkeypatch.setitem(D.MIRRORS, "mnist", (bad.as_uri() + "/",))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "second"))
    with pytest.raises(D.DataNotFound, match=f"download of {bad.as_uri()}/{FILES[0]}.gz failed"):
        D.mnist()
    assert not [p for p in (tmp_path / "second").rglob("*") if p.is_file()]  # nothing kept, nothing half


def test_real_mirrors_are_well_formed():
    fresh = importlib.util.module_from_spec(spec := importlib.util.find_spec("altbp.data"))
    spec.loader.exec_module(fresh)
    urls = [u for us in fresh.MIRRORS.values() for u in us]
    assert len(urls) == len(set(urls)) >= 4 and all(u.startswith("http") and u.endswith("/") for u in urls)


# Splits -----------------------------------------------------------------------------------------------------------

@settings(max_examples=60, deadline=None)
@given(counts=st.lists(st.integers(1, 40), min_size=1, max_size=6), seed=st.integers(0, 5),
       split=st.sampled_from(["stratified", "random", "ordered"]))
def test_order_is_a_permutation(counts, seed, split):
    labels = torch.repeat_interleave(torch.arange(len(counts)), torch.tensor(counts))
    order = D.order_of(labels, seed, split)
    assert torch.equal(order.sort().values, torch.arange(len(labels)))
    assert torch.equal(order, D.order_of(labels, seed, split))


@settings(max_examples=60, deadline=None)
@given(counts=st.lists(st.integers(1, 60), min_size=2, max_size=6), cut=st.floats(0, 1), seed=st.integers(0, 5))
def test_stratified_prefixes_have_the_proportions(counts, cut, seed):
    labels = torch.repeat_interleave(torch.arange(len(counts)), torch.tensor(counts))
    k = int(cut * len(labels))
    have = labels[D.order_of(labels, seed)][:k].bincount(minlength=len(counts))
    want = torch.tensor(counts) * k / len(labels)
    # a prefix that ends at key t has n_c t ± 1/2 of class c; t itself is off by at most C/2 of the n examples
    slack = 0.5 + torch.tensor(counts) * len(counts) / 2 / len(labels)
    assert ((have - want).abs() <= slack + 1e-9).all()


def test_orders_differ_by_seed_and_random_is_not_stratified():
    labels = torch.arange(1000) % 10
    assert not torch.equal(D.order_of(labels, 0), D.order_of(labels, 1))
    prefix = labels[D.order_of(labels, 0, "random")][:100].bincount(minlength=10)
    assert (prefix != 10).any()
    assert (labels[D.order_of(labels, 0)][:100].bincount(minlength=10) == 10).all()
    assert torch.equal(D.order_of(labels, 0, "ordered"), torch.arange(1000))


@pytest.mark.parametrize("split", ["stratified", "random", "ordered"])
def test_parts_are_disjoint_and_test_part_is_fixed(split):
    full = D.digits(n_val=100, n_test=200, split=split, flat=True)
    few = D.digits(n_train=50, n_val=100, n_test=200, split=split, flat=True)
    assert [len(t) for t in (full.x_train, full.x_val, full.x_test)] == [1497, 100, 200]
    assert torch.equal(full.x_test, few.x_test) and torch.equal(full.y_val, few.y_val)
    assert torch.equal(full.x_train[:50], few.x_train)
    from sklearn.datasets import load_digits
    rows = torch.cat([full.x_train, full.x_val, full.x_test])
    original = torch.from_numpy(load_digits().data).float() / 16
    def multiset(t): return sorted(map(tuple, t.tolist()))
    assert multiset(rows) == multiset(original)


def test_digits_shapes_ranges_types():
    d = D.digits()
    assert tuple(d.x_train.shape) == (1437, 1, 8, 8) and tuple(d.x_val.shape) == (0, 1, 8, 8)
    assert d.x_train.dtype == torch.float32 and d.y_train.dtype == torch.int64
    assert d.x_train.min() == 0 and d.x_train.max() == 1 and set(d.y_test.tolist()) == set(range(10))
    e = D.digits(flat=True, dtype=torch.float64)
    assert e.x_train.dtype == torch.float64 and torch.equal(e.x_train.view(-1, 1, 8, 8).float(), d.x_train)


@pytest.mark.parametrize("options, error, message", [
    (dict(n_train=2000), ValueError, "more than the 1797 examples"),
    (dict(n_train=1000, n_val=500, n_test=300), ValueError, "n_train=1000, n_val=500, n_test=300"),
    (dict(n_val=1800), ValueError, "more than"), (dict(n_val=-1), ValueError, "n_val: -1"),
    (dict(n_test=1.0), TypeError, "n_test"), (dict(n_train=True), TypeError, "n_train"),
    (dict(n_val=None), TypeError, "n_val"), (dict(split="shuffled"), ValueError, "split: 'shuffled'"),
    (dict(dtype=torch.int64), TypeError, "dtype"), (dict(dtype="float32"), TypeError, "dtype"),
])
def test_bad_options(options, error, message):
    with pytest.raises(error, match=message):
        D.load("digits", **options)


def test_test_size_is_bounded_by_the_test_file(tiny):
    with pytest.raises(ValueError, match="more than the 20 examples"):
        D.mnist(n_test=21, verify=False)
    with pytest.raises(ValueError, match="more than the 40 examples"):
        D.mnist(n_val=41, verify=False)
    assert len(D.mnist(n_test=20, n_val=40, verify=False).y_train) == 0


def test_unknown_names():
    for call in (D.load, D.available):
        with pytest.raises(ValueError, match="'svhn' is not one of digits, mnist"):
            call("svhn")


def test_dataset_to_and_repr():
    d = D.digits(n_val=10)
    e = d.to(torch.float64)
    assert e.x_val.dtype == torch.float64 and e.y_val.dtype == torch.int64 and d.x_val.dtype == torch.float32
    assert repr(d) == "Dataset('digits', 1427 + 10 + 360 examples of shape (1, 8, 8), 10 classes, torch.float32, cpu)"
    with pytest.raises(AttributeError):
        d.name = "other"


# CIFAR-10 ---------------------------------------------------------------------------------------------------------

def image(value):
    from PIL import Image
    f = io.BytesIO()
    Image.new("RGB", (32, 32), value).save(f, "JPEG")
    return f.getvalue()


TREE = {f"{part}/{c}/{i:04}.jpg": (r, g, 0) for part, n in (("train", 3), ("test", 1))
        for c, g in (("cat", 0), ("dog", 255)) for i in range(n) for r in [40 * i]}


@pytest.fixture(params=["folder", "archive"])
def cifar(request, tmp_path):
    root = tmp_path / "data" / "cifar10-jpeg"
    root.mkdir(parents=True)
    if request.param == "archive":
        with tarfile.open(root / D.CIFAR_ARCHIVE, "w:gz") as tar:
            for name, value in TREE.items():
                raw = image(value)
                info = tarfile.TarInfo(name)
                info.size = len(raw)
                tar.addfile(info, io.BytesIO(raw))
    else:
        for name, value in TREE.items():
            (root / name).parent.mkdir(parents=True, exist_ok=True)
            (root / name).write_bytes(image(value))
    return root


def test_cifar_from_folder_and_archive(cifar, tmp_path, monkeypatch):
    d = D.cifar10(verify=False, split="ordered")
    assert d.name == "CIFAR-10 (JPEG)" and d.classes == ("cat", "dog")
    assert tuple(d.x_train.shape) == (6, 3, 32, 32) and d.y_train.tolist() == [0, 1, 0, 1, 0, 1]
    assert (d.x_train[:, 1].mean((1, 2)) - torch.tensor([0.0, 1, 0, 1, 0, 1])).abs().max() < 0.02
    assert (d.x_train[:, 0].mean((1, 2)) * 255 - torch.tensor([0, 0, 40, 40, 80, 80])).abs().max() < 3
    cached, = (tmp_path / "cache" / "altbp" / "cifar10-jpeg").iterdir()
    monkeypatch.setattr(D, "_decode", None)  # a second load does not decode
    assert torch.equal(D.cifar10(verify=False, split="ordered").x_train, d.x_train)
    cached.write_bytes(cached.read_bytes()[:-40])
    with pytest.raises(D.DataCorrupt, match=f"{cached.name}: damaged.*delete it"):
        D.cifar10(verify=False)


def test_cifar_counts_are_verified(cifar):
    with pytest.raises(D.DataCorrupt, match=r"\[\[3, 3\], \[1, 1\]\] images per class"):
        D.cifar10()


def test_cifar_damage(tmp_path):
    root = tmp_path / "data" / "cifar10-jpeg"
    root.mkdir(parents=True)
    (root / D.CIFAR_ARCHIVE).write_bytes(gzip.compress(b"x" * 5000)[:-9])
    with pytest.raises(D.DataCorrupt, match="cifar10-jpeg.tar.gz: damaged archive"):
        D.cifar10(verify=False)


@pytest.mark.parametrize("name, content, message", [
    ("train/cat/0002.jpg", image((1, 2, 3))[:-30], "0002.jpg: not a whole image"),
    ("train/cat/0002.jpg", b"", "0002.jpg: not a whole image"),
    ("valid/cat/0002.jpg", image((1, 2, 3)), "neither in train/ nor in test/"),
    ("train/emu/0002.jpg", image((1, 2, 3)), "not the same classes in train/ and in test/"),
    ("train/cat/0003.jpg/note.txt", b"", "0003.jpg: a folder, where a file is expected"),
])
def test_cifar_bad_tree(tmp_path, name, content, message):
    root = tmp_path / "data" / "cifar10-jpeg"
    for path, raw in {**{k: image(v) for k, v in TREE.items()}, name: content}.items():
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).write_bytes(raw)
    with pytest.raises(D.DataCorrupt, match=message):
        D.cifar10(verify=False)
    assert not (tmp_path / "cache").exists()


def test_cifar_without_a_writable_cache_still_loads(cifar, tmp_path):
    (tmp_path / "cache").write_text("a file where the folder should be")
    with pytest.warns(UserWarning, match="cannot be kept"):
        assert len(D.cifar10(verify=False).y_train) == 6


# Synthetic --------------------------------------------------------------------------------------------------------

def test_gaussian_regression():
    x, y, theta = D.gaussian_regression(30, 7, seed=3)
    assert (x.norm(dim=1) - 1).abs().max() < 1e-14 and (y - x @ theta).abs().max() < 1e-14
    assert torch.equal(x, D.gaussian_regression(30, 7, seed=torch.Generator().manual_seed(3))[0])
    x, y, theta = D.gaussian_regression(4000, 50, noise=0.5, rows="gaussian", seed=1)
    # Var(x_ij) = 1/50 and Var(y − xθ) = 1/4, each within five standard errors of a variance
    assert abs(x.var().item() * 50 - 1) < 5 * math.sqrt(2 / x.numel())
    assert abs((y - x @ theta).var().item() / 0.25 - 1) < 5 * math.sqrt(2 / 4000)
    assert D.gaussian_regression(2, 2, dtype=torch.float32)[1].dtype == torch.float32


def test_two_moons():
    x, y = D.two_moons(301, noise=0.0, dtype=torch.float64, seed=2)
    up, down = x[y == 0], x[y == 1]
    assert len(up) == 151 and (up.norm(dim=1) - 1).abs().max() < 1e-12 and (up[:, 1] >= 0).all()
    assert ((down - torch.tensor([1.0, 0.5])).norm(dim=1) - 1).abs().max() < 1e-12 and (down[:, 1] <= 0.5).all()
    g = torch.Generator().manual_seed(0)
    a, b = D.two_moons(10, seed=g)[0], D.two_moons(10, seed=g)[0]
    assert not torch.equal(a, b) and torch.equal(a, D.two_moons(10, seed=0)[0])


@pytest.mark.parametrize("call, error, message", [
    (lambda: D.two_moons(0), ValueError, "n: 0"), (lambda: D.two_moons(2.0), ValueError, "n: 2.0"),
    (lambda: D.gaussian_regression(3, 0), ValueError, "d: 0"),
    (lambda: D.gaussian_regression(3, 2, rows="unitary"), ValueError, "rows"),
    (lambda: D.gaussian_regression(3, 2, seed="0"), TypeError, "seed"), (lambda: D.two_moons(3, seed=True), TypeError, "seed"),
])
def test_synthetic_bad_arguments(call, error, message):
    with pytest.raises(error, match=message):
        call()


def test_progress_without_tqdm(monkeypatch):
    import sys
    monkeypatch.setitem(sys.modules, "tqdm", None)
    assert list(D.progress(range(3), "x", True)) == [0, 1, 2]


def test_nothing_touches_the_global_random_state(tiny):
    before = torch.get_rng_state()
    D.digits(n_val=10), D.mnist(verify=False), D.two_moons(5), D.gaussian_regression(3, 3)
    assert torch.equal(torch.get_rng_state(), before)


# Found by a hostile reader ----------------------------------------------------------------------------------------

@pytest.mark.parametrize("name, message", [
    ("0001.jpg", "'0001.jpg' is neither in train/ nor"), ("cat/0001.jpg", "'cat/0001.jpg' is neither"),
    ("train/../0001.jpg", "not the same classes"), ("again/train/cat/0000.jpg", "is there twice"),
])
def test_odd_names_in_an_archive_are_damage(tmp_path, name, message):
    root = tmp_path / "data" / "cifar10-jpeg"
    root.mkdir(parents=True)
    with tarfile.open(root / D.CIFAR_ARCHIVE, "w:gz") as tar:
        for n in (*TREE, name):
            info = tarfile.TarInfo(n)
            info.size = len(raw := image((1, 2, 3)))
            tar.addfile(info, io.BytesIO(raw))
    with pytest.raises(D.DataCorrupt, match=message):
        D.cifar10(verify=False)


def test_a_cache_of_other_content_is_damage(cifar, tmp_path):
    D.cifar10(verify=False)
    cached, = (tmp_path / "cache" / "altbp" / "cifar10-jpeg").iterdir()
    good = dict(np.load(cached))
    def is_refused():
        with pytest.raises(D.DataCorrupt, match=f"{cached.name}: damaged.*delete it"):
            D.cifar10(verify=False)
    for key in good:
        with cached.open("wb") as f: np.savez(f, **{k: v for k, v in good.items() if k != key})
        is_refused()
    for change in (dict(x_train=good["x_train"][:-1]), dict(y_test=good["y_test"] + 7), dict(x_test=good["x_test"] / 2)):
        with cached.open("wb") as f: np.savez(f, **{**good, **change})
        is_refused()
    with cached.open("wb") as f: np.save(f, np.ones(3))  # one array, no archive
    is_refused()
    with cached.open("wb") as f: np.savez(f, **good)
    assert len(D.cifar10(verify=False).y_train) == 6


def test_a_folder_named_like_a_file_is_damage(tiny):
    folder, _ = tiny
    (folder / FILES[0]).unlink()
    (folder / FILES[0]).mkdir()
    with pytest.raises(D.DataCorrupt, match=f"{FILES[0]}: a folder"):
        D.mnist(verify=False)
    with pytest.raises(D.DataCorrupt, match="a folder"):
        D.read_idx(folder / FILES[0])


@pytest.mark.parametrize("file, made, message", [
    (2, np.zeros((20, 14, 28), dtype=np.uint8), r"\(40, 28, 28\) to train on and \(20, 14, 28\) to test"),
    (3, -np.ones(20, dtype=np.int8), "labels less than 0"), (1, np.ones(40, dtype=np.float32), "labels less than 0, greater than 9"),
    (1, np.full(40, 10, dtype=np.uint8), "labels less than 0, greater than 9"),
])
def test_unverified_parts_must_fit_together(tiny, file, made, message):
    folder, _ = tiny
    for old in folder.glob(f"{FILES[file]}*"): old.unlink()
    D.write_idx(folder / f"{FILES[file]}.gz", torch.from_numpy(made))
    with pytest.raises(D.DataCorrupt, match=message):
        D.mnist(verify=False)


@pytest.mark.parametrize("seed", ["a", 0.5, True, None])
def test_seeds_are_integers(seed):
    with pytest.raises(TypeError, match="seed"):
        D.load("digits", seed=seed)
    with pytest.raises(TypeError, match="seed"):
        D.order_of(torch.zeros(3), seed, "ordered")


def test_integers_of_numpy_are_integers():
    one, four = np.int64(1), np.int32(4)
    a = D.digits(n_train=four, n_val=np.uint8(3), n_test=np.int64(2), seed=one)
    b = D.digits(n_train=4, n_val=3, n_test=2, seed=1)
    assert torch.equal(a.x_train, b.x_train) and torch.equal(a.y_test, b.y_test) and len(a.y_val) == 3
    assert torch.equal(D.two_moons(four, seed=one)[0], D.two_moons(4, seed=1)[0])
    assert D.gaussian_regression(four, one, seed=one)[0].shape == (4, 1)


def test_a_relative_folder_is_relative_to_the_current_one(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("ALTBP_DATA", "some/where")
    assert D.data_folders("mnist")[0] == tmp_path / "some" / "where" / "mnist"
    assert "relative to the current folder" in D.data_folders.__doc__
