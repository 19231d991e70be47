"""The Kafka that tests of this folder share; started only if one of them asks for it."""

from collections.abc import Iterator

import pytest

from tests.conftest import requires
from tests.stream.kafka_broker import PASSWORD, USER, Broker, given_servers, make_certificates


@pytest.fixture(scope="session")
def broker(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Broker]:
    """A broker of our own that also listens with SASL and with TLS."""
    requires("java", "mvn", "openssl")
    certificates = tmp_path_factory.mktemp("certificates")
    make_certificates(certificates)
    options = ("--sasl", f"{USER}:{PASSWORD}", "--tls", str(certificates))
    broker = Broker(tmp_path_factory.mktemp("kafka"), certificates, *options)
    yield broker
    broker.stop()


@pytest.fixture
def servers(request: pytest.FixtureRequest) -> str:
    """The cluster that UNMASK_KAFKA names, else a broker of our own."""
    given = given_servers()
    if given is not None:
        return given
    broker: Broker = request.getfixturevalue("broker")
    return broker.servers
