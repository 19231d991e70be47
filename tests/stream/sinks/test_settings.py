"""The sinks file: what is wrong is named with its place, and no secret is repeated."""

from pathlib import Path
from typing import Any

import pytest
import yaml

from stream.config import Config, Kafka, Sinks
from stream.errors import Code, UnmaskError
from stream.sinks.settings import KINDS, Command, File, Webhook, load_sinks, parse_sinks, shown

GOOD: dict[str, dict[str, Any]] = {
    "webhook": {"type": "webhook", "url": "https://receiver.example/hook", "secrets": ["env:HOOK_SECRET"]},
    "kafka": {"type": "kafka", "topic": "moderation", "cluster": {"bootstrap_servers": "b:9092"}},
    "file": {"type": "file", "path": "/var/log/unmask/alerts.ndjson"},
    "stdout": {"type": "stdout"},
    "command": {"type": "command", "argv": ["notify", "--now"]},
}


def read(**sinks: Any) -> dict[str, Any]:
    return dict(parse_sinks(yaml.safe_dump({"sinks": sinks}), "sinks.yaml"))


def refused(text: str) -> str:
    with pytest.raises(UnmaskError) as caught:
        parse_sinks(text, "sinks.yaml")
    assert caught.value.code is Code.CONFIG
    return str(caught.value)


def wrong(kind: str, **fields: Any) -> str:
    return refused(yaml.safe_dump({"sinks": {"s": GOOD[kind] | fields}}))


def test_every_type_is_read_with_little_said() -> None:
    found = read(**GOOD)
    assert {sink.type for sink in found.values()} == set(KINDS)
    assert isinstance(found["webhook"], Webhook)
    assert found["webhook"].give_up_s == 86400


def test_no_file_is_no_sink() -> None:
    assert load_sinks(Config()) == {}


def test_a_file_that_is_missing_is_named(tmp_path: Path) -> None:
    with pytest.raises(UnmaskError, match=r"gone\.yaml cannot be read"):
        load_sinks(Config(sinks=Sinks(file=str(tmp_path / "gone.yaml"))))


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("sinks: {a: {type: stdout}, a: {type: stdout}}", "a is set twice"),
        ("sinks: {a: {type: stdout}, b: {type: stdout}}", "there is one standard output"),
        ("sinks: {Moderation: {type: stdout}}", "names are 1 to 32 of a-z 0-9 -"),
        ("sinks: {a: {type: pigeon}}", "sinks.a"),
        ("sinks: {a: {}}", "sinks.a"),
        ("sinks: [a]", "sinks:"),
        ("", "the file"),
        ("sinks: {a: ", "is not YAML"),
        ("sinks: {a: {type: stdout, colour: red}}", "sinks.a.colour is no setting"),
        ("sinks: {a: {type: stdout, quiet: {begin: 22:00, end: '07:00'}}}", "sinks.a.quiet.begin"),
        ("sinks: {a: {type: stdout, quiet: {begin: '25:00', end: '07:00'}}}", "must be a time of day"),
        (
            "sinks: {a: {type: stdout, quiet: {begin: '22:00', end: '07:00', zone: Berlin}}}",
            "must be a time zone",
        ),
        ("sinks: {a: {type: stdout, only: {severity: grave}}}", "sinks.a.only.severity"),
        ("sinks: {a: {type: stdout, flood: {most: 0}}}", "sinks.a.flood.most"),
    ],
)
def test_what_is_wrong_is_named(text: str, said: str) -> None:
    found = refused(text)
    assert said in found
    assert found.startswith("sinks.yaml")
    assert "\n" not in found


@pytest.mark.parametrize(
    ("kind", "fields", "said"),
    [
        ("webhook", {"url": "http://receiver.example/"}, "must be https"),
        ("webhook", {"url": "receiver.example"}, "must be an address like https://"),
        ("webhook", {"url": "https:///path"}, "must be an address like https://"),
        ("webhook", {"url": "https://h.example:99999/"}, "must be an address like https://"),
        ("webhook", {"url": "https://h.example/a b"}, "must be an address like https://"),
        ("webhook", {"secrets": []}, "sinks.s.secrets"),
        ("webhook", {"secrets": ["file:relative"]}, "env:NAME or file:/PATH"),
        ("webhook", {"timeout_s": 31}, "sinks.s.timeout_s"),
        ("webhook", {"headers": {"webhook-id": "env:X"}}, "to Unmask"),
        ("webhook", {"headers": {"X Y": "env:X"}}, "letters, digits"),
        ("file", {"path": "alerts.ndjson"}, "must be absolute"),
        ("command", {"argv": []}, "sinks.s.argv"),
        ("command", {"env": ["SLACK_URL=x"]}, "without values"),
        ("kafka", {"topic": "a b"}, "sinks.s.topic"),
        ("kafka", {"cluster": {}}, "must name brokers"),
    ],
)
def test_fields_are_held_to_what_is_right(kind: str, fields: dict[str, Any], said: str) -> None:
    assert said in wrong(kind, **fields)


@pytest.mark.parametrize(
    "fields",
    [
        {"secrets": ["whsec_c2VjcmV0c2VjcmV0c2VjcmV0c2VjcmV0"]},
        {"url": "https://user:c2VjcmV0c2VjcmV0@receiver.example/"},
        {"url": "https://receiver.example/?key=c2VjcmV0c2VjcmV0"},
        {"url": "https://receiver.example/services/T0123/B0123/c2VjcmV0c2VjcmV0c2Vj1"},
        {"headers": {"Authorization": "Bearer c2VjcmV0c2VjcmV0"}},
    ],
)
def test_a_secret_in_the_file_is_refused_and_not_repeated(fields: dict[str, Any]) -> None:
    found = wrong("webhook", **fields)
    assert "c2VjcmV0" not in found
    assert "env:NAME" in found


def test_a_topic_of_our_own_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "sinks.yaml"
    config = Config(sinks=Sinks(file=str(path)), kafka=Kafka(bootstrap_servers="b:9092"))
    path.write_text("sinks: {a: {type: kafka, topic: unmask.alerts}}")
    with pytest.raises(UnmaskError, match="a topic of Unmask's own"):
        load_sinks(config)
    path.write_text("sinks: {a: {type: kafka, topic: other}}")
    assert load_sinks(config)
    with pytest.raises(UnmaskError, match="there is no cluster"):
        load_sinks(config.model_copy(update={"kafka": Kafka()}))


def test_what_is_shown_has_no_secret() -> None:
    secret = Webhook(type="webhook", url="env:HOOK_URL", secrets=("env:S",))
    assert shown(secret) == "env:HOOK_URL"
    assert shown(File(type="file", path="/a")) == "/a"
    told = shown(Command(type="command", argv=("post", "--token=abcdef", "https://u:p@h.example/")))
    assert "abcdef" not in told
    assert "u:p" not in told
