"""Webhooks as Standard Webhooks 1.0 describes them, which see nothing else of our network."""

import base64
import hashlib
import http.client
import json
import logging
import socket
import ssl
from datetime import UTC, datetime
from typing import TYPE_CHECKING

from stream.alerts import MAX_BODY, CloudEvent, shortened
from stream.clock import Clock
from stream.errors import Code, UnmaskError
from stream.redact import redact
from stream.sinks.addresses import ForbiddenError, Guard, Resolver, system_resolver
from stream.sinks.delivery import DELIVERED, Outcome, Result
from stream.sinks.posting import Answer, post
from stream.sinks.secret import is_reference, look_up
from stream.sinks.settings import Webhook, check_url, fingerprint

if TYPE_CHECKING:
    from standardwebhooks.webhooks import Webhook as Signer

logger = logging.getLogger(__name__)

PREFIX = "whsec_"

MIN_SECRET, MAX_SECRET = 24, 64
"""Bytes of a signing secret, as the specification bounds them."""

BUSY = frozenset({408, 425, 429, 502, 503, 504})
"""The receiver, or what stands before it, cannot take anything now."""

GONE = 410

AGENT = "unmask"

CONTENT_TYPE = "application/cloudevents+json"
"""Structured mode: all attributes lie under the signature."""


class WebhookTarget:
    """Sends to one address. Secrets and address are looked up at each attempt: they may be exchanged.

    Raises `UnmaskError` (CONFIG) if one of them, or the certificates, cannot be used now.
    """

    def __init__(self, settings: Webhook, clock: Clock, resolve: Resolver = system_resolver) -> None:
        self._settings = settings
        self._clock = clock
        self._guard = Guard(settings.allow_private, resolve)
        self._context = _context(settings.ca_file)
        self._url()
        self._signers()
        self._headers()

    def deliver(self, event: CloudEvent) -> Result:
        body = webhook_body(event)
        try:
            headers = self._headers() | self._signed(webhook_id(event), body)
            answer = post(
                self._url(),
                body,
                headers,
                self._guard,
                self._context,
                self._settings.timeout_s,
                self._clock,
            )
        except UnmaskError as error:
            return Result(Outcome.AWAY, "secret", redact(str(error)))
        except ForbiddenError as error:
            return Result(Outcome.AWAY, "forbidden", redact(str(error)))
        except (OSError, http.client.HTTPException) as error:
            return Result(Outcome.AWAY, _reason(error), redact(_words(error)))
        return _result(answer)

    def identity(self) -> str:
        try:
            return fingerprint(self._url())
        except UnmaskError:
            return ""

    def close(self) -> None:
        """Nothing is kept open between attempts."""

    def _url(self) -> str:
        given = self._settings.url
        if not is_reference(given):
            return given
        url = look_up(given)
        try:
            check_url(url)
        except ValueError:
            raise UnmaskError(Code.CONFIG, f"{given} must hold an address like https://HOST/PATH") from None
        if not (self._settings.allow_private or url.startswith("https:")):
            raise UnmaskError(
                Code.CONFIG, f"{given} must hold an https:// address; allow_private: true would allow http"
            )
        return url

    def _headers(self) -> dict[str, str]:
        more = {name: look_up(reference) for name, reference in self._settings.headers.items()}
        for name, value in more.items():
            if not (value.isascii() and value.isprintable()):
                raise UnmaskError(Code.CONFIG, f"headers.{name} must be one line of ASCII")
        return {**more, "Content-Type": CONTENT_TYPE, "User-Agent": AGENT, "Connection": "close"}

    def _signers(self) -> "list[Signer]":
        return [signer(reference, look_up(reference)) for reference in self._settings.secrets]

    def _signed(self, name: str, body: bytes) -> dict[str, str]:
        now = datetime.fromtimestamp(self._clock.now_us() // 1_000_000, UTC)
        signatures = [each.sign(name, now, body.decode()) for each in self._signers()]
        return {
            "webhook-id": name,
            "webhook-timestamp": str(int(now.timestamp())),
            "webhook-signature": " ".join(signatures),
        }


def webhook_id(event: CloudEvent) -> str:
    """Return the id under which an event is delivered, the same at each attempt.

    Not the event's own, which holds full stops: the signed text is divided by them.
    """
    named = f"{event.attributes['source']}\n{event.attributes['id']}"
    return f"msg_{hashlib.sha256(named.encode()).hexdigest()[:32]}"


def webhook_body(event: CloudEvent) -> bytes:
    """Return the event in structured mode, below MAX_BODY bytes: long lists are cut, as alerts cut them."""
    envelope = len(_json(CloudEvent(event.attributes, {})))
    return _json(CloudEvent(event.attributes, shortened(event.data, MAX_BODY - envelope)))


def _json(event: CloudEvent) -> bytes:
    return json.dumps(event.structured(), separators=(",", ":"), allow_nan=False).encode()


def signer(reference: str, secret: str) -> "Signer":
    """Return what signs with `secret`. Raises `UnmaskError` (CONFIG) naming the reference."""
    try:
        from standardwebhooks.webhooks import Webhook as Signer
    except ImportError:
        raise UnmaskError(
            Code.PROGRAM_MISSING, 'webhooks need the package standardwebhooks: pip install "unmask[serve]"'
        ) from None
    try:
        key = base64.b64decode(secret.removeprefix(PREFIX), validate=True)
    except ValueError:
        key = b""
    if not secret.startswith(PREFIX) or not MIN_SECRET <= len(key) <= MAX_SECRET:
        raise UnmaskError(
            Code.CONFIG,
            f"{reference} holds no signing secret; it must be {PREFIX} and the base64 of {MIN_SECRET} to "
            f"{MAX_SECRET} random bytes",
        )
    return Signer(secret)


def _context(ca_file: str) -> ssl.SSLContext:
    try:
        return ssl.create_default_context(cafile=ca_file or None)
    except (OSError, ssl.SSLError) as error:
        raise UnmaskError(
            Code.CONFIG, f"ca_file is {ca_file}; it must hold certificates in PEM: {error.strerror or error}"
        ) from None


def _result(answer: Answer) -> Result:
    status = answer.status
    if 200 <= status < 300:
        return DELIVERED
    words = f"answered {status}"
    if status == GONE:
        return Result(Outcome.GONE, "gone", words)
    if 300 <= status < 400:
        return Result(Outcome.REFUSED, "redirect", f"{words}, a redirect, which is not followed")
    if status in BUSY:
        return Result(Outcome.AWAY, "busy", words, answer.retry_after_s)
    reason = "client_error" if 400 <= status < 500 else "server_error"
    return Result(Outcome.REFUSED, reason, words, answer.retry_after_s)


def _reason(error: OSError | http.client.HTTPException) -> str:
    if isinstance(error, TimeoutError):
        return "timeout"
    if isinstance(error, ssl.SSLError):
        return "tls"
    if isinstance(error, socket.gaierror):
        return "name"
    return "connection" if isinstance(error, OSError) else "protocol"


def _words(error: OSError | http.client.HTTPException) -> str:
    if isinstance(error, ssl.SSLCertVerificationError):
        return f"its certificate is not trusted: {error.verify_message}"
    words = getattr(error, "strerror", None) or str(error) or type(error).__name__
    # What is no HTTP is quoted by the library, however long.
    return " ".join(str(words).split())[:200]
