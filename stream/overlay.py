"""The explanation kept beside a face: each member's map over the crop, with its scale (DESIGN 3.6)."""

from collections.abc import Mapping

import cv2
import numpy as np
from numpy.typing import NDArray

from detectors.readings import Image

PANEL_PX = 320
"""Side of one member's picture: twice a network's input, so that people see the face and can read."""

HEAT = 0.6
"""Share of the heat map where attention is highest: the face stays recognisable below it."""

COLOURS = cv2.COLORMAP_VIRIDIS
"""Even steps look even, also to the colour-blind, and no skin is that colour."""

TITLE_PX, SCALE_PX, EDGE_PX = 26, 40, 8
"""Heights of the member's name above and the scale below; the margin about both."""

BAR_PX = 10
PAPER, INK = 255, 20
FONT = cv2.FONT_HERSHEY_SIMPLEX
LETTERS = 0.5
"""Size of the letters at which fourteen of them fill half a panel."""


def overlay(crop: Image, maps: Mapping[str, NDArray[np.float32]]) -> Image:
    """Return the crop once for every member, side by side, each with that member's map over it as heat.

    `crop` is uint8 (S, S, 3) RGB; `maps` are (h, w) in 0..1 by member, at least one, all of that crop. Above
    each stands the member's name, below it the scale: a map is stretched to its own range, because it shows
    where the network looked more than elsewhere; the two numbers say how much more. uint8 RGB out.
    """
    return np.concatenate([_panel(crop, name, found) for name, found in maps.items()], axis=1)


def heat(crop: Image, attention: NDArray[np.float32]) -> Image:
    """Return the crop (S, S, 3) with the map (h, w) over it, more of it and lighter where it is higher.

    The map is stretched to its own range. A flat map leaves the crop as it is.
    """
    height, width = crop.shape[:2]
    low, high = float(attention.min()), float(attention.max())
    if not high > low:
        return crop.copy()
    stretched = ((attention - low) / (high - low)).astype(np.float32)
    grown = np.clip(cv2.resize(stretched, (width, height), interpolation=cv2.INTER_LINEAR), 0.0, 1.0)
    return _mixed(crop, grown)


def _panel(crop: Image, name: str, attention: NDArray[np.float32]) -> Image:
    large = np.asarray(cv2.resize(crop, (PANEL_PX, PANEL_PX), interpolation=cv2.INTER_CUBIC), np.uint8)
    title, scale = _paper(TITLE_PX), _paper(SCALE_PX)
    _write(title, name, EDGE_PX, TITLE_PX - EDGE_PX, PANEL_PX - 2 * EDGE_PX)
    low, high = float(attention.min()), float(attention.max())
    if high > low:
        length = PANEL_PX - 2 * EDGE_PX
        ramp = np.tile(np.linspace(0, 1, length, dtype=np.float32), (BAR_PX, 1))
        scale[4 : 4 + BAR_PX, EDGE_PX : EDGE_PX + length] = _mixed(
            np.full((BAR_PX, length, 3), 128, np.uint8), ramp
        )
        _write(scale, f"least {low:.2f}", EDGE_PX, SCALE_PX - EDGE_PX, length // 2)
        most = f"most {high:.2f}"
        _write(scale, most, PANEL_PX - EDGE_PX - _wide(most), SCALE_PX - EDGE_PX, length // 2)
    else:
        _write(scale, f"the same everywhere: {low:.2f}", EDGE_PX, SCALE_PX - EDGE_PX, PANEL_PX - 2 * EDGE_PX)
    return np.concatenate([title, heat(large, attention), scale])


def _mixed(picture: Image, share: NDArray[np.float32]) -> Image:
    bgr = cv2.applyColorMap((share * 255).astype(np.uint8), COLOURS)
    colour = cv2.cvtColor(bgr, cv2.COLOR_BGR2RGB).astype(np.float32)
    weight = (HEAT * share)[:, :, None]
    mixed: Image = np.clip(np.rint(picture * (1.0 - weight) + colour * weight), 0, 255).astype(np.uint8)
    return mixed


def _paper(height: int) -> Image:
    return np.full((height, PANEL_PX, 3), PAPER, np.uint8)


def _wide(text: str) -> int:
    return int(cv2.getTextSize(text, FONT, LETTERS, 1)[0][0])


def _write(paper: Image, text: str, left: int, base: int, width: int) -> None:
    """Write in place; what would be wider than `width` is written smaller."""
    size = LETTERS * min(1.0, width / max(1, _wide(text)))
    cv2.putText(paper, text, (left, base), FONT, size, (INK, INK, INK), 1, cv2.LINE_AA)
