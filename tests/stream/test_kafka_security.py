"""SASL and TLS against a broker that demands them; what is wrong is one sentence, and soon."""

import gc
import os
import socket
import threading
from collections.abc import Iterable, Iterator
from pathlib import Path

import pytest
from kafka.admin import (
    ACL,
    ACLOperation,
    ACLPermissionType,
    ACLResourcePatternType,
    KafkaAdminClient,
    ResourcePattern,
    ResourceType,
)
from kafka.net.transport import KafkaTCPTransport

from stream.clock import SystemClock
from stream.config import Kafka
from stream.config_file import load
from stream.errors import Code, UnmaskError
from stream.kafka_client import CONNECT_S, PASSWORD_VARIABLE, KafkaClients
from stream.kafka_log import KafkaLog
from stream.log import TopicSpec
from tests.conftest import requires
from tests.stream.kafka_broker import PASSWORD, USER, Broker
from tests.stream.log_contract import (
    PATIENCE_S,
    Recorder,
    member,
    number,
    numbers,
    poll_some,
    record,
    write,
)


def used(settings: Kafka, topic: str) -> None:
    """Let every kind of client talk to the broker."""
    log = KafkaLog(settings, 1024 * 1024, SystemClock())
    log.create_topics([TopicSpec(topic, 1)])
    write(log, record(topic, number(1)))
    with member(log, topic, topic) as (consumer, _):
        assert numbers(poll_some(consumer, 1)) == [1]
        consumer.commit([record(topic, number(2))], {})
    log.close()


def refused(settings: Kafka, patience_s: float = CONNECT_S) -> str:
    with pytest.raises(UnmaskError) as caught:
        KafkaLog(settings, 1024 * 1024, SystemClock(), patience_s)
    return f"{caught.value.code}: {caught.value}"


def sasl(broker: Broker, mechanism: str) -> Kafka:
    return Kafka.model_validate(
        {
            "bootstrap_servers": broker.sasl_servers,
            "security_protocol": "SASL_PLAINTEXT",
            "sasl_mechanism": mechanism,
            "username": USER,
            "replication": 1,
        }
    )


def tls(broker: Broker, **given: str) -> Kafka:
    files = {name: str(broker.certificates / file) for name, file in given.items()}
    return Kafka(
        bootstrap_servers=broker.tls_servers,
        security_protocol="SSL",
        replication=1,
        **files,  # type: ignore[arg-type]
    )


@pytest.fixture
def _password(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(PASSWORD_VARIABLE, PASSWORD)


MECHANISMS = ["PLAIN", "SCRAM-SHA-256", "SCRAM-SHA-512"]


@pytest.mark.parametrize("mechanism", MECHANISMS)
@pytest.mark.usefixtures("_password")
def test_sasl(broker: Broker, mechanism: str) -> None:
    used(sasl(broker, mechanism), f"sasl-{mechanism}")


@pytest.mark.parametrize("mechanism", MECHANISMS[:2])
def test_wrong_password(broker: Broker, mechanism: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(PASSWORD_VARIABLE, "wrong")
    sentence = refused(sasl(broker, mechanism))
    assert sentence == (
        f"log_unusable: Kafka at {broker.sasl_servers}: it refuses kafka.username or its password"
    )


def test_password_from_a_file(broker: Broker, tmp_path: Path) -> None:
    file = tmp_path / "password"
    file.write_text(f"{PASSWORD}\n")
    used(
        sasl(broker, "SCRAM-SHA-512").model_copy(update={"password_file": str(file)}),
        "sasl-file",
    )


@pytest.mark.usefixtures("_password")
def test_sasl_where_none_is_spoken(broker: Broker) -> None:
    settings = sasl(broker, "PLAIN").model_copy(update={"bootstrap_servers": broker.servers})
    assert "it does not ask for SASL on this port; kafka.security_protocol must say so" in refused(settings)


def test_tls_with_a_client_certificate(broker: Broker) -> None:
    used(tls(broker, ca_file="ca.pem", cert_file="client.pem", key_file="client.key"), "tls")


def test_tls_without_the_client_certificate_that_is_demanded(broker: Broker) -> None:
    assert "it refuses our certificate or wants one; see kafka.cert_file" in refused(
        tls(broker, ca_file="ca.pem")
    )


def test_tls_of_an_authority_we_do_not_know(broker: Broker) -> None:
    assert "its certificate is not trusted with kafka.ca_file: unable to get local issuer" in refused(
        tls(broker)
    )


def test_tls_for_another_name(broker: Broker) -> None:
    settings = tls(broker, ca_file="ca.pem", cert_file="client.pem", key_file="client.key")
    port = broker.tls_servers.rpartition(":")[2]
    settings = settings.model_copy(update={"bootstrap_servers": f"localhost:{port}"})
    assert "its certificate is not trusted with kafka.ca_file: Hostname mismatch" in refused(settings)


def test_tls_where_none_is_spoken(broker: Broker) -> None:
    settings = tls(broker, ca_file="ca.pem").model_copy(update={"bootstrap_servers": broker.servers})
    assert "it does not speak TLS on this port; kafka.security_protocol must say so" in refused(settings)


@pytest.mark.parametrize("port", ["sasl_servers", "tls_servers"])
def test_neither_where_one_is_demanded(broker: Broker, port: str) -> None:
    demanded = {"sasl_servers": "it demands SASL", "tls_servers": "it speaks TLS"}[port]
    settings = Kafka(bootstrap_servers=getattr(broker, port))
    assert refused(settings, patience_s=1.0).endswith(
        f"{demanded} on this port; kafka.security_protocol must say so"
    )


@pytest.mark.usefixtures("_password")
def test_mechanism_that_is_not_offered(broker: Broker) -> None:
    clients = KafkaClients(sasl(broker, "PLAIN"))
    clients.arguments = {**clients.arguments, "sasl_mechanism": "OAUTHBEARER"}
    with pytest.raises(UnmaskError, match=r"it does not offer kafka\.sasl_mechanism") as caught:
        clients.admin()
    assert caught.value.code is Code.LOG_UNUSABLE


def test_what_is_said_before_hanging_up_is_heard() -> None:
    KafkaClients(Kafka(bootstrap_servers="x:1"))
    ours, theirs = socket.socketpair()
    ours.setblocking(False)
    transport = KafkaTCPTransport(None, ours)
    theirs.sendall(b"no")
    theirs.close()
    assert transport._sock_recv() == (b"no", None)
    data, error = transport._sock_recv()
    assert data == b""
    assert "socket disconnected" in str(error)
    ours.close()


# Access control


CREATOR = ("DESCRIBE", "CREATE", "ALTER_CONFIGS", "DESCRIBE_CONFIGS")
RIGHTS = {
    "TOPIC": ("DESCRIBE", "READ", "WRITE"),
    "GROUP": ("READ",),
    "TRANSACTIONAL_ID": ("DESCRIBE", "WRITE"),
}
"""What docs/kafka.md says a running part needs, on names that begin with the prefix, or `producer.`."""


@pytest.fixture
def guarded(tmp_path: Path) -> Iterator[Broker]:
    """A broker that allows its users nothing, and who comes without a name everything."""
    requires("java", "mvn")
    broker = Broker(tmp_path / "kafka", tmp_path, "--sasl", f"{USER}:{PASSWORD}")
    broker.stop()
    properties = tmp_path / "kafka" / "node-1" / "server.properties"
    with properties.open("a") as file:
        file.write("authorizer.class.name=org.apache.kafka.metadata.authorizer.StandardAuthorizer\n")
        file.write("super.users=User:ANONYMOUS\n")
    broker.start_again(1)
    yield broker
    broker.stop()


def allow(broker: Broker, kind: str, name: str, operations: Iterable[str]) -> None:
    pattern = ResourcePattern(ResourceType[kind], name, ACLResourcePatternType.PREFIXED)
    allowed = [
        ACL(f"User:{USER}", "*", ACLOperation[operation], ACLPermissionType.ALLOW, pattern)
        for operation in operations
    ]
    with KafkaAdminClient(bootstrap_servers=broker.servers) as admin:
        assert not admin.create_acls(allowed)["failed"]


@pytest.mark.usefixtures("_password")
def test_rights_in_the_docs_are_what_it_takes(guarded: Broker) -> None:
    settings = sasl(guarded, "SCRAM-SHA-512")
    theirs = KafkaLog(Kafka(bootstrap_servers=guarded.servers, replication=1), 1024, SystemClock())
    theirs.create_topics([TopicSpec("acl.media", 1)])
    theirs.close()
    log = KafkaLog(settings, 1024, SystemClock())

    def read_and_write(log: KafkaLog) -> None:
        write(log, record("acl.media", b"1"))
        log.consumer("acl-detect", ["acl.media"], Recorder(), "a").poll(1, PATIENCE_S)

    for kind, operations in RIGHTS.items():
        with pytest.raises(UnmaskError) as caught:
            read_and_write(log)
        assert caught.value.code is Code.LOG_UNUSABLE
        allow(guarded, kind, "acl", operations)
        allow(guarded, "TRANSACTIONAL_ID", "producer.", operations if kind == "TRANSACTIONAL_ID" else ())
    write(log, record("acl.media", number(1)))
    with member(log, "acl-detect", "acl.media") as (consumer, _):
        assert numbers(poll_some(consumer, 1)) == [1]
        consumer.commit([record("acl.media", number(2))], {})
    with pytest.raises(UnmaskError, match="it does not allow this user to do so"):
        log.create_topics([TopicSpec("acl.state", 1)])
    allow(guarded, "TOPIC", "acl", CREATOR)
    log.create_topics([TopicSpec("acl.media", 1, retention_s=60.0), TopicSpec("acl.state", 1)])
    assert log.differences(TopicSpec("acl.state", 1)) == []
    log.close()


# Without a broker


def test_nobody_there_is_told_soon_and_leaves_nothing_behind() -> None:
    nobody = Kafka(bootstrap_servers="127.0.0.1:1")
    first = refused(nobody, patience_s=0.3)
    assert first.startswith("log_away: Kafka at 127.0.0.1:1: no answer in 0.3 s: ")
    assert "ECONNREFUSED" in first
    gc.collect()
    before = threading.active_count(), len(os.listdir("/proc/self/fd"))
    refused(nobody, patience_s=0.3)
    gc.collect()
    assert threading.active_count() <= before[0]
    assert len(os.listdir("/proc/self/fd")) <= before[1]


def test_password_must_be_somewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(PASSWORD_VARIABLE, raising=False)
    settings = Kafka(bootstrap_servers="x:1", security_protocol="SASL_SSL", username="u")
    assert f"set the environment variable {PASSWORD_VARIABLE} or kafka.password_file" in refused(settings)
    absent = settings.model_copy(update={"password_file": str(tmp_path / "none")})
    assert "none; it must hold the password: no such file or directory" in refused(absent)


def test_files_that_are_no_certificates_are_named(tmp_path: Path) -> None:
    text = tmp_path / "text.pem"
    text.write_text("no certificate")
    wrong_ca = Kafka(bootstrap_servers="x:1", security_protocol="SSL", ca_file=str(text))
    assert refused(wrong_ca).startswith(
        f"config: kafka.ca_file is {text}; it must hold certificates in PEM: "
    )
    wrong_cert = Kafka(bootstrap_servers="x:1", security_protocol="SSL", cert_file=str(text))
    assert refused(wrong_cert).startswith(f"config: kafka.cert_file is {text} with kafka.key_file ")


@pytest.mark.parametrize(
    ("given", "sentence"),
    [
        (
            "kafka.security_protocol=SASL_SSL",
            "kafka.username is empty; kafka.security_protocol SASL_SSL needs one",
        ),
        (
            "kafka.key_file=k.pem",
            "kafka.key_file is set without kafka.cert_file; both or none would be right",
        ),
        ("kafka.session_s=2", "kafka.session_s is 2 (--set); it must be a number from 6 to 300 (s)"),
    ],
)
def test_settings_that_do_not_go_together(given: str, sentence: str) -> None:
    with pytest.raises(UnmaskError) as caught:
        load(None, [given], {})
    assert (caught.value.code, str(caught.value)) == (Code.CONFIG, sentence)


@pytest.mark.usefixtures("_password")
def test_the_password_is_in_no_setting() -> None:
    settings = Kafka(bootstrap_servers="x:1", security_protocol="SASL_PLAINTEXT", username=USER)
    assert KafkaClients(settings).arguments["sasl_plain_password"] == PASSWORD
    assert PASSWORD not in settings.model_dump_json()
