"""The application of a world, asked without a network."""

from typing import Any

from starlette.testclient import TestClient

from stream.evidence import EvidenceStore
from stream.web.access import Role, Sessions, Tokens, add_token, tokens_path
from stream.web.app import build_app
from stream.web.guard import Place
from stream.web.service import Service
from tests.stream.web.world import World

HOST = "http://127.0.0.1:8470"


class Served:
    """What a `WebServer` assembles, without its threads. `open`: on loopback, where nobody logs in."""

    def __init__(self, world: World, open_to_all: bool = True, **place: Any) -> None:
        path = tokens_path(world.config)
        self.tokens = {} if open_to_all else {role: add_token(path, role.word, role) for role in Role}
        tokens = Tokens(path, world.clock)
        facts = {"host": "127.0.0.1" if open_to_all else "0.0.0.0", "open": open_to_all, **place}
        self.service = Service(
            world.config,
            world.log,
            world.clock,
            world.view,
            EvidenceStore(world.story.folder, world.clock),
            tokens,
            Sessions(tokens, world.clock),
            Place(**facts),
            "csrf-of-this-process" if open_to_all else "",
            world.story.folder / "key.pem",
        )
        self.app = build_app(self.service)

    def client(self, role: Role | None = None, base: str = HOST) -> TestClient:
        """Return a client: of loopback (with the header that pages send), or with the token of a role."""
        headers = {"x-csrf-token": self.service.csrf} if self.service.csrf else {}
        if role is not None:
            headers = {"authorization": f"Bearer {self.tokens[role]}"}
        return TestClient(self.app, base, headers=headers)
