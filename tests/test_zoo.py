"""altbp.zoo: optional libraries, and torchvision beside a PyTorch that its operators do not fit."""
import subprocess
import sys

import pytest
import torch

from altbp.zoo import library


def test_missing_library_names_the_command():
    with pytest.raises(ImportError, match="no_such_library is not installed; try: pip install no_such_library"):
        library("no_such_library.models")


def test_missing_part_of_a_library_is_not_called_uninstalled():
    with pytest.raises(ModuleNotFoundError, match="torch.no_such_part"):
        library("torch.no_such_part")


def test_other_errors_pass_through(tmp_path, monkeypatch):
    (tmp_path / "broken_peer.py").write_text("raise RuntimeError('operator other::op does not exist')")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(RuntimeError, match="other::op"): library("broken_peer")


@pytest.mark.parametrize("name", ["torchvision.models", "timm"])
def test_imports_in_a_fresh_process(name):
    pytest.importorskip("importlib.metadata").version(name.split(".")[0])
    code = f"from altbp.zoo import library; print(library({name!r}).__name__)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == name


def test_torchvision_model_runs():
    models = library("torchvision.models")
    net = models.resnet18(num_classes=3).eval()
    with torch.no_grad(): assert net(torch.zeros(1, 3, 32, 32)).shape == (1, 3)
