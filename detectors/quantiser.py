"""How coarsely a decoded picture was quantised, as its bitstream tells.

FFmpeg hands it out as side data of a frame whose decoder was opened with `OPTIONS`; some 0.1 ms a frame of
1080p. H.264 alone: the scales of other codecs differ, and FFmpeg tells nothing of HEVC and AV1.
"""

from typing import Any

import numpy as np
from av.sidedata.encparams import VideoEncParamsType

OPTIONS = {"export_side_data": "venc_params"}
"""Of a decoder, so that its frames tell."""

DELTA_AT = 16
"""Bytes into a block's record (`AVVideoBlockParams`: x, y, width, height) at which its difference stands."""


def mean_qp(frame: Any) -> float | None:
    """Return the mean quantiser of the macroblocks of an `av.VideoFrame`, 0..51; None if it does not tell."""
    told = frame.side_data.get("VIDEO_ENC_PARAMS")
    if told is None or told.codec_type != VideoEncParamsType.H264:
        return None
    count, size = told.nb_blocks, told.block_size
    if not count:
        return float(told.qp)
    blocks = np.frombuffer(told, np.uint8, count * size, told.blocks_offset).reshape(count, size)
    deltas = np.ascontiguousarray(blocks[:, DELTA_AT : DELTA_AT + 4]).view(np.int32)
    return float(told.qp + deltas.mean())
