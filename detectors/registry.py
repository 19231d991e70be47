"""What networks there are: the members shipped with Unmask, and the ten published ones that a user may pull.

Reads records and files only, never a network: it is quick, and needs no torch.
"""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from types import MappingProxyType
from typing import Any

SHIPPED = Path(__file__).parent / "weights"
RECORD, WEIGHTS = "member.json", "weights.safetensors"

PREFIX = "published:"
"""How a published checkpoint is written in `members.names`, so that no folder is mistaken for one."""

FOLDER = "models"
"""Where pulled checkpoints lie in the cache folder (`engines.cache_dir`)."""

BASE_URL = "https://f002.backblazeb2.com/file/icpr2020"
"""Where the authors put them."""

PAPER = 'Bonettini et al., "Video Face Manipulation Detection through Ensemble of CNNs", ICPR 2020'
LICENCE = "code: GPL-3.0 repository of the authors; weights: research, no licence stated"
TERMS = f"""\
These are weights of {PAPER}.
Unmask neither ships nor owns them: they come from the authors' own address.
  code     GPL-3.0, the repository of the authors; Unmask contains none of it
  weights  research, no licence stated
  data     trained on FaceForensics++ or DFDC, whose own terms (research) apply
Whether your use is allowed is between you and the authors."""

INPUT = (
    "float32 [N, 3, 224, 224], RGB in 0..1 normalised by ImageNet's mean and std; the face box grown by 20 % "
    "of its height left, right and below and by 40 % above, the square about that, PIL's bilinear"
)
OUTPUT = "logit float32 [N], above 0 means manipulated; attention float32 [N, h, w] in 0..1"


class RegistryError(ValueError):
    """A name or record that there is not, or not so; the message says what there is."""


class State(StrEnum):
    """How a network's weights lie on this machine."""

    RIGHT = "right"
    """There, with the hash of its record."""
    DIFFERS = "differs"
    """There, with another hash."""
    PARTIAL = "partial"
    """A pull was stopped; the next one goes on."""
    ABSENT = "absent"


@dataclass(frozen=True, slots=True)
class Figures:
    """LogLoss in nats and area under the ROC curve, 0..1."""

    log_loss: float
    auc: float

    def __str__(self) -> str:
        return f"{self.log_loss:.4f}/{self.auc:.4f}"


@dataclass(frozen=True, slots=True)
class Row:
    """A row of the paper's table: one set of networks, trained and tested on the same data set."""

    frame: Figures
    video: Figures


@dataclass(frozen=True, slots=True)
class Published:
    """One published checkpoint. `layout` is its network's name there, `paper_name` that in the paper."""

    name: str
    layout: str
    paper_name: str
    trained_on: str
    sha256: str

    @property
    def file_name(self) -> str:
        return f"{self.name}_bestval-{self.sha256}.pth"

    def path(self, cache: Path) -> Path:
        """Where it lies once pulled."""
        return cache / FOLDER / self.file_name


@dataclass(frozen=True, slots=True)
class Recogniser:
    """A network that says whom a face looks like; of no member. Its file lies at `base`/`file_name`."""

    name: str
    file_name: str
    sha256: str
    base: str
    trained_on: str
    licence: str
    terms: str

    def path(self, cache: Path) -> Path:
        """Where it lies once pulled."""
        return cache / FOLDER / self.file_name


FACENET = Recogniser(
    name="facenet",
    file_name="20180402-114759-vggface2.pt",
    sha256="281cebca8662831adb987a874bdcb36e73f5b1c6dc5ee5878f305e985625d99b",
    base="https://github.com/timesler/facenet-pytorch/releases/download/v2.2.9",
    trained_on="VGGFace2",
    licence="code: MIT (facenet-pytorch; the weights are those of davidsandberg/facenet, MIT, ported)",
    terms="""\
These are weights of InceptionResnetV1 of the package facenet-pytorch, ported from davidsandberg/facenet.
Unmask neither ships nor owns them: they come from the authors' own address.
  code     MIT
  weights  MIT, as the repository they are published in; nothing is said of them apart
  data     trained on VGGFace2, pictures of public people found on the web, whose own terms apply
They tell people apart by their faces. Where you are, law may forbid or bind that (in the EU, the GDPR's
article 9 on biometric data). Whether your use is allowed is for you to know; docs/identity.md says what is
kept of whom.""",
)
"""For the cues identity and claim. The hash is the one that many projects pin. Not pulled by this project
yet, which had no network for it."""

FFPP, DFDC = "FaceForensics++ c23", "DFDC"
DATA_SETS: Mapping[str, str] = MappingProxyType({"FFPP": FFPP, "DFDC": DFDC})

PAPER_NAMES: Mapping[str, str] = MappingProxyType(
    {
        "Xception": "Xception",
        "EfficientNetB4": "B4",
        "EfficientNetB4ST": "B4ST",
        "EfficientNetAutoAttB4": "B4Att",
        "EfficientNetAutoAttB4ST": "B4AttST",
    }
)
"""By the checkpoints' names, in the order of the paper's table. Its "Att" is their "AutoAtt"."""

BASELINE = "Xception"
"""In the paper's table for comparison only, in no ensemble."""

_HASHES = {
    "EfficientNetAutoAttB4ST_DFDC": "4df0ef7d2f380a5955affa78c35d0942ac1cd65229510353b252737775515a33",
    "EfficientNetAutoAttB4ST_FFPP": "ddb357503b9b902e1b925c2550415604c4252b9b9ecafeb7369dc58cc16e9edd",
    "EfficientNetAutoAttB4_DFDC": "72ed969b2a395fffe11a0d5bf0a635e7260ba2588c28683630d97ff7153389fc",
    "EfficientNetAutoAttB4_FFPP": "b0c9e9522a7143cf119843e910234be5e30f77dc527b1b427cdffa5ce3bdbc25",
    "EfficientNetB4ST_DFDC": "86f0a0701b18694dfb5e7837bd09fa8e48a5146c193227edccf59f1b038181c6",
    "EfficientNetB4ST_FFPP": "ccd016668071be5bf5fff68e446d055441739ec7113fb1a6eee998f08396ae92",
    "EfficientNetB4_DFDC": "c9f3663e2116d3356d056a0ce6453e0fc412a8df68ebd0902f07104d9129a09a",
    "EfficientNetB4_FFPP": "93aaad84946829e793d1a67ed7e0309b535e2f2395acb4f8d16b92c0616ba8d7",
    "Xception_DFDC": "e826cdb64d73ef491e6b8ff8fce0e1e1b7fc1d8e2715bc51a56280fff17596f9",
    "Xception_FFPP": "bb119e4913cb8f816cd28a03f81f4c603d6351bf8e3f8e3eb99eebc923aecd22",
}


def _published() -> dict[str, Published]:
    records = {}
    for short, data_set in DATA_SETS.items():
        for layout, paper_name in PAPER_NAMES.items():
            name = f"{layout}_{short}"
            records[name] = Published(name, layout, paper_name, data_set, _HASHES[name])
    return records


PUBLISHED: Mapping[str, Published] = MappingProxyType(_published())


def _row(frame: tuple[float, float], video: tuple[float, float]) -> Row:
    return Row(Figures(*frame), Figures(*video))


PAPER_TABLE: Mapping[str, Mapping[frozenset[str], Row]] = MappingProxyType(
    {
        FFPP: {
            frozenset({"Xception"}): _row((0.3844, 0.9273), (0.2694, 0.9583)),
            frozenset({"B4"}): _row((0.3777, 0.9382), (0.2456, 0.9664)),
            frozenset({"B4ST"}): _row((0.3439, 0.9337), (0.2395, 0.9674)),
            frozenset({"B4Att"}): _row((0.3873, 0.9360), (0.2633, 0.9650)),
            frozenset({"B4AttST"}): _row((0.3597, 0.9293), (0.2621, 0.9633)),
            frozenset({"B4", "B4ST"}): _row((0.3411, 0.9413), (0.2322, 0.9683)),
            frozenset({"B4", "B4Att"}): _row((0.3566, 0.9428), (0.2456, 0.9679)),
            frozenset({"B4", "B4ST", "B4Att"}): _row((0.3371, 0.9441), (0.2355, 0.9689)),
            frozenset({"B4", "B4ST", "B4Att", "B4AttST"}): _row((0.3294, 0.9444), (0.2352, 0.9689)),
        },
        DFDC: {
            frozenset({"Xception"}): _row((0.4897, 0.8784), (0.2537, 0.9497)),
            frozenset({"B4"}): _row((0.4819, 0.8766), (0.2637, 0.9473)),
            frozenset({"B4ST"}): _row((0.5075, 0.8658), (0.3179, 0.9414)),
            frozenset({"B4Att"}): _row((0.5133, 0.8642), (0.2830, 0.9430)),
            frozenset({"B4AttST"}): _row((0.5507, 0.8360), (0.3595, 0.9229)),
            frozenset({"B4", "B4ST"}): _row((0.4687, 0.8800), (0.2750, 0.9486)),
            frozenset({"B4", "B4Att"}): _row((0.4731, 0.8785), (0.2650, 0.9483)),
            frozenset({"B4", "B4ST", "B4Att"}): _row((0.4640, 0.8813), (0.2708, 0.9492)),
            frozenset({"B4", "B4ST", "B4Att", "B4AttST"}): _row((0.4658, 0.8782), (0.2817, 0.9473)),
        },
    }
)
"""Figures of the paper on its own test splits, by the data set trained and tested on, then by networks."""


def find_published(name: str) -> Published:
    """Returns the record of a checkpoint, named with or without `published:`. Raises RegistryError."""
    try:
        return PUBLISHED[name.removeprefix(PREFIX)]
    except KeyError:
        raise RegistryError(
            f"published network {name!r} is unknown; there are: {', '.join(PUBLISHED)}"
        ) from None


def paper_figures(names: frozenset[str]) -> Row | None:
    """Returns the paper's figures for these checkpoints together, None where the paper has none."""
    bare = {name.removeprefix(PREFIX) for name in names}
    records = [PUBLISHED[name] for name in bare if name in PUBLISHED]
    data_sets = {record.trained_on for record in records}
    if len(records) != len(names) or len(data_sets) != 1:
        return None
    return PAPER_TABLE[data_sets.pop()].get(frozenset(record.paper_name for record in records))


def is_baseline(name: str) -> bool:
    """Returns whether this is the paper's baseline, which is in no ensemble."""
    record = PUBLISHED.get(name.removeprefix(PREFIX))
    return record is not None and record.paper_name == BASELINE


def short_name(name: str) -> str:
    """Returns the paper's name of a published checkpoint, any other name as it is."""
    record = PUBLISHED.get(name.removeprefix(PREFIX))
    return name if record is None else record.paper_name


def shipped(folder: Path = SHIPPED) -> dict[str, dict[str, Any]]:
    """Returns `member.json` of every shipped member, by name. Raises RegistryError if one is broken."""
    return {path.parent.name: _record(path) for path in sorted(folder.glob(f"*/{RECORD}"))}


def _record(path: Path) -> dict[str, Any]:
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise RegistryError(f"{path}: {error}") from error
    if not isinstance(record, dict):
        raise RegistryError(f"{path}: expected an object")
    return record


def describe(record: Published) -> dict[str, Any]:
    """Returns everything known of a published checkpoint, as JSON."""
    figures = paper_figures(frozenset({record.name}))
    return {
        "name": PREFIX + record.name,
        "paper": PAPER,
        "name_in_paper": record.paper_name,
        "address": f"{BASE_URL}/{record.file_name}",
        "sha256": record.sha256,
        "licence": LICENCE,
        "training_data": record.trained_on,
        "input": INPUT,
        "output": OUTPUT,
        "metrics": {}
        if figures is None
        else {
            f"published, {record.trained_on} test split, by {unit}": {
                "log_loss": found.log_loss,
                "auc": found.auc,
            }
            for unit, found in (("frame", figures.frame), ("video", figures.video))
        },
    }


def state(path: Path, sha256: str) -> State:
    """Hashes a file and says how it stands to its record. Raises OSError when it cannot be read."""
    try:
        found = file_sha256(path)
    except FileNotFoundError:
        return State.PARTIAL if part_of(path).exists() else State.ABSENT
    return State.RIGHT if found == sha256 else State.DIFFERS


def part_of(path: Path) -> Path:
    """Where a pull keeps what has come so far."""
    return path.with_name(path.name + ".part")


def file_sha256(path: Path) -> str:
    """SHA-256 of a file, in hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
