"""How a client reaches the cluster, with TLS and SASL; and what went wrong, in one sentence (DESIGN 3.1)."""

import contextlib
import logging
import os
import socket
import ssl
import threading
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Generic, TypeVar

from kafka import KafkaAdminClient, errors
from kafka.net.compat import KafkaNetClient
from kafka.net.transport import KafkaSSLTransport, KafkaTCPTransport

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


OUT_OF_STEP = (
    errors.OutOfOrderSequenceNumberError,
    errors.UnknownProducerIdError,
    errors.InvalidProducerIdMappingError,
    errors.InvalidTxnStateError,
)
"""Broker and producer disagree about what was written, after a batch that expired while the broker was away:
nothing of the transaction counts, and a producer made anew can write it."""


class KafkaClients:
    """Settings from which every client is made: connection arguments, checked once, and the first contact.

    Raises `UnmaskError` (CONFIG) for a file that cannot be read or a password that is missing.
    """

    def __init__(self, settings: Kafka) -> None:
        _let_last_words_through(KafkaTCPTransport)
        _let_last_words_through(KafkaSSLTransport)
        self.settings = settings
        self.arguments: Mapping[str, Any] = _arguments(settings)
        # Its warnings come with every try while a broker is away; what matters of them comes back as errors.
        logging.getLogger("kafka").setLevel(logging.CRITICAL)
        # Calls it an unknown error that a position waits for the end of a transaction.
        logging.getLogger("kafka.coordinator.consumer").setLevel(logging.CRITICAL)

    def admin(self, patience_s: float = CONNECT_S) -> Any:
        """Connect, waiting at most `patience_s`; a refusal is one sentence, and soon.

        Raises `UnmaskError` (LOG_AWAY) if nobody answers, (LOG_UNUSABLE) if we are refused.
        """
        left, attempt = patience_s, ATTEMPT_S
        while True:
            with _overheard() as heard:
                try:
                    return self.make(KafkaAdminClient, bootstrap_timeout_ms=_ms(min(attempt, left)))
                except errors.KafkaError as error:
                    heard.append(error)
            left, attempt = left - attempt, 2 * attempt
            refusal = next(filter(None, map(_refusal, heard)), None)
            if refusal is not None:
                raise self._failed(Code.LOG_UNUSABLE, refusal)
            if left > 0:
                continue
            demand = self._demand() if _hung_up(heard) else None
            if demand is not None:
                raise self._failed(Code.LOG_UNUSABLE, demand)
            raise self._failed(Code.LOG_AWAY, _last_words(heard, patience_s))

    def make(self, kind: Callable[..., T], **arguments: Any) -> T:
        """Make a client of kafka-python; of one that does not come to be no thread and no socket stays."""
        made: list[Any] = []

        def client(**config: Any) -> Any:
            made.append(KafkaNetClient(**config))
            return made[0]

        try:
            return kind(**{**self.arguments, **arguments, "kafka_client": client})
        except BaseException:
            for net in made:
                net.close()
            raise

    def _demand(self) -> str | None:
        """Return what brokers that hang up want us to speak: they do so without a word."""
        if self.settings.security_protocol.endswith("SSL"):
            return None
        if any(map(_speaks_tls, self.settings.bootstrap_servers.split(","))):
            return "it speaks TLS on this port; kafka.security_protocol must say so"
        nobody = {"sasl_mechanism": "PLAIN", "sasl_plain_username": "-", "sasl_plain_password": "-"}
        with _overheard() as heard, contextlib.suppress(errors.KafkaError):
            self.make(
                KafkaAdminClient,
                **{**nobody, "security_protocol": "SASL_PLAINTEXT", "bootstrap_timeout_ms": _ms(ATTEMPT_S)},
            ).close()
        answers = errors.SaslAuthenticationFailedError | errors.UnsupportedSaslMechanismError
        if any(isinstance(error, answers) for error in heard):
            return "it demands SASL on this port; kafka.security_protocol must say so"
        return None

    def _failed(self, code: Code, reason: str) -> UnmaskError:
        return UnmaskError(code, f"Kafka at {self.settings.bootstrap_servers}: {reason}")


class Errand(Generic[T]):
    """A call of kafka-python that takes no timeout, on a thread of its own, which ends with the process."""

    def __init__(self, call: Callable[[], T]) -> None:
        self._done: list[T] = []
        self._failed: list[BaseException] = []
        self._thread = threading.Thread(target=self._run, args=(call,), name="kafka call", daemon=True)
        self._thread.start()

    def ended(self, seconds: float) -> bool:
        """Wait at most `seconds` for the end of the call; return whether it has come."""
        self._thread.join(seconds)
        return not self._thread.is_alive()

    def result(self) -> T:
        """Return or raise what the call, which has ended, did."""
        if self._failed:
            raise self._failed[0]
        return self._done[0]

    def _run(self, call: Callable[[], T]) -> None:
        try:
            self._done.append(call())
        except BaseException as error:
            self._failed.append(error)


def within(seconds: float, call: Callable[[], T]) -> T:
    """Run a call that takes no timeout; raises TimeoutError, and leaves it running, after `seconds`."""
    errand = Errand(call)
    if not errand.ended(seconds):
        raise TimeoutError(f"no answer in {seconds:g} s")
    return errand.result()


@contextlib.contextmanager
def translated(doing: str) -> Iterator[None]:
    """Raise what kafka-python raises as `UnmaskError` (LOG_AWAY or LOG_UNUSABLE), beginning with `doing`."""
    try:
        yield
    except (errors.KafkaError, TimeoutError) as error:
        raise told(doing, error) from error


def told(doing: str, error: BaseException) -> UnmaskError:
    """Return an error of kafka-python as ours: LOG_AWAY if waiting may help, else LOG_UNUSABLE."""
    refusal = _refusal(error)
    code = Code.LOG_AWAY if refusal is None and _may_pass(error) else Code.LOG_UNUSABLE
    return UnmaskError(code, f"{doing}: {refusal or said(error)}")


def _may_pass(error: BaseException) -> bool:
    if isinstance(error, (*OUT_OF_STEP, errors.UnknownBrokerIdError)):
        return True
    # Of a request that timed out under a transaction kafka-python keeps but the text, in a plain KafkaError.
    return isinstance(error, TimeoutError | errors.RetriableError) or type(error) is errors.KafkaError


def said(error: BaseException) -> str:
    """Return an error of kafka-python as part of a sentence."""
    if isinstance(error, errors.NodeNotReadyError):
        return "no broker can be reached"
    if isinstance(error, errors.UnknownBrokerIdError):
        return f"broker {error} has not been heard of yet"
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
            f"kafka.security_protocol is {settings.security_protocol}, which needs a password; set the "
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


def _let_last_words_through(transport: Any) -> None:
    """Let what a broker says before it closes the connection be read.

    kafka-python 3.0.12 reads until nothing is left and, if it then finds the connection closed, throws away
    what it has read: now and then the answer to a wrong password. The close is found by the next read too.
    """
    read = transport._sock_recv
    if read.__name__ != "_sock_recv":
        return

    def patient(self: Any) -> tuple[bytes, Exception | None]:
        data, error = read(self)
        return (data, None) if data else (data, error)

    transport._sock_recv = patient


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


def _hung_up(heard: list[BaseException]) -> bool:
    # A TLS alert, which is how a TLS port answers us, is no frame of Kafka's.
    words = ("socket disconnected", "Invalid frame length")
    return any(word in said(error) for error in heard for word in words)


def _speaks_tls(server: str) -> bool:
    host, _, port = server.rpartition(":")
    context = ssl.create_default_context()
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    try:
        with (
            socket.create_connection((host.strip("[]"), int(port)), ATTEMPT_S) as raw,
            context.wrap_socket(raw),
        ):
            return True
    except (OSError, ValueError):
        return False


def _last_words(heard: list[BaseException], patience_s: float) -> str:
    words = [said(error) for error in heard if not isinstance(error, errors.KafkaTimeoutError)]
    reason = f": {words[-1]}" if words else ""
    return f"no answer in {patience_s:g} s{reason}"


def _ms(seconds: float) -> int:
    return round(seconds * 1000)
