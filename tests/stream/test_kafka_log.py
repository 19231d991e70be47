"""The log over a real Kafka cluster: the contract, and what only it must get right."""

from collections.abc import Iterator
from functools import partial

import pytest

from stream.clock import SystemClock
from stream.config import Kafka
from stream.kafka_log import KafkaLog
from stream.log import LogFactory
from tests.stream.kafka_broker import Broker, given_servers
from tests.stream.log_contract import LogContract

SESSION_S = 6.0
"""The least that brokers allow."""

MESSAGE_BYTES = 1024 * 1024


@pytest.fixture(scope="module")
def servers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    given = given_servers()
    if given is not None:
        yield given
        return
    broker = Broker(tmp_path_factory.mktemp("kafka"))
    yield broker.servers
    broker.stop()


@pytest.fixture
def settings(servers: str) -> Kafka:
    return Kafka(bootstrap_servers=servers, replication=1, session_s=SESSION_S)


class TestContract(LogContract):
    session_s = SESSION_S

    @pytest.fixture
    def factory(self, settings: Kafka) -> LogFactory:
        return partial(KafkaLog, settings, MESSAGE_BYTES, SystemClock())
