"""What is left of a member's judgement when the picture gets worse: the robustness table.

Every condition is applied to the crop at the size it had in its picture, and the quality gate judges the
result, as at run time. Only then is it brought to the network's size. Figures: AUC of the logit over all
crops, decided or not, and what the decided verdict makes of it: false positives (authentic crops called
manipulated, of all authentic ones), coverage (crops decided, of all) and recall (manipulated crops called
manipulated, of all manipulated ones). Intervals are bootstraps over people.
"""

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from enum import StrEnum
from fractions import Fraction
from typing import Any

import av
import cv2
import numpy as np
from numpy.typing import NDArray

from detectors.crops import recrop
from detectors.members import Member, crop_logits
from detectors.occlusion import POLICY, shipped_estimate
from detectors.quality import QualityLimits, measure, with_covered, with_qp
from detectors.quantiser import OPTIONS, mean_qp
from detectors.readings import Image, Quality, Reason, Visible
from detectors.training.metrics import auc, bootstrap_by_identity
from detectors.training.probes import Probe, resized

FRAMES = 8
"""Jittered copies in front of an encoder: enough for it to predict from, few enough to encode thousands."""
TAKEN = 5
"""The frame taken back: neither first, which would be a keyframe, nor last."""
JITTER_PX = 1.5
"""How far a head moves between two frames of a talking person, in pixels."""
NOISE = 10.0
"""Grey levels of sensor noise: a phone indoors."""
DARK = 0.3
"""Share of the light that is left in the dark condition; sensor noise of DARK_NOISE grey levels with it."""
DARK_NOISE = 2.5
X264 = "keyint=250:scenecut=0:threads=1:cpu-independent=1:log-level=none"
"""One keyframe, and the same bits each time: without `cpu-independent` x264's macroblock tree was seen to
differ between two runs on one machine."""
COVER = 128
"""Grey of what covers half of a face: no mask or headset has one colour, and none is learned."""
SMALLEST_PX = 16
DRAWS = 1000
"""Of people, for an interval."""

Condition = Callable[[Image, np.random.Generator], Image]
"""A crop at source size in, the degraded one out, uint8 RGB; it may be smaller."""


class Decision(StrEnum):
    AUTHENTIC = "authentic"
    MANIPULATED = "manipulated"
    INCONCLUSIVE = "inconclusive"


Decide = Callable[[Mapping[str, float], Quality], tuple[Decision, tuple[Reason, ...]]]
"""From the raw logits by member and the picture's quality to what would be said, and why nothing is said."""


@dataclass(frozen=True, slots=True)
class Readings:
    """One condition's logits float32 [N] by member, and the N qualities: of the pictures by themselves, and,
    where an encoder was at work, of the same in a video whose decoder tells the quantiser."""

    logits: Mapping[str, NDArray[np.float32]]
    quality: Sequence[Quality]
    in_video: Sequence[Quality] | None = None


@dataclass(frozen=True, slots=True)
class Rate:
    """A figure with its 95 % interval; NaN where nothing of the class is there."""

    value: float
    low: float
    high: float


@dataclass(frozen=True, slots=True)
class Row:
    """One condition's figures. `undecided` are the reasons given, with the share of all crops for each."""

    condition: str
    auc: Rate
    false_positives: Rate
    coverage: Rate
    recall: Rate
    undecided: Mapping[str, float]

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def blurred(sigma: float) -> Condition:
    return lambda image, _: _bytes(cv2.GaussianBlur(image, (0, 0), sigma))


def rescaled(factor: float) -> Condition:
    """As a stream of lower resolution delivers it: the face stays small."""
    return lambda image, _: resized(image, _scaled(image, factor))


def rescaled_back(factor: float) -> Condition:
    """As a stream that was enlarged again delivers it: the face keeps its size and loses its detail."""
    return lambda image, _: resized(resized(image, _scaled(image, factor)), (image.shape[1], image.shape[0]))


def jpeg(quality: int) -> Condition:
    def apply(image: Image, rng: np.random.Generator) -> Image:
        _, coded = cv2.imencode(".jpg", image[:, :, ::-1], [cv2.IMWRITE_JPEG_QUALITY, quality])
        decoded = cv2.imdecode(coded, cv2.IMREAD_COLOR)
        if decoded is None:
            raise ValueError(f"JPEG of quality {quality} cannot be read back")
        return _bytes(decoded[:, :, ::-1])

    return apply


@dataclass(frozen=True, slots=True)
class H264:
    """A P or B frame of eight jittered copies encoded by x264, as live encoders do: `veryfast`."""

    crf: int

    def __call__(self, image: Image, rng: np.random.Generator) -> Image:
        return coded_h264(image, self.crf, rng)[0]


def noisy(image: Image, rng: np.random.Generator) -> Image:
    return with_noise(image.astype(np.float32), NOISE, rng)


def dark(image: Image, rng: np.random.Generator) -> Image:
    return with_noise(image * np.float32(DARK), DARK_NOISE, rng)


def covered_below(image: Image, _: np.random.Generator) -> Image:
    """A mask: nothing below the middle of the crop is seen."""
    out = image.copy()
    out[out.shape[0] // 2 :] = COVER
    return out


def covered_above(image: Image, _: np.random.Generator) -> Image:
    """A headset: nothing above the middle of the crop is seen."""
    out = image.copy()
    out[: out.shape[0] // 2] = COVER
    return out


CONDITIONS: Mapping[str, Condition] = {
    "clean": lambda image, _: image,
    "blur, sigma 1": blurred(1.0),
    "blur, sigma 2": blurred(2.0),
    "blur, sigma 3": blurred(3.0),
    "0.75x": rescaled(0.75),
    "0.5x": rescaled(0.5),
    "0.33x": rescaled(0.33),
    "0.75x, enlarged again": rescaled_back(0.75),
    "0.5x, enlarged again": rescaled_back(0.5),
    "0.33x, enlarged again": rescaled_back(0.33),
    "JPEG 90": jpeg(90),
    "JPEG 50": jpeg(50),
    "JPEG 30": jpeg(30),
    "H.264 CRF 23": H264(23),
    "H.264 CRF 30": H264(30),
    "H.264 CRF 37": H264(37),
    "noise": noisy,
    "dark": dark,
    "lower half covered": covered_below,
    "upper half covered": covered_above,
}
"""Names as they stand in the table."""


def coded_h264(image: Image, crf: int, rng: np.random.Generator) -> tuple[Image, float | None]:
    """Return the crop as a P or B frame shows it after x264 at `crf`, uint8 of the same shape, and that
    frame's mean quantiser.

    Source: the face is drawn FRAMES times, each a little moved, and the one frame that is not moved is taken
    (a still encoded alone would be a keyframe, which shows nothing of prediction). Raises `RuntimeError` when
    this FFmpeg has no libx264 or the frame is a keyframe all the same.
    """
    height, width = image.shape[:2]
    encoder = av.CodecContext.create("libx264", "w")
    encoder.width, encoder.height = width + width % 2, height + height % 2
    encoder.pix_fmt = "yuv420p"
    encoder.time_base = Fraction(1, 25)
    encoder.options = {
        "crf": str(crf),
        "preset": "veryfast",
        "x264-params": X264,
    }
    even = cv2.copyMakeBorder(image, 0, height % 2, 0, width % 2, cv2.BORDER_REPLICATE)
    packets = []
    for number in range(FRAMES):
        shift = np.zeros(2) if number == TAKEN else rng.uniform(-JITTER_PX, JITTER_PX, 2)
        frame = av.VideoFrame.from_ndarray(_moved(even, shift), format="rgb24").reformat(format="yuv420p")
        frame.pts = number
        packets += encoder.encode(frame)
    packets += encoder.encode(None)
    decoder = av.CodecContext.create("h264", "r")
    decoder.options = OPTIONS
    decoded = [frame for packet in [*packets, None] for frame in decoder.decode(packet)]
    taken = decoded[TAKEN]
    if taken.key_frame:
        raise RuntimeError(f"x264 at CRF {crf} made frame {TAKEN} of {FRAMES} a keyframe")
    return _bytes(taken.to_ndarray(format="rgb24")[:height, :width]), mean_qp(taken)


def read(
    members: Sequence[Member],
    probes: Sequence[Probe],
    condition: Condition,
    seed: int,
) -> Readings:
    """Every member's logits of every probe under `condition`; the same seed gives the same pictures."""
    pictures, quantisers = [], []
    for index, probe in enumerate(probes):
        rng = np.random.default_rng((seed, index))
        if isinstance(condition, H264):
            picture, quantiser = coded_h264(probe.image, condition.crf, rng)
            quantisers.append(quantiser)
        else:
            picture = condition(probe.image, rng)
        pictures.append(picture)
    logits = {member.name: crop_logits(pictures, member) for member in members}
    quality = [quality_of(picture) for picture in pictures]
    if not quantisers:
        return Readings(logits, quality)
    limits = QualityLimits()
    told = [with_qp(one, quantiser, limits) for one, quantiser in zip(quality, quantisers, strict=True)]
    return Readings(logits, quality, told)


def quality_of(picture: Image) -> Quality:
    """The quality of a face that fills its picture, as `unmask score --crops` sees it by default."""
    height, width = picture.shape[:2]
    limits = QualityLimits()
    quality = measure(picture, (0.0, 0.0, float(width), float(height)), None, limits)
    if "sharpness" not in quality.parts:
        return quality
    hidden = shipped_estimate()(recrop(picture, None, POLICY))
    if hidden.visible(limits.max_covered) is Visible.BOTH:
        return quality
    return with_covered(quality, max(hidden.upper, hidden.lower), limits)


def rows(
    name: str,
    readings: Readings,
    probes: Sequence[Probe],
    fuse: Callable[[Mapping[str, float]], float],
    decide: Decide,
) -> list[Row]:
    """The figures of one condition for one way to fuse and decide (one member, or an ensemble): a second row
    for the same in a video, where that differs."""
    found = [_row(name, readings.logits, readings.quality, probes, fuse, decide)]
    if readings.in_video:
        found.append(_row(f"{name}, in a video", readings.logits, readings.in_video, probes, fuse, decide))
    return found


def _row(
    name: str,
    raw: Mapping[str, NDArray[np.float32]],
    quality: Sequence[Quality],
    probes: Sequence[Probe],
    fuse: Callable[[Mapping[str, float]], float],
    decide: Decide,
) -> Row:
    labels = np.array([probe.label for probe in probes])
    identity = np.array([probe.identity for probe in probes])
    logits = by_crop(raw)
    fused = np.array([fuse(of_crop) for of_crop in logits])
    said = [decide(of_crop, of_face) for of_crop, of_face in zip(logits, quality, strict=True)]
    accused = np.array([decision is Decision.MANIPULATED for decision, _ in said])
    decided = np.array([decision is not Decision.INCONCLUSIVE for decision, _ in said])
    reasons = Counter(reasons[0].value for _, reasons in said if reasons)
    return Row(
        condition=name,
        auc=bootstrapped(lambda i: auc(fused[i], labels[i]), identity),
        false_positives=share(accused, labels == 0, identity),
        coverage=share(decided, np.ones(len(labels), bool), identity),
        recall=share(accused, labels == 1, identity),
        undecided={reason: count / len(said) for reason, count in reasons.most_common()},
    )


def by_crop(logits: Mapping[str, NDArray[np.float32]]) -> list[dict[str, float]]:
    """From logits [N] by member to N mappings of member to logit."""
    names = list(logits)
    return [
        dict(zip(names, map(float, values), strict=True))
        for values in zip(*(logits[name] for name in names), strict=True)
    ]


def share(happened: NDArray[np.bool_], among: NDArray[np.bool_], identity: NDArray[Any]) -> Rate:
    """Share of the crops in `among` for which `happened`, with its interval.

    What never happened to n people may still happen to 3 in n (upper 95 % limit); a bootstrap says never.
    """
    chosen = np.flatnonzero(among)
    if not len(chosen):
        return Rate(float("nan"), float("nan"), float("nan"))
    rate = mean(happened[chosen].astype(np.float64), identity[chosen])
    unseen = min(1.0, 3 / len(np.unique(identity[chosen])))
    if rate.value == 0:
        return Rate(0.0, 0.0, unseen)
    return Rate(1.0, 1 - unseen, 1.0) if rate.value == 1 else rate


def mean(values: NDArray[np.floating], identity: NDArray[Any]) -> Rate:
    """Mean of the values [N], with its interval over people; NaN of none."""
    if not len(values):
        return Rate(float("nan"), float("nan"), float("nan"))
    _, person = np.unique(identity, return_inverse=True)
    sums, counts = np.bincount(person, values), np.bincount(person)
    drawn = np.random.default_rng(0).integers(len(sums), size=(DRAWS, len(sums)))
    means = sums[drawn].sum(1) / counts[drawn].sum(1)
    low, high = np.quantile(means, (0.025, 0.975))
    return Rate(float(values.mean()), float(low), float(high))


def bootstrapped(measure: Callable[[NDArray[np.integer]], float], identity: NDArray[Any]) -> Rate:
    """`measure` of all indices, with its interval; NaN where it is not defined."""
    value = measure(np.arange(len(identity)))
    if not np.isfinite(value):
        return Rate(value, float("nan"), float("nan"))
    return Rate(value, *bootstrap_by_identity(measure, identity))


def table(rows: Iterable[Row]) -> list[str]:
    """The rows as lines of Markdown."""
    lines = [
        "| condition | AUC | false positives | coverage | recall | undecided because |",
        "|---|---|---|---|---|---|",
    ]
    for one in rows:
        reasons = ", ".join(f"{name} {value:.2f}" for name, value in list(one.undecided.items())[:3])
        lines.append(
            f"| {one.condition} | {told(one.auc)} | {told(one.false_positives)} | {told(one.coverage)} "
            f"| {told(one.recall)} | {reasons} |"
        )
    return lines


def told(rate: Rate) -> str:
    """A rate as tables show it."""
    if not np.isfinite(rate.value):
        return "–"
    return f"{rate.value:.3f} ({rate.low:.3f} to {rate.high:.3f})"


def _scaled(image: Image, factor: float) -> tuple[int, int]:
    height, width = image.shape[:2]
    return max(SMALLEST_PX, round(width * factor)), max(SMALLEST_PX, round(height * factor))


def _moved(image: Image, shift: NDArray[np.float64]) -> Image:
    height, width = image.shape[:2]
    matrix = np.array([[1, 0, shift[0]], [0, 1, shift[1]]], np.float64)
    return _bytes(cv2.warpAffine(image, matrix, (width, height), borderMode=cv2.BORDER_REPLICATE))


def with_noise(levels: NDArray[np.float32], sigma: float, rng: np.random.Generator) -> Image:
    """Grey levels float32 [H, W, 3] with Gaussian noise of that standard deviation, as uint8."""
    noise = rng.standard_normal(levels.shape, dtype=np.float32) * np.float32(sigma)
    return np.clip(np.rint(levels + noise), 0, 255).astype(np.uint8)


def _bytes(picture: NDArray[Any]) -> Image:
    return np.ascontiguousarray(picture, np.uint8)
