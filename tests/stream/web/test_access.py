"""Tokens, sessions, forged requests, foreign hosts, too many requests."""

import io
import stat
from pathlib import Path

import pytest

from stream import tokens as commands
from stream.clock import FakeClock
from stream.config import Config, Web
from stream.errors import UnmaskError
from stream.web.access import (
    Rates,
    Role,
    Sessions,
    Tokens,
    add_token,
    digest_of,
    is_loopback,
    read_tokens,
    remove_token,
)
from stream.web.guard import LOGIN_BURST, MAX_BODY, Place
from tests.stream.web.serving import Served
from tests.stream.web.world import World


def test_a_token_is_kept_as_a_hash_and_ends_when_it_is_removed(tmp_path: Path) -> None:
    path, clock = tmp_path / "web" / "tokens", FakeClock()
    token = add_token(path, "ada", Role.MODERATOR)
    assert token not in path.read_text()
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    tokens = Tokens(path, clock)
    entry = tokens.find(token)
    assert entry is not None
    assert (entry.name, entry.role) == ("ada", Role.MODERATOR)
    assert tokens.find(token + "x") is None
    assert tokens.find(digest_of(token)) is None  # what is kept opens nothing
    remove_token(path, "ada")
    clock.advance(1.1)
    assert tokens.find(token) is None
    with pytest.raises(UnmaskError, match="no token of 'ada'; there are: none"):
        remove_token(path, "ada")


def test_a_broken_tokens_file_is_said_and_lets_nobody_in(tmp_path: Path) -> None:
    path, clock = tmp_path / "tokens", FakeClock()
    token = add_token(path, "ada", Role.VIEWER)
    tokens = Tokens(path, clock)
    path.write_text(path.read_text() + "# a comment\nnonsense\n")
    clock.advance(1.1)
    assert tokens.find(token) is None
    with pytest.raises(UnmaskError, match=r"line 3 of tokens file .* is no NAME ROLE SHA256"):
        Tokens(path, clock)
    path.write_text(f"ada chief {'0' * 64}\n")
    with pytest.raises(UnmaskError, match="role is 'chief'"):
        read_tokens(path)


@pytest.mark.parametrize("name", ["", " ", "a b", "-x", "x" * 65, "a\nb operator " + "0" * 64])
def test_names_cannot_write_lines_of_their_own(tmp_path: Path, name: str) -> None:
    with pytest.raises(UnmaskError, match="name is"):
        add_token(tmp_path / "tokens", name, Role.VIEWER)
    assert not (tmp_path / "tokens").exists()


def test_the_commands(tmp_path: Path) -> None:
    config, out = Config(data_dir=str(tmp_path)), io.StringIO()
    commands.add(config, "ada", "operator", out)
    assert len(out.getvalue().strip()) >= 43
    with pytest.raises(UnmaskError, match="ada has a token already"):
        commands.add(config, "ada", "viewer", out)
    out = io.StringIO()
    commands.listed(config, out)
    assert out.getvalue() == "ada operator\n"
    commands.remove(Config(web=Web(tokens_file=str(tmp_path / "web/tokens"))), "ada", out)
    assert read_tokens(tmp_path / "web/tokens") == []


def test_a_session_ends_with_its_time_its_token_and_its_logout(tmp_path: Path) -> None:
    clock = FakeClock()
    add_token(tmp_path / "tokens", "ada", Role.VIEWER)
    tokens = Tokens(tmp_path / "tokens", clock)
    (entry,) = read_tokens(tmp_path / "tokens")
    sessions = Sessions(tokens, clock)
    first, second, third = (sessions.begin(entry) for _ in range(3))
    found = sessions.person(first)
    assert found is not None
    assert found.csrf
    sessions.end(first)
    assert sessions.person(first) is None
    clock.advance(12 * 3600 + 1)
    assert sessions.person(second) is None
    fourth = sessions.begin(entry)
    remove_token(tmp_path / "tokens", "ada")
    clock.advance(1.1)
    assert sessions.person(third) is sessions.person(fourth) is None


def test_rates_let_a_burst_through_and_then_so_many_a_second() -> None:
    clock = FakeClock()
    rates = Rates(2.0, 3.0, clock)
    assert [rates.wait_s("a") for _ in range(3)] == [0, 0, 0]
    assert rates.wait_s("a") == pytest.approx(0.5)
    assert rates.wait_s("b") == 0
    clock.advance(0.5)
    assert rates.wait_s("a") == 0


@pytest.mark.parametrize(
    ("host", "found"), [("127.0.0.1", True), ("[::1]", True), ("localhost", True), ("0.0.0.0", False)]
)
def test_loopback(host: str, found: bool) -> None:
    assert is_loopback(host) is found


@pytest.mark.parametrize(
    ("place", "host", "known"),
    [
        (Place("127.0.0.1", True), "127.0.0.1:8470", True),
        (Place("127.0.0.1", True), "localhost:8470", True),
        (Place("127.0.0.1", True), "evil.example:8470", False),
        (Place("127.0.0.1", True), "", False),
        (Place("127.0.0.1", False, "https://unmask.example"), "unmask.example", True),
        (Place("0.0.0.0", False), "anything.example", True),
        (Place("0.0.0.0", False, "https://unmask.example"), "other.example", False),
    ],
)
def test_only_names_of_ours_are_answered(place: Place, host: str, known: bool) -> None:
    assert place.knows(host) is known


def test_a_page_that_points_its_name_at_us_gets_nothing(world: World) -> None:
    client = Served(world).client(base="http://evil.example")
    assert client.get("/api/wall").status_code == 421


def test_a_browser_logs_in_and_its_cookie_alone_changes_nothing(world: World) -> None:
    served = Served(world, open_to_all=False)
    client = served.client(base="https://unmask.example")
    assert client.post("/api/session", json={"token": "x"}).status_code == 401
    answer = client.post("/api/session", json={"token": served.tokens[Role.OPERATOR]})
    assert (answer.json()["name"], answer.json()["role"]) == ("operator", "operator")
    cookie = answer.headers["set-cookie"]
    assert "HttpOnly" in cookie
    assert "SameSite=strict" in cookie
    assert client.get("/api/wall").status_code == 200
    body = {"address": "tcp://192.0.2.7:9", "id": "x"}
    assert client.post("/api/feeds", json=body).status_code == 403
    right = {"x-csrf-token": answer.json()["csrf"]}
    for origin, status in (("https://evil.example", 403), ("https://unmask.example", 201)):
        sent = client.post("/api/feeds", json=body, headers={**right, "origin": origin})
        assert sent.status_code == status
    assert client.delete("/api/session", headers=right).json()["name"] is None
    assert client.get("/api/wall").status_code == 401
    world.look()
    told = served.client(Role.OPERATOR).get("/api/audit").json()
    assert {one["action"] for one in told} == {"attach", "login", "login refused"}


def test_https_makes_the_cookie_secure(world: World) -> None:
    served = Served(world, open_to_all=False, secure=True)
    client = served.client(base="https://unmask.example")
    answer = client.post("/api/session", json={"token": served.tokens[Role.VIEWER]})
    assert "Secure" in answer.headers["set-cookie"]
    assert answer.headers["strict-transport-security"].startswith("max-age")


def test_on_loopback_foreign_pages_change_nothing(world: World) -> None:
    served = Served(world)
    client = served.client()
    del client.headers["x-csrf-token"]
    body = {"address": "tcp://192.0.2.7:9", "id": "x"}
    assert client.post("/api/feeds", json=body).status_code == 403
    csrf = client.get("/api/session").json()["csrf"]
    assert client.post("/api/feeds", json=body, headers={"x-csrf-token": csrf}).status_code == 201


def test_logins_are_tried_only_so_often(world: World) -> None:
    client = Served(world, open_to_all=False).client()
    found = [
        client.post("/api/session", json={"token": "x"}).status_code for _ in range(round(LOGIN_BURST) + 1)
    ]
    assert found[-1] == 429
    assert set(found[:-1]) == {401}
    world.clock.advance(6)
    assert client.post("/api/session", json={"token": "x"}).status_code == 401


def test_commands_are_taken_only_so_often(world: World) -> None:
    client = Served(world).client()
    found = [client.delete("/api/feeds/x") for _ in range(32)]
    assert found[0].status_code == 404
    assert found[-1].status_code == 429
    assert int(found[-1].headers["retry-after"]) >= 1


def test_bodies_are_bounded(world: World) -> None:
    client = Served(world).client()
    assert client.post("/api/feeds", content=b"x" * (MAX_BODY + 1)).status_code == 413

    def parts() -> "object":
        yield b"{}"

    assert client.post("/api/feeds", content=parts()).status_code == 411  # type: ignore[arg-type]
