"""How a client reaches the cluster, with TLS and SASL; and what went wrong, in one sentence (DESIGN 3.1)."""

import contextlib
import logging
import os
import ssl
import threading
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar

from kafka import KafkaAdminClient, errors

from stream.config import Kafka
from stream.errors import Code, UnmaskError

T = TypeVar("T")

PASSWORD_VARIABLE = "UNMASK_KAFKA_PASSWORD"
"""Read unless kafka.password_file is set; a password is no setting, since settings are printed."""

CONNECT_S = 10.0
"""Longest wait for the first answer of a cluster at start; a broker restarts in a few seconds."""

ATTEMPT_S = 1.0
"""First slice of CONNECT_S, then twice as long each: after one, a refusal that waiting will not cure is told;
the long ones are for slow lines."""

REQUEST_S = 20.0
"""Longest wait for one answer: longer than the election of a leader, shorter than an operator's patience."""

RECONNECT_MAX_S = 1.0
"""A broker that comes back is found within this; the default of 30 s would outlast the restart by far."""


class KafkaClients:
    """Settings from which every client is made: connection arguments, checked once, and the first contact.

    Raises `UnmaskError` (CONFIG) for a file that cannot be read or a password that is missing, and
    (LOG_UNUSABLE) if the cluster does not answer or refuses us.
    """

    def __init__(self, settings: Kafka) -> None:
        self.settings = settings
        self.arguments: Mapping[str, Any] = _arguments(settings)
        # Its warnings come with every try while a broker is away; what matters of them comes back as errors.
        logging.getLogger("kafka").setLevel(logging.ERROR)
        # Calls it an unknown error that a position waits for the end of a transaction.
        logging.getLogger("kafka.coordinator.consumer").setLevel(logging.CRITICAL)

    def admin(self) -> Any:
        """Connect, waiting at most CONNECT_S; a refusal is one sentence, and soon."""
        left, attempt = CONNECT_S, ATTEMPT_S
        while True:
            with _overheard() as heard:
                try:
                    return KafkaAdminClient(**self.arguments, bootstrap_timeout_ms=_ms(min(attempt, left)))
                except errors.KafkaError as error:
                    heard.append(error)
            left, attempt = left - attempt, 2 * attempt
            refusal = next(filter(None, map(_refusal, heard)), None)
            if refusal is not None or left <= 0:
                raise self._unusable(refusal or _last_words(heard))

    def _unusable(self, reason: str) -> UnmaskError:
        return UnmaskError(Code.LOG_UNUSABLE, f"Kafka at {self.settings.bootstrap_servers}: {reason}")


def within(seconds: float, call: Callable[[], T]) -> T:
    """Run a call of kafka-python that takes no timeout; raises TimeoutError, and leaves it running, after
    `seconds`. It ends with the process."""
    done: list[T] = []
    failed: list[BaseException] = []

    def run() -> None:
        try:
            done.append(call())
        except BaseException as error:
            failed.append(error)

    thread = threading.Thread(target=run, name="kafka call", daemon=True)
    thread.start()
    thread.join(seconds)
    if failed:
        raise failed[0]
    if not done:
        raise TimeoutError(f"no answer in {seconds:g} s")
    return done[0]


@contextlib.contextmanager
def translated(doing: str) -> Iterator[None]:
    """Raise what kafka-python raises as `UnmaskError` (LOG_UNUSABLE), beginning with `doing`."""
    try:
        yield
    except errors.KafkaError as error:
        raise UnmaskError(Code.LOG_UNUSABLE, f"{doing}: {_refusal(error) or said(error)}") from error
    except TimeoutError as error:
        raise UnmaskError(Code.LOG_UNUSABLE, f"{doing}: {error}") from error


def said(error: BaseException) -> str:
    """Return an error of kafka-python as part of a sentence."""
    text = " ".join(str(error).split())
    name = type(error).__name__
    return text.removeprefix(f"{name}: ") or name


def _arguments(settings: Kafka) -> dict[str, Any]:
    arguments: dict[str, Any] = {
        "bootstrap_servers": settings.bootstrap_servers.split(","),
        "security_protocol": settings.security_protocol,
        "reconnect_backoff_max_ms": _ms(RECONNECT_MAX_S),
        "request_timeout_ms": _ms(REQUEST_S),
    }
    if settings.security_protocol.endswith("SSL"):
        arguments["ssl_context"] = _ssl_context(settings)
    if settings.security_protocol.startswith("SASL"):
        arguments["sasl_mechanism"] = settings.sasl_mechanism
        arguments["sasl_plain_username"] = settings.username
        arguments["sasl_plain_password"] = _password(settings)
    return arguments


def _ssl_context(settings: Kafka) -> ssl.SSLContext:
    try:
        context = ssl.create_default_context(cafile=settings.ca_file or None)
    except (OSError, ssl.SSLError) as error:
        raise _unreadable("kafka.ca_file", settings.ca_file, "certificates in PEM", error) from None
    if not settings.cert_file:
        return context
    try:
        context.load_cert_chain(settings.cert_file, settings.key_file or None, _no_passphrase)
    except (OSError, ssl.SSLError) as error:
        raise _unreadable(
            "kafka.cert_file",
            f"{settings.cert_file} with kafka.key_file {settings.key_file}",
            "a certificate and its unencrypted key in PEM",
            error,
        ) from None
    return context


def _no_passphrase() -> str:
    # Without this OpenSSL would ask on the terminal and a service would hang.
    return ""


def _unreadable(field: str, value: str, wanted: str, error: OSError) -> UnmaskError:
    tls = (error.reason or "not so").replace("_", " ").lower() if isinstance(error, ssl.SSLError) else None
    reason = tls or (os.strerror(error.errno).lower() if error.errno else "cannot be read")
    return UnmaskError(Code.CONFIG, f"{field} is {value}; it must hold {wanted}: {reason}")


def _password(settings: Kafka) -> str:
    if settings.password_file:
        try:
            return Path(settings.password_file).read_text(encoding="utf-8").rstrip("\r\n")
        except OSError as error:
            raise _unreadable("kafka.password_file", settings.password_file, "the password", error) from None
        except UnicodeDecodeError:
            raise UnmaskError(
                Code.CONFIG, f"kafka.password_file is {settings.password_file}; it must hold text in UTF-8"
            ) from None
    password = os.environ.get(PASSWORD_VARIABLE)
    if not password:
        raise UnmaskError(
            Code.CONFIG,
            f"kafka.security_protocol is {settings.security_protocol}, which needs a password: set the "
            f"environment variable {PASSWORD_VARIABLE} or kafka.password_file",
        )
    return password


class _Ear(logging.Handler):
    def __init__(self) -> None:
        super().__init__()
        self.heard: list[BaseException] = []

    def emit(self, record: logging.LogRecord) -> None:
        if isinstance(record.args, tuple):
            self.heard += [argument for argument in record.args if isinstance(argument, BaseException)]


@contextlib.contextmanager
def _overheard() -> Iterator[list[BaseException]]:
    """Collect the errors that kafka-python only logs while it tries again and again, instead of logging them.

    Its own exception says nothing but "Unable to bootstrap" whatever the reason.
    """
    logger, ear = logging.getLogger("kafka"), _Ear()
    before = logger.propagate, logger.level
    logger.addHandler(ear)
    logger.propagate = False
    logger.setLevel(logging.WARNING)
    try:
        yield ear.heard
    finally:
        logger.removeHandler(ear)
        logger.propagate = before[0]
        logger.setLevel(before[1])


def _refusal(error: BaseException) -> str | None:
    """Return what an operator must put right, None if waiting might help."""
    text = said(error)
    if isinstance(error, errors.SaslAuthenticationFailedError):
        return "it refuses kafka.username or its password"
    if isinstance(error, errors.UnsupportedSaslMechanismError):
        return "it does not offer kafka.sasl_mechanism"
    if isinstance(error, errors.IllegalSaslStateError):
        return "it does not ask for SASL on this port; kafka.security_protocol must say so"
    if "CERTIFICATE_VERIFY_FAILED" in text:
        reason = text.partition("certificate verify failed: ")[2].partition(" (_ssl")[0]
        return f"its certificate is not trusted with kafka.ca_file: {reason or 'verification failed'}"
    if "ALERT" in text and ("CERTIFICATE" in text or "UNKNOWN_CA" in text):
        return "it refuses our certificate or wants one; see kafka.cert_file and kafka.key_file"
    if "[SSL:" in text and ("UNEXPECTED_EOF" in text or "WRONG_VERSION" in text):
        return "it does not speak TLS on this port; kafka.security_protocol must say so"
    if isinstance(error, errors.AuthorizationError):
        return f"it does not allow this user to do so: {text}"
    return None


def _last_words(heard: list[BaseException]) -> str:
    words = [said(error) for error in heard if not isinstance(error, errors.KafkaTimeoutError)]
    reason = f": {words[-1]}" if words else ""
    if words and words[-1] == "socket disconnected":
        reason += " (a broker that wants TLS or SASL does so; see kafka.security_protocol)"
    return f"no answer in {CONNECT_S:g} s{reason}"


def _ms(seconds: float) -> int:
    return round(seconds * 1000)
