"""A planted secret never survives, wherever in an address or a sentence it stands."""

import io
import logging

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from stream.redact import MASK, RedactingFilter, install_logging, redact

SECRET = st.text("abcdefXYZ0189!$%*+,@:/?#[]~._-", min_size=8, max_size=24).map(lambda raw: f"Kq7{raw}zV4")
"""Any secret a user might have typed: begins and ends recognisably, what is between is arbitrary."""
PLAIN = st.text("abcdefXYZ0189._~-", min_size=8, max_size=24).map(lambda raw: f"Kq7{raw}zV4")
"""A secret of letters that need no encoding."""


def survives(secret: str, text: str) -> bool:
    return secret in text or secret[:6] in text or secret[-6:] in text


@pytest.mark.parametrize("scheme", ["rtmp", "rtmps", "rtsp", "http", "https", "srt", "udp", "tcp"])
@given(secret=SECRET)
@example(secret="Kq7p@ss/wo?r#dzV4")
@example(secret="Kq71234/@zV4")
def test_password_is_masked_in_any_scheme(scheme: str, secret: str) -> None:
    text = redact(f"cannot open {scheme}://admin:{secret}@camera.example:554/live/one: refused")
    assert not survives(secret, text)
    assert "camera.example:554/live/one: refused" in text


@given(secret=PLAIN, name=st.sampled_from(["token", "sig", "passphrase", "x-key", "e", "hdnts"]))
def test_query_values_are_masked(secret: str, name: str) -> None:
    for end in ("", "&b=1", "#f", "&other"):
        text = redact(f"'https://cdn.example/live/a.m3u8?a=1&{name}={secret}{end}' is gone")
        assert not survives(secret, text)
        assert "https://cdn.example/live/a.m3u8" in text
        assert name in text


@given(secret=PLAIN)
def test_a_bare_query_word_is_masked(secret: str) -> None:
    assert not survives(secret, redact(f"https://cdn.example/a.m3u8?{secret}"))
    assert not survives(secret, redact(f"https://cdn.example/a.m3u8?mail=a@b.example&{secret}"))


@given(secret=PLAIN)
def test_percent_encoded_addresses_are_masked(secret: str) -> None:
    once = f"rtsp%3A%2F%2Fadmin%3A{secret}%40host%2Flive%3Fkey%3D{secret}"
    twice = once.replace("%", "%25")
    for address in (once, once.lower().replace(secret.lower(), secret), twice):
        assert not survives(secret, redact(f"GET /proxy?url={address} failed"))
        assert not survives(secret, redact(f"opening {address}"))
    assert not survives(secret, redact(f"rtsp://admin:{secret}%40host/live"))


@given(secret=PLAIN)
def test_the_key_of_an_rtmp_push_is_masked(secret: str) -> None:
    for query in ("?listen", "?listen=1", "?listen&token=x"):
        text = redact(f"rtmp://0.0.0.0:1935/live/{secret}{query}")
        assert not survives(secret, text)
        assert "rtmp://0.0.0.0:1935/live/" in text
        assert "listen" in text


@pytest.mark.parametrize(
    "key",
    ["live_123456789_AbCdEfGhIjKlMnOpQrStUvWxYz0123", "abcd-efgh-1234-5678-ijkl", "9f86d081884c7d659a2f"],
)
def test_a_path_part_that_looks_like_a_key_is_masked(key: str) -> None:
    assert key not in redact(f"rtmp://a.rtmp.youtube.example/live2/{key}")
    assert key not in redact(f"https://cdn.example/{key}/index.m3u8")


@given(secret=PLAIN)
def test_pairs_outside_of_addresses_are_masked(secret: str) -> None:
    for text in (
        f"Authorization: Bearer {secret}",
        f"Authorization: Basic {secret}",
        f"Proxy-Authorization: Basic {secret}",
        f"AWS_SECRET_ACCESS_KEY={secret}",
        f"ffmpeg -passphrase={secret} -i x",
        f'{{"password": "{secret}"}}',
        f"admin:{secret}@camera.example:554/x",
        f"https://cdn.example/hdnts=exp=1~hmac={secret}/a.m3u8",
    ):
        assert not survives(secret, redact(text))


@pytest.mark.parametrize(
    "text",
    [
        "rtmp://live.example:1935/app/studio-1",
        "rtsp://camera.example/axis-media/media.amp",
        "https://cdn.example/@channel/live.m3u8",
        "udp://@239.0.0.1:1234",
        "srt://host.example:9000",
        "stream studio-1: no video for 10.2 s, attaching again in 0.5 s",
        "the secret is read from env:UNMASK_SOURCE_CAM",
        "/home/me/videos/clip 1.mp4",
        "file:///home/me/0123456789abcdef/clip.mp4",
    ],
)
def test_what_is_no_secret_stays(text: str) -> None:
    assert redact(text) == text


@given(st.text())
def test_any_text_is_taken(text: str) -> None:
    redact(text)


@given(secret=PLAIN)
def test_redaction_is_stable(secret: str) -> None:
    once = redact(f"open https://me:{secret}@cdn.example/a.m3u8?token={secret} now")
    assert redact(once) == once


def test_log_lines_and_tracebacks_are_redacted() -> None:
    stream = io.StringIO()
    handler = logging.StreamHandler(stream)
    handler.addFilter(RedactingFilter())
    log = logging.Logger("redaction")
    log.addHandler(handler)
    try:
        raise ValueError("cannot open rtsp://admin:hunter2@cam/1")
    except ValueError:
        log.exception("feed %s: %s", "one", "rtsp://admin:hunter2@cam/1?token=tok3n")
    out = stream.getvalue()
    assert "hunter2" not in out
    assert "tok3n" not in out
    assert f"feed one: rtsp://{MASK}@cam/1" in out
    assert "Traceback" in out


def test_install_logging_writes_redacted_lines_to_stderr_only(capsys: pytest.CaptureFixture[str]) -> None:
    root = logging.getLogger()
    before, level = root.handlers[:], root.level
    try:
        install_logging()
        logging.getLogger("feed").warning("lost %s", "rtmp://me:hunter2@host/live/a")
    finally:
        root.handlers[:] = before
        root.setLevel(level)
    out, err = capsys.readouterr()
    assert out == ""
    assert "hunter2" not in err
    assert "rtmp://***@host/live/a" in err
