"""Webhooks against real receivers: signed, bounded, and led nowhere."""

import base64
import json
import re
import secrets
import socket
import ssl
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from jsonschema import Draft202012Validator
from standardwebhooks.webhooks import Webhook as Verifier
from standardwebhooks.webhooks import WebhookVerificationError

import stream
from stream.alerts import MAX_BODY, CloudEvent
from stream.clock import FakeClock, SystemClock
from stream.errors import Code, UnmaskError
from stream.sinks.delivery import Outcome, Result
from stream.sinks.settings import Webhook
from stream.sinks.webhook import WebhookTarget, webhook_body, webhook_id
from tests.conftest import requires
from tests.stream.kafka_broker import make_certificates
from tests.stream.sinks.receivers import (
    dripping,
    hanging_up,
    huge_body,
    interim,
    long_head,
    no_http,
    raw,
    receiver,
    silent,
)
from tests.stream.sinks.world import feed, incident

REPOSITORY = Path(__file__).parents[3]
ALERT = Draft202012Validator(json.loads((Path(stream.__file__).parent / "alert.schema.json").read_text()))
SECRET = "whsec_" + base64.b64encode(b"0123456789abcdef0123456789abcdef").decode()
OTHER = "whsec_" + base64.b64encode(secrets.token_bytes(24)).decode()


def real_alert() -> CloudEvent:
    """The first example of docs/alerts.md."""
    text = (REPOSITORY / "docs" / "alerts.md").read_text()
    found = re.search(r"```json\n(\{.*?\n\})\n```", text, re.DOTALL)
    assert found
    event = json.loads(found.group(1))
    data = event.pop("data")
    event.pop("datacontenttype")
    return CloudEvent(event, data)


@pytest.fixture(autouse=True)
def _secret(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOOK_SECRET", SECRET)


def target(url: str, resolve: Any = None, clock: Any = None, **settings: Any) -> WebhookTarget:
    given = {"secrets": ("env:HOOK_SECRET",), "allow_private": True, "timeout_s": 5.0} | settings
    more = {} if resolve is None else {"resolve": resolve}
    return WebhookTarget(Webhook(type="webhook", url=url, **given), clock or SystemClock(), **more)


def sent(url: str, event: CloudEvent | None = None, **settings: Any) -> Result:
    return target(url, **settings).deliver(event or incident())


def test_an_alert_arrives_whole_and_signed_as_the_standard_says() -> None:
    event = real_alert()
    with receiver() as there:
        assert sent(there.url, event) == Result(Outcome.DELIVERED)
    (request,) = there.requests
    assert request.path == "/hook"
    assert request.headers["Content-Type"] == "application/cloudevents+json"
    assert request.headers["Host"] == f"127.0.0.1:{there.port}"
    told = Verifier(SECRET).verify(request.body, dict(request.headers))
    assert told == event.structured()
    ALERT.validate(told)
    with pytest.raises(WebhookVerificationError):
        Verifier(SECRET).verify(request.body + b" ", dict(request.headers))
    with pytest.raises(WebhookVerificationError):
        Verifier(OTHER).verify(request.body, dict(request.headers))


def test_while_secrets_are_exchanged_both_verify(tmp_path: Path) -> None:
    new = tmp_path / "new"
    new.write_text(OTHER + "\n")
    with receiver() as there:
        made = target(there.url, secrets=(f"file:{new}", "env:HOOK_SECRET"))
        made.deliver(incident())
        for secret in (SECRET, OTHER):
            Verifier(secret).verify(there.requests[0].body, dict(there.requests[0].headers))
        new.write_text(SECRET)
        made.deliver(incident())
    signatures = there.requests[1].headers["webhook-signature"].split()
    assert len(set(signatures)) == 1, "a mounted secret is read anew"


def test_each_attempt_has_the_same_id_and_its_own_time() -> None:
    clock = FakeClock(1_700_000_000_000_000)
    with receiver(status=500) as there:
        made = target(there.url, clock=clock)
        made.deliver(incident())
        clock.advance(60)
        made.deliver(incident())
    first, second = (request.headers for request in there.requests)
    assert first["webhook-id"] == second["webhook-id"]
    assert int(second["webhook-timestamp"]) - int(first["webhook-timestamp"]) == 60


def test_ids_hold_no_full_stop_and_differ_where_events_do() -> None:
    events = [incident("a.b", 1), incident("a_b", 1), incident("a.b", 2), feed(1), feed(2), feed(1, "up")]
    ids = [webhook_id(event) for event in events]
    assert len(set(ids)) == len(ids)
    assert all(re.fullmatch(r"msg_[0-9a-f]{32}", name) for name in ids)


def test_a_body_stays_below_its_bound() -> None:
    event = real_alert()
    data = {
        **event.data,
        "not_tested_for": ["lip sync " * 20] * 300,
        "tracks": list(event.data["tracks"]) * 8,
    }
    long = CloudEvent(event.attributes, data)
    assert len(long.body()) > 2 * MAX_BODY
    body = webhook_body(long)
    assert len(body) < MAX_BODY
    ALERT.validate(json.loads(body) | {"data": json.loads(body)["data"] | {"tested_for": ["x"]}})


@pytest.mark.parametrize(
    ("status", "outcome", "reason"),
    [
        (200, Outcome.DELIVERED, ""),
        (204, Outcome.DELIVERED, ""),
        (299, Outcome.DELIVERED, ""),
        (304, Outcome.REFUSED, "redirect"),
        (400, Outcome.REFUSED, "client_error"),
        (401, Outcome.REFUSED, "client_error"),
        (404, Outcome.REFUSED, "client_error"),
        (408, Outcome.AWAY, "busy"),
        (410, Outcome.GONE, "gone"),
        (429, Outcome.AWAY, "busy"),
        (500, Outcome.REFUSED, "server_error"),
        (502, Outcome.AWAY, "busy"),
        (503, Outcome.AWAY, "busy"),
        (504, Outcome.AWAY, "busy"),
        (999, Outcome.REFUSED, "server_error"),
    ],
)
def test_what_a_status_means(status: int, outcome: Outcome, reason: str) -> None:
    with receiver(status=status) as there:
        result = sent(there.url)
    assert (result.outcome, result.reason) == (outcome, reason)


def test_retry_after_is_heeded_in_both_forms_and_nonsense_is_not() -> None:
    clock = FakeClock(1_445_412_420_000_000)
    found = []
    for text in ("120", "Wed, 21 Oct 2015 07:28:00 GMT", "soon", "-5", "9" * 400):
        with receiver(status=503, headers={"Retry-After": text}) as there:
            found.append(sent(there.url, clock=clock).retry_after_s)
    assert found == [120.0, 60.0, None, None, None]


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
def test_a_redirect_is_not_followed(status: int) -> None:
    with receiver() as inner:
        for place in (
            inner.url,
            "http://169.254.169.254/latest/meta-data/",
            "file:///etc/passwd",
            "//[::1]/",
        ):
            with receiver(status=status, headers={"Location": place}) as there:
                result = sent(there.url)
            assert (result.outcome, result.reason) == (Outcome.REFUSED, "redirect")
            assert len(there.requests) == 1
    assert inner.requests == []


@pytest.mark.parametrize(
    ("talk", "reasons"),
    [
        (silent, {"timeout"}),
        (dripping, {"timeout"}),
        (interim, {"timeout"}),
        (long_head, {"protocol", "timeout"}),
        (no_http, {"protocol"}),
        (hanging_up, {"protocol", "connection"}),
    ],
)
def test_whoever_stalls_or_lies_is_away_and_soon(
    talk: Callable[[socket.socket], None], reasons: set[str]
) -> None:
    with raw(talk) as url:
        result = sent(url, timeout_s=0.5)
    assert result.outcome is Outcome.AWAY
    assert result.reason in reasons
    assert len(result.detail) < 300


def test_a_huge_answer_is_not_read() -> None:
    with raw(huge_body) as url:
        assert sent(url).outcome is Outcome.DELIVERED


def test_nobody_there_is_away() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
    result = sent(f"http://127.0.0.1:{port}/")
    assert (result.outcome, result.reason) == (Outcome.AWAY, "connection")


def test_a_name_without_address_is_away() -> None:
    def unknown(host: str, port: int) -> list[str]:
        raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")

    result = sent("http://no.example/", resolve=unknown)
    assert (result.outcome, result.reason) == (Outcome.AWAY, "name")


# Led nowhere


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "2130706433", "0x7f.1", "0177.0.0.1", "[::1]"])
def test_no_private_address_is_reached_however_it_is_written(host: str) -> None:
    with receiver() as there:
        result = sent(f"https://{host}:{there.port}/", allow_private=False)
    assert (result.outcome, result.reason) == (Outcome.AWAY, "forbidden")
    assert there.requests == []


def test_a_name_is_resolved_once_and_what_was_checked_is_connected_to() -> None:
    """A name that is public when asked first and private when asked again leads nowhere (DNS rebinding)."""
    asked = []

    def rebinding(host: str, port: int) -> list[str]:
        asked.append(host)
        return ["127.0.0.1"] if len(asked) == 1 else ["169.254.169.254"]

    with receiver() as there:
        url = f"http://rebinding.example:{there.port}/"
        made = target(url, resolve=rebinding)
        assert made.deliver(incident()).outcome is Outcome.DELIVERED
        assert asked == ["rebinding.example"]
        assert there.requests[0].headers["Host"] == f"rebinding.example:{there.port}"
        assert made.deliver(incident()).reason == "forbidden"
    assert len(there.requests) == 1


def test_no_proxy_of_the_environment_is_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    with receiver() as proxy, receiver() as there:
        for name in ("http_proxy", "HTTP_PROXY", "https_proxy", "all_proxy"):
            monkeypatch.setenv(name, proxy.url)
        assert sent(there.url).outcome is Outcome.DELIVERED
    assert proxy.requests == []


def test_the_first_address_that_answers_is_taken() -> None:
    with receiver() as there:
        url = f"http://two.example:{there.port}/"
        # Nothing listens on the port of the other loopback address.
        assert sent(url, resolve=lambda host, port: ["127.9.9.9", "127.0.0.1"]).outcome is Outcome.DELIVERED


# TLS


@pytest.fixture(scope="module")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> Path:
    requires("openssl")
    folder = tmp_path_factory.mktemp("certificates")
    make_certificates(folder)
    return folder


@pytest.fixture
def server_tls(certificates: Path) -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificates / "broker.pem")
    return context


def test_tls_is_verified_for_the_name_though_an_address_is_connected_to(
    certificates: Path, server_tls: ssl.SSLContext
) -> None:
    ca = str(certificates / "ca.pem")
    with receiver(server_tls) as there:
        url = f"https://127.0.0.1:{there.port}/"
        assert sent(url, ca_file=ca).outcome is Outcome.DELIVERED
        untrusted = sent(url)
        other = sent(
            f"https://other.example:{there.port}/", ca_file=ca, resolve=lambda host, port: ["127.0.0.1"]
        )
    assert (untrusted.outcome, untrusted.reason) == (Outcome.AWAY, "tls")
    assert (other.outcome, other.reason) == (Outcome.AWAY, "tls")
    assert "other.example" in other.detail
    assert len(there.requests) == 1


def test_a_handshake_that_never_ends_is_a_timeout() -> None:
    with raw(silent) as url:
        result = sent(url.replace("http:", "https:"), timeout_s=0.3)
    assert (result.outcome, result.reason) == (Outcome.AWAY, "timeout")


# Secrets


@pytest.mark.parametrize(
    "secret", ["", "whsec_", "whsec_c2hvcnQ=", "hunter2hunter2hunter2hunter2", "whsec_ä"]
)
def test_a_secret_that_is_none_is_refused_and_never_shown(
    secret: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOOK_SECRET", secret)
    with pytest.raises(UnmaskError) as caught:
        target("https://receiver.example/")
    assert caught.value.code is Code.CONFIG
    assert "env:HOOK_SECRET" in str(caught.value)
    bare = secret.removeprefix("whsec_")
    assert not bare or bare not in str(caught.value)


def test_a_secret_that_goes_missing_later_is_an_outage(monkeypatch: pytest.MonkeyPatch) -> None:
    with receiver() as there:
        made = target(there.url)
        monkeypatch.delenv("HOOK_SECRET")
        result = made.deliver(incident())
    assert (result.outcome, result.reason) == (Outcome.AWAY, "secret")


def test_the_address_and_headers_may_be_secrets(monkeypatch: pytest.MonkeyPatch) -> None:
    with receiver() as there:
        monkeypatch.setenv("HOOK_URL", f"{there.url}/T0/B0/s3cr3t")
        monkeypatch.setenv("HOOK_TOKEN", "Bearer abc")
        made = target("env:HOOK_URL", headers={"Authorization": "env:HOOK_TOKEN"})
        made.deliver(incident())
        assert "s3cr3t" not in made.identity()
        monkeypatch.setenv("HOOK_TOKEN", "two\r\nlines: here")
        assert made.deliver(incident()).reason == "secret"
    assert there.requests[0].path == "/hook/T0/B0/s3cr3t"
    assert there.requests[0].headers["Authorization"] == "Bearer abc"
    assert len(there.requests) == 1


def test_an_address_by_reference_is_held_to_the_same_rules(monkeypatch: pytest.MonkeyPatch) -> None:
    for url in ("ftp://x.example/", "no address", "http://plain.example/"):
        monkeypatch.setenv("HOOK_URL", url)
        with pytest.raises(UnmaskError, match="env:HOOK_URL"):
            target("env:HOOK_URL", allow_private=False)


def test_a_whole_attempt_has_one_time_however_it_is_spent() -> None:
    """A slow connection, a slow handshake and a slow answer share what one of them may take."""
    ended = threading.Event()

    def slow(client: socket.socket) -> None:
        client.recv(65536)
        for byte in b"HTTP/1.1 200 OK\r\n\r\n":
            time.sleep(0.1)
            client.sendall(bytes([byte]))
        ended.set()

    with raw(slow) as url:
        assert sent(url, timeout_s=0.6).reason == "timeout"
    assert not ended.is_set()
