"""Settings from config.yaml, the environment and --set, validated on load; and back to YAML (DESIGN 2).

`stream/config.py` is the one place that knows keys, defaults, units, ranges and reasons; `config.yaml` is
`to_yaml(Config())`, kept honest by a test.
"""

import difflib
import json
import os
import re
import types
import typing
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo

from stream.config import Config
from stream.errors import Code, UnmaskError

DEFAULT_FILE = "config.yaml"
"""Read from the working directory when no --config is given and it exists."""

ENVIRONMENT_PREFIX = "UNMASK_"
"""`UNMASK_MEDIA__CHUNK_MS=250` sets media.chunk_ms."""

EXPONENT = re.compile(r"[-+]?\d+(\.\d*)?[eE][-+]?\d+")

LINE_WIDTH = 110
"""Comments in config.yaml wrap at the line length of the project."""


def _sections(model: type[BaseModel]) -> dict[str, type[BaseModel]]:
    return {
        name: field.annotation
        for name, field in model.model_fields.items()
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel)
    }


def _settings() -> dict[str, FieldInfo]:
    sections = _sections(Config)
    top = {name: field for name, field in Config.model_fields.items() if name not in sections}
    below = {
        f"{section}.{name}": field
        for section, model in sections.items()
        for name, field in model.model_fields.items()
    }
    return top | below


SETTINGS: Mapping[str, FieldInfo] = types.MappingProxyType(_settings())
"""Every setting by its dotted path."""


@dataclass(frozen=True, slots=True)
class _Given:
    """A value that somebody set, and where."""

    value: Any
    where: str


def load(path: Path | None, overrides: Sequence[str], environ: Mapping[str, str]) -> Config:
    """Return the settings: defaults, then the file, then `UNMASK_*` of `environ`, then `overrides`.

    `path` None reads `config.yaml` of the working directory if there is one. `overrides` are "a.b=value".
    The thresholds of the file that `verdict.calibration` names stand above all of them.
    Raises `UnmaskError` (CONFIG) naming path, value, where it was set and what would be right.
    """
    if path is None and Path(DEFAULT_FILE).is_file():
        path = Path(DEFAULT_FILE)
    given: dict[str, _Given] = {}
    if path is not None:
        given |= _from_file(path)
    given |= _from_environment(environ)
    given |= _from_overrides(overrides)
    tree: dict[str, Any] = {}
    for key, found in given.items():
        section, _, name = key.rpartition(".")
        (tree.setdefault(section, {}) if section else tree)[name] = found.value
    try:
        # JSON, because a list is then a tuple's equal although types are strict.
        settings = Config.model_validate_json(json.dumps(tree, default=str))
    except ValidationError as error:
        sentences = dict.fromkeys(_sentence(item["loc"], item["msg"], given) for item in error.errors())
        raise UnmaskError(Code.CONFIG, "; ".join(sentences)) from None
    return _calibrated(settings) if settings.verdict.calibration else settings


def _calibrated(settings: Config) -> Config:
    from stream.own import in_force

    return in_force(settings)


def _from_file(path: Path) -> dict[str, _Given]:
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        reason = os.strerror(error.errno).lower() if error.errno else "cannot be read"
        raise UnmaskError(Code.CONFIG, f"config file {path} cannot be read: {reason}") from None
    except UnicodeDecodeError:
        raise UnmaskError(Code.CONFIG, f"config file {path} is not UTF-8 text") from None
    try:
        root = yaml.compose(text, Loader=yaml.SafeLoader)
        return {} if root is None else dict(_leaves(root, "", path.name, yaml.SafeLoader(text)))
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f"{path} line {mark.line + 1}" if mark else str(path)
        raise UnmaskError(Code.CONFIG, f"{where} is not YAML: {getattr(error, 'problem', error)}") from None


def _leaves(node: yaml.Node, prefix: str, file: str, loader: yaml.SafeLoader) -> Iterator[tuple[str, _Given]]:
    """Yield every setting below `node` with its line; refuse keys that are none or come twice."""
    if not isinstance(node, yaml.MappingNode):
        line = node.start_mark.line + 1
        if prefix and loader.construct_object(node) is None:
            return
        raise UnmaskError(
            Code.CONFIG, f"{prefix or file} ({file} line {line}) must be settings as `name: value`"
        )
    seen: set[str] = set()
    for key_node, value_node in node.value:
        where = f"{file} line {key_node.start_mark.line + 1}"
        key = f"{prefix}.{key_node.value}" if prefix else str(key_node.value)
        if key in seen:
            raise UnmaskError(Code.CONFIG, f"{key} is set twice ({where}); once would be right")
        seen.add(key)
        if key in _sections(Config):
            yield from _leaves(value_node, key, file, loader)
            continue
        _check_known(key, where)
        value = loader.construct_object(value_node, deep=True)
        yield key, _Given(_plain_number(key, value), where)


def _from_environment(environ: Mapping[str, str]) -> dict[str, _Given]:
    """Read `UNMASK_A__B`. Other names with the prefix are left alone: Kubernetes makes some for a service."""
    given = {}
    for name in sorted(environ):
        if not name.startswith(ENVIRONMENT_PREFIX):
            continue
        key = name.removeprefix(ENVIRONMENT_PREFIX).lower().replace("__", ".")
        if "." not in key and key not in SETTINGS:
            continue
        where = f"environment variable {name}"
        _check_known(key, where)
        given[key] = _Given(_parse(key, environ[name], where), where)
    return given


def _from_overrides(overrides: Sequence[str]) -> dict[str, _Given]:
    given = {}
    for override in overrides:
        key, equals, text = override.partition("=")
        if not equals:
            raise UnmaskError(
                Code.CONFIG, f"--set {override} has no value; it must look like --set sampling.idle_fps=4"
            )
        _check_known(key.strip(), "--set")
        given[key.strip()] = _Given(_parse(key.strip(), text, "--set"), "--set")
    return given


def _parse(key: str, text: str, where: str) -> Any:
    if SETTINGS[key].annotation is str:
        return text
    try:
        return _plain_number(key, yaml.safe_load(text))
    except yaml.YAMLError:
        raise UnmaskError(Code.CONFIG, _wrong(key, _Given(text, where))) from None


def _plain_number(key: str, value: Any) -> Any:
    """Return `value`, a number like 1e-5 as one: YAML 1.1 takes it for text, having no decimal point."""
    if SETTINGS[key].annotation is float and isinstance(value, str) and EXPONENT.fullmatch(value):
        return float(value)
    return value


def _check_known(key: str, where: str) -> None:
    if key in SETTINGS:
        return
    if key in _sections(Config):
        names = ", ".join(name for name in SETTINGS if name.startswith(f"{key}."))
        raise UnmaskError(Code.CONFIG, f"{key} ({where}) is a group of settings; set one of {names}")
    section, _, name = key.rpartition(".")
    same_name = [path for path in SETTINGS if path.rpartition(".")[2] == name]
    near = same_name or difflib.get_close_matches(key, SETTINGS, n=1, cutoff=0.6)
    if near:
        hint = f"did you mean {near[0]}?"
    elif section in _sections(Config):
        hint = f"{section} has " + ", ".join(_sections(Config)[section].model_fields)
    else:
        hint = "`unmask config` prints every setting"
    raise UnmaskError(Code.CONFIG, f"{key} ({where}) is not a setting; {hint}")


def _sentence(loc: tuple[int | str, ...], message: str, given: Mapping[str, _Given]) -> str:
    key = ".".join(str(part) for part in loc[:2])
    if key not in given:
        key = key.rpartition(".")[0] or key
    if key in given:
        return _wrong(key, given[key])
    return message.removeprefix("Value error, ")


def _wrong(key: str, given: _Given) -> str:
    shown = json.dumps(given.value, default=str)
    return f"{key} is {shown[:80]} ({given.where}); it must be {describe(SETTINGS[key])}"


_KINDS: Mapping[Any, str] = {
    int: "a whole number",
    float: "a number",
    bool: "true or false",
    str: "text",
    types.NoneType: "null",
}


def describe(field: FieldInfo) -> str:
    """Return what values a setting takes, like "a whole number from 50 to 5000 (ms)"."""
    unit = _unit(field)
    kind, *others = _kinds(field.annotation)
    parts = [kind, _range(field), f"({unit})" if unit else "", *(f"or {other}" for other in others)]
    return " ".join(part for part in parts if part)


def _summary(field: FieldInfo) -> str:
    """Return unit and range for a comment, like "ms, from 50 to 5000"; the value itself shows its type."""
    parts = [_unit(field), _range(field)]
    return ", ".join(part for part in parts if part) or describe(field)


def _unit(field: FieldInfo) -> str:
    extra = field.json_schema_extra
    return str(extra["unit"]) if isinstance(extra, dict) else ""


def _kinds(annotation: Any) -> list[str]:
    arguments = typing.get_args(annotation)
    match typing.get_origin(annotation):
        case typing.Literal:
            return ["one of " + ", ".join(str(value) for value in arguments)]
        case types.UnionType:
            return [kind for argument in arguments for kind in _kinds(argument)]
        case origin if origin is tuple:
            choices = typing.get_args(arguments[0])
            return [f"a list of {', '.join(choices)}" if choices else "a list of names, like [a, b]"]
        case _:
            return [_KINDS[annotation]]


def _range(field: FieldInfo) -> str:
    bounds = {name: getattr(item, name) for item in field.metadata for name in _BOUNDS if hasattr(item, name)}
    match {name: value for name, value in bounds.items() if value is not None}:
        case {"ge": low, "le": high}:
            return f"from {low:g} to {high:g}"
        case {"gt": low, "le": high}:
            return f"above {low:g}, at most {high:g}"
        case {"gt": low, "lt": high}:
            return f"between {low:g} and {high:g}"
        case {"ge": low}:
            return f"at least {low:g}"
        case {"gt": low}:
            return f"above {low:g}"
        case {"pattern": pattern}:
            return f"matching {pattern}"
        case _:
            return ""


_BOUNDS = ("gt", "ge", "lt", "le", "pattern")


def to_yaml(config: Config, show: Callable[[str], str] = str) -> str:
    """Return `config` as YAML, every key under a comment with its unit, range and reason.

    `show` is applied to every text value (redaction). `load` of the result gives `config` again.
    """
    lines = [
        "# Every setting of Unmask with its default. A wrong key, type or range is refused at start.",
        "# The environment (UNMASK_SAMPLING__IDLE_FPS=4) and --set sampling.idle_fps=4 override this file.",
        "",
        *_setting_lines(config, Config, "", show),
    ]
    for name, model in _sections(Config).items():
        lines += [
            "",
            f"# {model.__doc__}",
            f"{name}:",
            *_setting_lines(getattr(config, name), model, "  ", show),
        ]
    return "\n".join(lines) + "\n"


def _setting_lines(
    values: BaseModel, model: type[BaseModel], indent: str, show: Callable[[str], str]
) -> Iterator[str]:
    for name, field in model.model_fields.items():
        if name in _sections(model):
            continue
        yield from _comment(f"{field.description} [{_summary(field)}]", indent)
        yield f"{indent}{name}: {_scalar(getattr(values, name), show)}"


def _comment(text: str, indent: str) -> Iterator[str]:
    line = f"{indent}#"
    for word in text.split():
        if len(line) + 1 + len(word) > LINE_WIDTH:
            yield line
            line = f"{indent}#"
        line += f" {word}"
    yield line


def _scalar(value: Any, show: Callable[[str], str]) -> str:
    """Return a value in YAML's flow form, which for these types is JSON's."""
    if isinstance(value, tuple):
        return "[" + ", ".join(_scalar(item, show) for item in value) + "]"
    if isinstance(value, str):
        return json.dumps(show(value))
    return json.dumps(value)
