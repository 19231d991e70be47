"""Sampled frames as RGB pictures: upright, deinterlaced, tone-mapped, square pixels (DESIGN 3.11).

Only sampled frames come here. FFmpeg 8's own scaler does the colour management of HDR (BT.2408: reference
white, 203 nits, becomes SDR white, what is brighter clips), so that a face has the brightness it has in SDR.
"""

from fractions import Fraction
from typing import Any

import av
import cv2
import numpy as np
from av.video.reformatter import ColorTrc, Interpolation, VideoReformatter

from detectors.readings import Image

HDR = (int(ColorTrc.SMPTE2084), int(ColorTrc.ARIB_STD_B67))
"""Transfer functions (PQ, HLG) whose pictures look wrong unless mapped."""

UNTOLD = 2
"""FFmpeg's 'unspecified' for primaries, transfer and matrix."""

SQUARE = Fraction(1)

MAX_STRETCH = 4
"""Pixel aspects beyond 1:4 or 4:1 are damage, not anamorphic video (the widest in use is 32:15)."""

_TURNS = {
    90: cv2.ROTATE_90_CLOCKWISE,
    180: cv2.ROTATE_180,
    270: cv2.ROTATE_90_COUNTERCLOCKWISE,
}

_MATRICES = {1: "bt709", 5: "bt470bg", 6: "smpte170m", 7: "smpte240m", 9: "bt2020nc", 10: "bt2020c"}
"""AVColorSpace numbers by the names that the filter `buffer` takes."""


class Pictures:
    """Converts frames of one decoder; keeps the scalers between frames of the same shape."""

    def __init__(self, detect_width: int) -> None:
        self._detect_width = detect_width
        self._full = VideoReformatter()
        self._reduced = VideoReformatter()
        self._mapper: tuple[object, av.filter.Graph] | None = None

    def convert(
        self,
        frame: av.VideoFrame,
        rotation: int = 0,
        pixel_aspect: Fraction | None = None,
        reduced: bool = True,
    ) -> tuple[Image, Image]:
        """Return (picture in full resolution, picture at most `detect_width` wide), both RGB and upright.

        Arrays of their own, but a picture that is narrow already, or not wanted `reduced`, is returned twice.
        `rotation` is clockwise degrees (0, 90, 180, 270); `pixel_aspect` width : height of a pixel, None or 0
        if unknown.
        """
        frame = self._clean(frame)
        width, height = frame.width, frame.height
        aspect = pixel_aspect or SQUARE
        if aspect != SQUARE and Fraction(1, MAX_STRETCH) <= aspect <= MAX_STRETCH:
            width = max(1, round(width * aspect))
        image = _upright(self._rgb(self._full, frame, width, height), rotation)
        upright_width = image.shape[1]
        if upright_width <= self._detect_width or not reduced:
            return image, image
        scale = self._detect_width / upright_width
        small = self._rgb(self._reduced, frame, max(1, round(width * scale)), max(1, round(height * scale)))
        return image, _upright(small, rotation)

    @staticmethod
    def _rgb(scaler: VideoReformatter, frame: av.VideoFrame, width: int, height: int) -> Image:
        # AREA: what the training crops were reduced with; the bilinear kinds alias at a third of the size.
        rgb = scaler.reformat(frame, width, height, "rgb24", interpolation=Interpolation.AREA, threads=1)
        plane: Any = rgb.planes[0]
        rows = np.frombuffer(plane, np.uint8).reshape(height, plane.line_size)
        image: Image = rows[:, : 3 * width].reshape(height, width, 3)
        return image

    def _clean(self, frame: av.VideoFrame) -> av.VideoFrame:
        """Return the frame deinterlaced and in SDR; itself if it is both already."""
        if frame.interlaced_frame:
            # Within the one frame: its neighbours in time are gone when it is sampled. A graph for each
            # frame, since the filter keeps the frame before.
            graph = _graph(frame, [("estdif", "mode=frame")])
            graph.push(frame)
            graph.push(None)
            frame = _pull(graph)
        if int(frame.color_trc) not in HDR:
            return frame
        if int(frame.color_primaries) == UNTOLD:
            frame.color_primaries = 9  # BT.2020, the primaries of both HDR standards (BT.2100)
        graph = self._mapping(frame)
        graph.push(frame)
        return _pull(graph)

    def _mapping(self, frame: av.VideoFrame) -> av.filter.Graph:
        """Return the graph that maps frames like this one; making one takes seconds (a table of colours)."""
        shape = (frame.width, frame.height, frame.format.name, frame.colorspace, frame.color_range)
        key = (*shape, int(frame.color_trc), int(frame.color_primaries))
        if self._mapper is None or self._mapper[0] != key:
            filters = [("scale", "out_color_matrix=bt709:out_primaries=bt709:out_transfer=bt709")]
            self._mapper = (key, _graph(frame, [*filters, ("format", "pix_fmts=rgb24")]))
        return self._mapper[1]


def _graph(frame: av.VideoFrame, filters: list[tuple[str, str]]) -> av.filter.Graph:
    """Return a chain of filters, configured for frames like this one."""
    matrix = _MATRICES.get(int(frame.colorspace), "unknown")
    if int(frame.color_trc) in HDR and matrix == "unknown":
        matrix = "bt2020nc"
    span = "pc" if int(frame.color_range) == 2 else "tv"
    graph = av.filter.Graph()
    graph.threads = 1
    last = graph.add(
        "buffer",
        f"video_size={frame.width}x{frame.height}:pix_fmt={frame.format.name}:time_base=1/1000000"
        f":colorspace={matrix}:range={span}",
    )
    for name, arguments in [*filters, ("buffersink", "")]:
        following = graph.add(name, arguments)
        last.link_to(following)
        last = following
    graph.configure()
    return graph


def _pull(graph: av.filter.Graph) -> av.VideoFrame:
    frame = graph.pull()
    assert isinstance(frame, av.VideoFrame)
    return frame


def _upright(image: Image, rotation: int) -> Image:
    if rotation not in _TURNS:
        return image
    turned: Image = cv2.rotate(image, _TURNS[rotation])
    return turned
