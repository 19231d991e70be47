"""Pages bring all they need, keep to their policy, and can be read: contrast by WCAG 2.2."""

import re
from pathlib import Path

import pytest

import stream.web.app as app

STATIC = app.STATIC
FILES = sorted(STATIC.iterdir())

PAIRS = [
    *(
        (text, ground)
        for text in ("text", "faint", "link", "bad", "warn", "good")
        for ground in ("ground", "card")
    ),
    ("bad", "bad-ground"),
    ("warn", "warn-ground"),
    ("good", "good-ground"),
    ("text", "plain-ground"),
    ("button-text", "button"),
]


def themes() -> list[dict[str, str]]:
    css = (STATIC / "style.css").read_text()
    blocks = re.findall(r":root[^{]*\{([^}]*)\}", css)
    return [dict(re.findall(r"--([a-z-]+):\s*(#[0-9a-f]{6})", block)) for block in blocks]


def luminance(colour: str) -> float:
    """Relative luminance as WCAG 2.2 defines it."""
    parts = [int(colour[at : at + 2], 16) / 255 for at in (1, 3, 5)]
    red, green, blue = (
        part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts
    )
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue


@pytest.mark.parametrize("theme", range(3))
@pytest.mark.parametrize(("text", "ground"), PAIRS)
def test_text_stands_out_from_its_ground(theme: int, text: str, ground: str) -> None:
    colours = themes()[theme]
    dark, light = sorted((luminance(colours[text]), luminance(colours[ground])))
    assert (light + 0.05) / (dark + 0.05) >= 4.5


def test_both_ways_to_dark_are_the_same() -> None:
    assert themes()[1] == themes()[2]
    assert themes()[0].keys() == themes()[1].keys()


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_nothing_comes_from_elsewhere_and_nothing_is_inline(path: Path) -> None:
    text = path.read_text().replace("http://www.w3.org/2000/svg", "")
    assert not re.search(r"https?://", text)
    assert "innerHTML" not in text
    assert "eval(" not in text
    if path.suffix == ".html":
        assert not re.search(r"<style|\sstyle=|\son[a-z]+=|<script(?![^>]*\ssrc=)", text)
    if path.suffix == ".js":
        assert not re.search(r"\bstyle:|setAttribute\(\"style", text)


def test_every_module_that_is_imported_is_there() -> None:
    for path in STATIC.glob("*.js"):
        for name in re.findall(r'from "\./([a-z]+\.js)"', path.read_text()):
            assert (STATIC / name).is_file()
