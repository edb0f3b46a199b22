"""What several test files share."""
import importlib.util
import os
from pathlib import Path

import pytest
import torch
from hypothesis import settings

ROOT = Path(__file__).resolve().parent.parent

# No deadlines: the first call of an operation may be slow. In CI the examples are the same in every run.
settings.register_profile("altbp", deadline=None, derandomize=bool(os.environ.get("CI")))
settings.load_profile("altbp")


@pytest.fixture(autouse=True)
def same_state():
    """Every test starts from the same global seed and leaves torch's defaults as they were."""
    torch.manual_seed(0)
    dtype = torch.get_default_dtype()
    yield
    assert torch.get_default_dtype() == dtype, "a test changed torch's default dtype"


@pytest.fixture(scope="session")
def book():
    """tools/book.py as a module."""
    spec = importlib.util.spec_from_file_location("book", ROOT / "tools" / "book.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
