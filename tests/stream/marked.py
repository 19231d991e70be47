"""`python -m tests.stream.marked ...`: the command line, with a member that sees drawn markers."""

import sys

from stream import watch
from stream.assemble import Assembly
from stream.cli import main
from stream.config import Config
from tests.stream.marker import MarkerReader
from tests.stream.story import CALIBRATION, PROVENANCE


class _Marked:
    """Stands in for `stream.assemble.Assembly`."""

    reader = MarkerReader()
    calibration = CALIBRATION
    provenance = PROVENANCE


def _build(config: Config) -> Assembly:
    return _Marked()  # type: ignore[return-value]


if __name__ == "__main__":
    watch.build_reader = _build
    sys.exit(main())
