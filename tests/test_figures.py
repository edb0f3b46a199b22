"""altbp.figures: colours and style."""
import re

import matplotlib
import pytest

from altbp.figures import COLOURS, STYLE, colour, use_style


def test_colours_are_hex_and_families_differ():
    assert all(re.fullmatch(r"#[0-9a-f]{6}", c) for c in COLOURS.values())
    methods = {k: v for k, v in COLOURS.items() if k not in ("exact", "good", "bad")}
    assert len(set(methods.values())) == len(methods)


def test_unknown_method():
    with pytest.raises(KeyError, match="known are"):
        colour("adam")


def test_style_is_valid_and_applied():
    with matplotlib.rc_context():
        use_style()
        assert matplotlib.rcParams["svg.hashsalt"] == STYLE["svg.hashsalt"]
