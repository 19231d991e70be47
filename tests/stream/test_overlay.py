"""The overlay is honest about where heat lies and how much of it there is, and can be read."""

import cv2
import numpy as np
import pytest

from stream.overlay import COLOURS, EDGE_PX, PANEL_PX, SCALE_PX, TITLE_PX, heat, overlay


def corner_map(high: float = 1.0) -> np.ndarray:
    attention = np.zeros((8, 8), dtype=np.float32)
    attention[:2, :2] = high
    return attention


def test_heat_lies_where_attention_is_and_elsewhere_the_face_stays() -> None:
    crop = np.full((64, 64, 3), 128, dtype=np.uint8)
    mixed = heat(crop, corner_map()).astype(int)
    assert mixed.shape == crop.shape
    assert mixed[2, 2, 0] > mixed[2, 2, 2] + 30
    assert np.array_equal(mixed[40:, 40:], crop[40:, 40:])
    assert np.array_equal(crop, np.full((64, 64, 3), 128, dtype=np.uint8))


@pytest.mark.parametrize("level", [0.0, 0.5, 1.0])
def test_a_flat_map_shows_nothing(level: float) -> None:
    crop = np.arange(48, dtype=np.uint8).reshape(4, 4, 3)
    assert np.array_equal(heat(crop, np.full((2, 2), level, dtype=np.float32)), crop)


def test_every_member_has_a_panel_of_its_own_map_large_enough_to_see() -> None:
    crop = np.full((160, 160, 3), 90, dtype=np.uint8)
    picture = overlay(crop, {"left": corner_map(), "right": corner_map()[:, ::-1]})
    assert picture.shape == (TITLE_PX + PANEL_PX + SCALE_PX, 2 * PANEL_PX, 3)
    assert picture.dtype == np.uint8
    face = picture[TITLE_PX:-SCALE_PX].astype(int)
    hot = np.abs(face - 90).sum(2) > 60
    assert hot[5, 5]
    assert not hot[5, PANEL_PX - 6]
    assert hot[5, 2 * PANEL_PX - 6]
    assert not hot[5, PANEL_PX + 5]
    assert not hot[PANEL_PX // 2 :].any()


def test_the_scale_runs_from_the_crop_to_the_hottest_colour() -> None:
    picture = overlay(np.full((64, 64, 3), 128, dtype=np.uint8), {"a": corner_map()})
    bar = picture[TITLE_PX + PANEL_PX + 6, EDGE_PX : PANEL_PX - EDGE_PX].astype(int)
    assert np.abs(bar[0] - 128).max() <= 1
    hottest = cv2.cvtColor(cv2.applyColorMap(np.array([[255]], np.uint8), COLOURS), cv2.COLOR_BGR2RGB)[0, 0]
    corner = picture[TITLE_PX + 2, 2].astype(int)
    assert np.abs(bar[-1] - corner).max() <= 2
    assert np.abs(bar[-1] - (0.4 * 128 + 0.6 * hottest)).max() <= 2


def test_numbers_and_names_are_written_and_stay_inside() -> None:
    crop = np.full((64, 64, 3), 128, dtype=np.uint8)
    one, other = (overlay(crop, {"a": corner_map(high)}) for high in (1.0, 0.5))
    assert np.array_equal(one[TITLE_PX:-SCALE_PX], other[TITLE_PX:-SCALE_PX])
    assert not np.array_equal(one[-SCALE_PX:], other[-SCALE_PX:])
    long = overlay(crop, {"a-member-with-a-name-that-is-far-too-long-for-its-panel": corner_map()})
    assert (long[:TITLE_PX, -EDGE_PX:] == 255).all()
    assert (long[:TITLE_PX] < 100).any()


def test_a_flat_map_says_so() -> None:
    crop = np.full((64, 64, 3), 128, dtype=np.uint8)
    picture = overlay(crop, {"a": np.full((4, 4), 0.5, dtype=np.float32)})
    assert (picture[TITLE_PX:-SCALE_PX] == 128).all()
    assert (picture[-SCALE_PX:] < 100).any()
