"""Class names are written in any script for which there is a font, and otherwise as numbers with a note."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from PIL import ImageFont

from headkd_ray.report import fonts
from headkd_ray.report.draw import draw
from headkd_ray.report.fonts import drawable, runs

NOWHERE = "\u0378"
"""An unassigned character, missing from every font except Matplotlib's "last resort", which has a symbol for everything."""


@pytest.fixture
def no_fonts(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    """Pretend that only Pillow's own font is installed."""
    monkeypatch.setattr(fonts, "_folders", lambda: iter([tmp_path]))
    for cached in (fonts._installed, fonts._source):
        cached.cache_clear()
    yield
    for cached in (fonts._installed, fonts._source):
        cached.cache_clear()


def test_a_name_without_letters_for_it_becomes_its_number_and_is_told(no_fonts: None) -> None:
    names = {3: "cat", 7: "猫", 9: "кот", 90: "traffic  light\n", 91: "x" * 50, 92: "a\x07", 93: "\ud800"}
    shown, note = drawable(names)
    assert shown == {
        3: "cat",
        7: "class 7",
        9: "class 9",
        90: "traffic light",
        91: "x" * 29 + "...",
        92: "class 92",
        93: "class 93",
    }
    assert note is not None
    assert note.startswith("no installed font has the letters of 4 of the 7 class names, so the pictures show numbers (class 7")
    assert "'猫'" in note
    assert "Noto" in note
    assert drawable({1: "cat"}) == ({1: "cat"}, None)


@pytest.mark.skipif(importlib.util.find_spec("matplotlib") is None, reason="brings the font")
def test_a_font_that_is_found_has_the_letters() -> None:
    names = {1: "кошка", 2: "γάτα", 3: "Straße", 4: "Đà Nẵng", 5: "cat"}
    assert drawable(names) == (names, None)
    (russian,) = runs("кошка 0.93", 20) or []
    assert russian[0] == "кошка 0.93" and russian[1].getname()[0] != ImageFont.load_default(20).getname()[0]
    box, label = torch.tensor([[20.0, 30.0, 90.0, 60.0]]), torch.tensor([0])
    images = [draw(torch.zeros(3, 80, 120, dtype=torch.uint8), box, label, [text]) for text in ("кот", "код", "к")]
    assert not torch.equal(images[0], images[1]), "letters, not boxes"
    assert not torch.equal(images[0], images[2])


def test_fonts_without_a_letter_do_not_count_their_symbol_for_missing_ones() -> None:
    assert runs(NOWHERE, 20) is None
    assert drawable({0: NOWHERE})[0] == {0: "class 0"}
    assert runs("", 20) is not None


def test_what_is_installed_and_no_font_is_passed_over(no_fonts: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "Broken Sans.ttf").write_bytes(b"not a font")
    (tmp_path / "empty.otf").touch()
    assert runs("кот", 20) is None
