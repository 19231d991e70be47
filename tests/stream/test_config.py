"""Settings: config.yaml agrees with the models, and whatever is wrong is named with what would be right."""

import itertools
from pathlib import Path

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from stream.config import Config, Media
from stream.config_file import SETTINGS, describe, load, to_yaml
from stream.errors import Code, UnmaskError

REPOSITORY = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def refused(**given: object) -> str:
    arguments = {"path": None, "overrides": [], "environ": {}} | given
    with pytest.raises(UnmaskError) as caught:
        load(**arguments)  # type: ignore[arg-type]
    assert caught.value.code is Code.CONFIG
    return str(caught.value)


def test_config_yaml_is_what_the_models_say() -> None:
    text = (REPOSITORY / "config.yaml").read_text()
    assert text == to_yaml(Config()), (
        "write it anew: unmask config > config.yaml, where no other is in effect"
    )


def test_config_yaml_sets_every_key_to_its_default_under_a_comment() -> None:
    path = REPOSITORY / "config.yaml"
    assert load(path, [], {}) == Config()
    tree = yaml.safe_load(path.read_text())
    keys = {
        f"{name}.{key}" if isinstance(value, dict) else name
        for name, value in tree.items()
        for key in (value if isinstance(value, dict) else [None])
    }
    assert keys == set(SETTINGS)
    lines = path.read_text().splitlines()
    for above, line in itertools.pairwise(lines):
        if line and not line.lstrip().startswith("#") and not line.endswith(":"):
            assert above.lstrip().startswith("#"), line


def test_every_setting_has_a_reason() -> None:
    assert [
        path for path, field in SETTINGS.items() if not (field.description or "").endswith((".", ".)"))
    ] == []


def test_nothing_given_is_the_defaults() -> None:
    assert load(None, [], {}) == Config()


def test_later_places_win_over_earlier_ones(tmp_path: Path) -> None:
    file = tmp_path / "other.yaml"
    file.write_text("media:\n  chunk_ms: 100\n  partitions: 3\n  retention_s: 60\n")
    environ = {"UNMASK_MEDIA__CHUNK_MS": "200", "UNMASK_MEDIA__PARTITIONS": "4"}
    config = load(file, ["media.chunk_ms=300"], environ)
    assert config.media == Media(chunk_ms=300, partitions=4, retention_s=60.0)


def test_config_yaml_of_the_working_directory_is_read_unless_another_is_named(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text("prefix: here\n")
    (tmp_path / "other.yaml").write_text("prefix: there\n")
    assert load(None, [], {}).prefix == "here"
    assert load(tmp_path / "other.yaml", [], {}).prefix == "there"


@pytest.mark.parametrize("text", ["", "# nothing\n", "media:\n", "{}"])
def test_empty_files_and_sections_are_the_defaults(tmp_path: Path, text: str) -> None:
    (tmp_path / "config.yaml").write_text(text)
    assert load(None, [], {}) == Config()


@pytest.mark.parametrize(
    ("override", "sentence"),
    [
        ("media.chunk_ms=20", "media.chunk_ms is 20 (--set); it must be a whole number from 50 to 5000 (ms)"),
        (
            "media.chunk_ms=half",
            'media.chunk_ms is "half" (--set); it must be a whole number from 50 to 5000 (ms)',
        ),
        ("media.chunkms=20", "media.chunkms (--set) is not a setting; did you mean media.chunk_ms?"),
        ("chunk_ms=20", "chunk_ms (--set) is not a setting; did you mean media.chunk_ms?"),
        ("log.lease_s=0", "log.lease_s is 0 (--set); it must be a number above 0 (s)"),
        ("log.lease_s=.nan", "log.lease_s is NaN (--set); it must be a number above 0 (s)"),
        ("log.lease_s=", "log.lease_s is null (--set); it must be a number above 0 (s)"),
        ("engines.order=[cuda]", 'engines.order is ["cuda"] (--set); it must be a list of tensorrt, '),
        ("deterministic=1", "deterministic is 1 (--set); it must be true or false"),
        (
            "verdict.close_probability=0.95",
            "verdict.close_probability is 0.95; it must be below verdict.open_probability (0.9)",
        ),
        ("media.chunk_ms", "--set media.chunk_ms has no value; it must look like --set sampling.idle_fps=4"),
        ("worker=1", "worker (--set) is a group of settings; set one of worker.stall_s, "),
    ],
)
def test_what_is_wrong_is_named_with_what_would_be_right(override: str, sentence: str) -> None:
    assert refused(overrides=[override]).startswith(sentence)


def test_two_wrong_settings_are_both_named() -> None:
    sentence = refused(overrides=["media.chunk_ms=20", "faces.max_faces=0"])
    assert "media.chunk_ms is 20" in sentence
    assert "faces.max_faces is 0" in sentence


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("media:\n  # short\n  chunk_ms: 20\n", "media.chunk_ms is 20 (config.yaml line 3); it must be"),
        (
            "media:\n  chunk: 20\n",
            "media.chunk (config.yaml line 2) is not a setting; did you mean media.chunk_ms?",
        ),
        ("media: 3\n", "media (config.yaml line 1) must be settings as `name: value`"),
        ("- media\n", "config.yaml (config.yaml line 1) must be settings as `name: value`"),
        ("prefix: a\nprefix: b\n", "prefix is set twice (config.yaml line 2); once would be right"),
        ("media: [\n", "config.yaml line 2 is not YAML: "),
        ("prefix: !!python/object:os.system x\n", "config.yaml line 1 is not YAML: "),
        (
            "sampling: {idle_fps: 2024-01-01}\n",
            'sampling.idle_fps is "2024-01-01" (config.yaml line 1); it must be',
        ),
    ],
)
def test_what_is_wrong_in_a_file_is_named_with_its_line(tmp_path: Path, text: str, sentence: str) -> None:
    (tmp_path / "config.yaml").write_text(text)
    assert refused().startswith(sentence)


def test_a_named_file_must_be_readable(tmp_path: Path) -> None:
    assert refused(path=tmp_path / "none.yaml").endswith(
        "none.yaml cannot be read: no such file or directory"
    )
    (tmp_path / "binary.yaml").write_bytes(b"\xff\xfe\xfa")
    assert refused(path=tmp_path / "binary.yaml").endswith("binary.yaml is not UTF-8 text")


def test_wrong_names_in_the_environment_are_refused() -> None:
    sentence = refused(environ={"UNMASK_MEDIA__CHUNKS": "20"})
    assert sentence.startswith("media.chunks (environment variable UNMASK_MEDIA__CHUNKS) is not a setting")


def test_variables_that_kubernetes_makes_for_a_service_are_left_alone() -> None:
    assert (
        load(None, [], {"UNMASK_PORT_8080_TCP": "tcp://10.0.0.1:8080", "UNMASK_SERVICE_HOST": "x"})
        == Config()
    )


def test_small_numbers_may_be_written_with_an_exponent(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text("incidents: {prevalence: 1e-4}\n")
    assert load(None, ["sampling.burst_budget=5E-1"], {}).incidents.prevalence == 1e-4
    assert "must be a whole number" in refused(overrides=["media.chunk_ms=1e2"])


def test_text_settings_take_text_that_looks_like_something_else() -> None:
    assert load(None, ["prefix=12"], {"UNMASK_DATA_DIR": "null"}).data_dir == "null"


@settings(deadline=None)
@given(
    chunk_ms=st.integers(50, 5000),
    share=st.floats(0, 1),
    names=st.lists(st.text(st.characters(codec="utf-8", exclude_categories=["Cc"]), min_size=1), max_size=3),
    program=st.none() | st.integers(0, 65535),
)
def test_the_printed_settings_read_back_the_same(
    tmp_path_factory: pytest.TempPathFactory,
    chunk_ms: int,
    share: float,
    names: list[str],
    program: int | None,
) -> None:
    config = Config.model_validate_json(
        Config.model_validate(
            {
                "media": {"chunk_ms": chunk_ms},
                "sampling": {"burst_budget": share},
                "members": {"names": tuple(names)},
                "ingest": {"program": program},
            }
        ).model_dump_json()
    )
    file = tmp_path_factory.getbasetemp() / "printed.yaml"
    file.write_text(to_yaml(config), encoding="utf-8")
    assert load(file, [], {}) == config


def test_text_is_shown_redacted() -> None:
    shown = to_yaml(
        Config(data_dir="rtmp://host/live?key=secret"), lambda text: text.replace("secret", "***")
    )
    assert "secret" not in shown


def test_every_setting_can_say_what_it_takes() -> None:
    assert all(describe(field) for field in SETTINGS.values())


@pytest.mark.parametrize("given", ["off", "'off'"])
def test_the_web_interface_is_turned_off_however_yaml_reads_it(tmp_path: Path, given: str) -> None:
    assert load(None, ["web.listen=off"], {}).web.listen == "off"
    file = tmp_path / "own.yaml"
    file.write_text(f"web:\n  listen: {given}\n")
    assert load(file, [], {}).web.listen == "off"


@pytest.mark.parametrize("listen", ["127.0.0.1", "0.0.0.0:", ":8470", "a b:1", "true"])
def test_where_the_web_interface_listens_has_a_port(listen: str) -> None:
    assert "web.listen is" in refused(overrides=[f"web.listen={listen}"])
