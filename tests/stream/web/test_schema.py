"""Schemathesis looks for requests that the description allows and the server trips over, and the reverse."""

import contextlib
from pathlib import Path

import pytest
import schemathesis
from hypothesis import HealthCheck, given, settings
from hypothesis.errors import Unsatisfiable
from schemathesis import GenerationMode
from schemathesis.specs.openapi.checks import positive_data_acceptance

from stream.web import guard
from tests.stream.web.serving import HOST, Served
from tests.stream.web.world import MANIPULATED, World

# Left out: positive_data_acceptance. What an address, a rate or a period must be is said in sentences, beside
# the field; no schema says that a port is missing, or that what looks like a key belongs into a variable.

ENDLESS = "/api/events"
"""Asked in test_server."""

EXAMPLES = 6
"""Per operation and mode; some 25 operations."""


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_no_request_trips_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("PERSON_BURST", "COMMAND_BURST", "LOGIN_BURST", "ALL_LOGINS_BURST"):
        monkeypatch.setattr(guard, name, 1e9)
    world = World(tmp_path)
    world.list_source("studio")
    world.tell(MANIPULATED, picture_every=4)
    world.look()
    served = Served(world)
    headers = {"host": "127.0.0.1", "x-csrf-token": served.service.csrf}
    schema = schemathesis.openapi.from_asgi("/api/openapi.json", served.app, headers=headers)
    tried = 0

    def check(case: schemathesis.Case) -> None:
        answer = case.call(base_url=HOST, headers=headers)
        case.validate_response(answer, headers=headers, excluded_checks=[positive_data_acceptance])

    quiet = settings(
        max_examples=EXAMPLES, deadline=None, suppress_health_check=list(HealthCheck), database=None
    )
    for found in schema.get_all_operations():
        operation = found.ok()
        if operation.path == ENDLESS:
            continue
        tried += 1
        for mode in (GenerationMode.POSITIVE, GenerationMode.NEGATIVE):
            with contextlib.suppress(Unsatisfiable):  # nothing can be wrong with a request without parameters
                quiet(given(case=operation.as_strategy(mode))(check))()
    assert tried >= 25
