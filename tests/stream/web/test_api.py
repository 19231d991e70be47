"""REST: what is shown, what may be done, and what is said when it may not."""

import csv
import hashlib
import io
import json
import tempfile
import uuid
import zipfile
from pathlib import Path
from typing import Any

import pytest
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
from cryptography.hazmat.primitives.serialization import load_pem_public_key
from starlette.testclient import TestClient

from stream.config import Web
from stream.copies import Store
from stream.decisions import mutes
from stream.errors import Code, UnmaskError
from stream.log import everything
from stream.records import Topic
from stream.web.access import Role
from tests.stream.web.serving import Served
from tests.stream.web.world import AUTHENTIC, MANIPULATED, World

FAKE_CLIP = bytes(range(256)) * 8


@pytest.fixture
def client(world: World) -> TestClient:
    return Served(world).client()


@pytest.fixture
def incident(world: World) -> str:
    """An open incident with crops and a clip."""
    world.list_source("studio")
    world.story.clip = world.story.store.put(FAKE_CLIP, ".mp4")
    world.tell(AUTHENTIC[:8] + MANIPULATED, picture_every=4)
    world.look()
    name: str = world.card()["incident"]
    return name


def problem(answer: Any, status: int) -> tuple[str, str | None]:
    assert answer.status_code == status, answer.text
    body = answer.json()
    return body["error"], body["field"]


def test_the_wall_is_told_whole_and_then_what_changed(world: World, client: TestClient) -> None:
    world.list_source("studio")
    world.tell(AUTHENTIC)
    world.look()
    told = client.get("/api/wall").json()
    assert [(card["id"], card["state"]) for card in told["feeds"]] == [("studio", "live")]
    assert client.get("/api/wall", params={"since": told["version"]}).json()["feeds"] == []


def test_a_picture_of_a_feed(world: World, client: TestClient, incident: str) -> None:
    answer = client.get("/api/feeds/studio/picture")
    assert answer.headers["content-type"] == "image/jpeg"
    assert answer.content[:2] == b"\xff\xd8"
    assert problem(client.get("/api/feeds/nobody/picture"), 404)


def test_attach_writes_what_ingest_reads(world: World, client: TestClient) -> None:
    body = {"address": "rtmp://192.0.2.7/live/lobby", "fps": 4, "labels": {"region": "north"}}
    answer = client.post("/api/feeds", json=body)
    assert (answer.status_code, answer.json()) == (201, {"id": "lobby"})
    world.look()
    (feed,) = client.get("/api/feeds").json()
    assert (feed["id"], feed["wanted_fps"], feed["labels"]) == ("lobby", 4.0, {"region": "north"})
    assert feed["source"] == "rtmp://192.0.2.7/live/lobby"
    assert problem(client.post("/api/feeds", json=body), 409)[1] == "id"
    assert client.post("/api/feeds", json={**body, "replace": True}).status_code == 201
    assert client.patch("/api/feeds/lobby", json={"fps": 8}).json()["fps"] == 8
    world.look()
    assert client.get("/api/feeds").json()[0]["wanted_fps"] == 8.0
    assert client.get("/api/feeds").json()[0]["labels"] == {"region": "north"}
    assert client.delete("/api/feeds/lobby").status_code == 200
    world.look()
    assert client.get("/api/feeds").json() == []
    assert problem(client.delete("/api/feeds/lobby"), 404)[0].startswith("no stream 'lobby'")


@pytest.mark.parametrize(
    ("body", "field", "said"),
    [
        ({"address": ""}, "address", "must begin with rtmp"),
        ({"address": "/etc/passwd"}, "address", "files are attached by unmask attach"),
        ({"address": "file:///etc/passwd"}, "address", "must begin with"),
        ({"address": "gopher://x/y"}, "address", "scheme 'gopher' is not supported"),
        ({"address": "srt://192.0.2.7"}, "address", "names no port"),
        ({"address": "rtsp://u:hunter2@192.0.2.7/cam"}, "address", "holds a credential"),
        ({"address": "x=rtmp://192.0.2.7/live/a"}, "address", "must begin with"),
        ({"address": "rtmp://192.0.2.7/" + "a" * 2000}, "address", ""),
        ({"address": "env:HOME", "id": "a"}, "address", "env:UNMASK_SOURCE_"),
        ({"address": "env:UNMASK_SOURCE_A"}, "id", "needs one"),
        ({"address": "push:"}, "id", "needs the one"),
        ({"address": "tcp://192.0.2.7:1", "id": "Not Right"}, "id", "is not allowed"),
        ({"address": "tcp://192.0.2.7:1", "fps": 0}, "fps", "above 0"),
        ({"address": "tcp://192.0.2.7:1", "fps": "x"}, "fps", "number"),
        ({"address": "tcp://192.0.2.7:1", "labels": {"": "x"}}, "labels", "must have a name"),
        ({"address": "tcp://192.0.2.7:1", "labels": {"a": "x" * 200}}, "labels", "at most 128"),
        ({"address": "tcp://192.0.2.7:1", "other": 1}, "other", "Extra"),
    ],
)
def test_what_is_wrong_with_a_feed_is_said_beside_the_field(
    client: TestClient, body: dict[str, Any], field: str, said: str
) -> None:
    answer = client.post("/api/feeds", json=body)
    if said == "":
        assert answer.status_code in (201, 422)
        return
    error, found = problem(answer, 422)
    assert found == field
    assert said in error
    assert "hunter2" not in error


def test_a_variable_is_written_and_not_looked_up(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("UNMASK_SOURCE_LOBBY", "rtsp://u:hunter2@192.0.2.7/cam")
    client = Served(world).client()
    answer = client.post("/api/feeds", json={"address": "env:UNMASK_SOURCE_LOBBY", "id": "lobby"})
    assert answer.status_code == 201, answer.text
    (record,) = everything(world.log, world.topic(Topic.SOURCES))
    entry = json.loads(record.value or b"")
    assert (entry["secret_ref"], "url" in entry, "scheme" in entry) == (
        "env:UNMASK_SOURCE_LOBBY",
        False,
        False,
    )
    world.look()
    assert "hunter2" not in client.get("/api/feeds").text


def test_mute_and_unmute(world: World, client: TestClient) -> None:
    where = "/api/feeds/studio/mute"
    assert problem(client.post(where, json={"seconds": 60, "reason": "x"}), 404)
    world.list_source("studio")
    world.look()
    assert problem(client.post(where, json={"seconds": 60, "reason": " "}), 422)[1] == "reason"
    assert problem(client.post(where, json={"seconds": 1e9, "reason": "x"}), 422)[1] == "seconds"
    assert client.post(where, json={"seconds": 60, "reason": "rehearsal"}).status_code == 200
    world.look()
    assert world.card()["muted_why"] == "rehearsal"
    assert mutes(world.config, world.log)["studio"].holds(world.clock.now_us())
    world.clock.advance(1)
    assert client.delete(where).status_code == 200
    world.look()
    assert world.card()["muted_until_us"] is None
    assert not mutes(world.config, world.log)["studio"].holds(world.clock.now_us())
    assert problem(client.delete(where), 404)


def test_an_incident_with_all_that_was_told_of_it(client: TestClient, incident: str) -> None:
    told = client.get(f"/api/incidents/{incident}").json()
    assert (told["status"], told["stream"]) == ("open", "studio")
    assert told["newest"]["models"][0]["sha256"] == "a" * 64
    assert told["events"][0]["event"] == "opened"
    assert told["thresholds"]["open_probability"] == 0.9
    assert {item["kind"] for item in told["newest"]["evidence"]} == {"crop", "overlay", "clip"}
    assert problem(client.get("/api/incidents/nobody"), 404)


def test_the_timeline_has_what_led_to_it_and_what_each_network_said(
    client: TestClient, incident: str
) -> None:
    told = client.get(f"/api/incidents/{incident}").json()
    times = client.get(f"/api/incidents/{incident}/timeline").json()
    assert times["whole"]
    stamps = [frame["us"] for frame in times["frames"]]
    assert stamps == sorted(stamps)
    assert stamps[0] < told["first_us"]
    face = times["frames"][-1]["faces"][0]
    assert (face["logits"], face["fused"], face["quality"]) == ({"m": 6.0}, 6.0, 1.0)
    assert {one["verdict"] for one in times["verdicts"]} >= {"manipulated", "inconclusive"}


def test_evidence_is_served_whole_and_in_ranges(client: TestClient, incident: str) -> None:
    told = client.get(f"/api/incidents/{incident}").json()["newest"]
    clip = next(item["ref"] for item in told["evidence"] if item["kind"] == "clip").removeprefix(
        "evidence://"
    )
    whole = client.get(f"/api/evidence/{clip}")
    assert (whole.content, whole.headers["content-type"]) == (FAKE_CLIP, "video/mp4")
    assert "sandbox" in whole.headers["content-security-policy"]
    part = client.get(f"/api/evidence/{clip}", headers={"range": "bytes=10-19"})
    assert (part.status_code, part.content) == (206, FAKE_CLIP[10:20])
    assert part.headers["content-range"] == f"bytes 10-19/{len(FAKE_CLIP)}"
    assert client.get(f"/api/evidence/{clip}", headers={"range": "bytes=99999-"}).status_code == 416
    assert problem(client.get(f"/api/evidence/{'0' * 64}"), 404)
    assert client.get("/api/evidence/..%2f..%2fkey.pem").status_code in (404, 422)


def test_evidence_of_other_machines_comes_from_the_store_of_copies(
    tmp_path: Path, world: World, incident: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    served = Served(world)
    client, evidence = served.client(), served.service.evidence
    store = served.service.copies = Store(f"memory://evidence-{uuid.uuid4().hex}")
    told = client.get(f"/api/incidents/{incident}").json()["newest"]
    clip = next(item["ref"] for item in told["evidence"] if item["kind"] == "clip")
    path = evidence.path(clip)
    store.write("files", path.name, path.read_bytes())
    path.unlink()
    before = set(tmp_path.iterdir())
    part = client.get(f"/api/evidence/{path.stem}", headers={"range": "bytes=10-19"})
    assert (part.status_code, part.content) == (206, FAKE_CLIP[10:20])
    assert set(tmp_path.iterdir()) == before
    archive = zipfile.ZipFile(io.BytesIO(client.get(f"/api/incidents/{incident}/bundle").content))
    assert archive.read(f"evidence/{path.name}") == FAKE_CLIP
    store.delete("files", path.name)
    assert problem(client.get(f"/api/evidence/{path.stem}"), 404)


def test_the_bundle_proves_what_left_here(tmp_path: Path, client: TestClient, incident: str) -> None:
    answer = client.get(f"/api/incidents/{incident}/bundle")
    assert answer.headers["content-disposition"] == f'attachment; filename="incident-{incident}.zip"'
    archive = zipfile.ZipFile(io.BytesIO(answer.content))
    manifest = archive.read("manifest.json")
    key = load_pem_public_key(client.get("/api/bundle-key").content)
    assert isinstance(key, Ed25519PublicKey)
    key.verify(archive.read("manifest.sig"), manifest)
    with pytest.raises(InvalidSignature):
        key.verify(archive.read("manifest.sig"), manifest + b" ")
    listed = json.loads(manifest)["files"]
    assert set(archive.namelist()) == {*listed, "manifest.json", "manifest.sig", "public.pem"}
    for name, digest in listed.items():
        assert hashlib.sha256(archive.read(name)).hexdigest() == digest
    assert any(archive.read(name) == FAKE_CLIP for name in listed)
    assert json.loads(archive.read("scores.json"))["records"][0]["stream"] == "studio"
    assert json.loads(manifest)["missing"] == []


def test_a_decision_comes_back_as_history_precision_and_csv(
    world: World, client: TestClient, incident: str
) -> None:
    where = f"/api/incidents/{incident}/decision"
    assert problem(client.post(where, json={"decision": "dismissed", "reason": " "}), 422)[1] == "reason"
    assert problem(client.post(where, json={"decision": "perhaps"}), 422)[1] == "decision"
    assert client.post(where, json={"decision": "dismissed", "reason": '=1+1 "poster"'}).status_code == 201
    world.look()
    found = client.get("/api/incidents", params={"decision": "dismissed", "q": "poster"}).json()
    assert [one["id"] for one in found["incidents"]] == [incident]
    told = client.get("/api/precision").json()
    assert (told["feeds"]["studio"]["precision"], told["all"]["dismissed"]) == (0.0, 1)
    rows = list(csv.DictReader(io.StringIO(client.get("/api/incidents.csv").text)))
    assert (rows[0]["id"], rows[0]["decision"], rows[0]["decision_reason"]) == (
        incident,
        "dismissed",
        '\'=1+1 "poster"',
    )
    assert client.get("/api/incidents.json").json()[0]["decided_by"] == "local"
    assert client.get(f"/api/incidents/{incident}").json()["decisions"][0]["author"] == "local"


def test_history_goes_on_page_by_page(world: World, client: TestClient) -> None:
    world.list_source("studio")
    for _ in range(3):
        world.tell(MANIPULATED + "." * 80)
    world.look()
    seen, before = [], ""
    while page := client.get("/api/incidents", params={"limit": 2, "before": before}).json()["incidents"]:
        seen += [one["id"] for one in page]
        before = seen[-1]
    assert len(seen) == len(set(seen)) == 3
    assert seen == sorted(seen, reverse=True)


def test_faces_without_an_alert_are_drawn_and_reviewed(tmp_path: Path) -> None:
    world = World(tmp_path, web=Web(audit_rate=1.0))
    client = Served(world).client()
    world.list_source("studio")
    world.tell(AUTHENTIC, picture_every=4)
    world.look()
    world.look()
    told = client.get("/api/samples").json()
    (sample,) = told["samples"]
    assert (told["total"], told["rate"], sample["probability"]) == (1, 1.0, 1.0)
    assert client.get(f"/api/samples/{sample['id']}/picture").content[:2] == b"\xff\xd8"
    answer = client.post(f"/api/samples/{sample['id']}/decision", json={"decision": "dismissed"})
    assert answer.status_code == 201
    world.look()
    assert client.get("/api/samples").json()["total"] == 0
    missed = client.get("/api/precision").json()["missed"]
    assert missed == {"reviewed": 1, "found": 0, "faces": 1, "share": 0.0}
    assert client.get("/api/precision").json()["all"]["confirmed"] == 0
    world.close()


def test_a_face_that_raised_an_alert_is_not_in_the_sample(tmp_path: Path) -> None:
    world = World(tmp_path, web=Web(audit_rate=1.0))
    world.list_source("studio")
    world.tell(MANIPULATED, picture_every=4)
    world.look()
    world.look()
    assert world.view.samples() == []
    world.close()


def test_coverage_of_feeds_by_day(world: World, client: TestClient) -> None:
    world.list_source("studio")
    world.tell(AUTHENTIC)
    world.clock.advance(100)
    world.look()
    told = client.get("/api/coverage").json()
    (row,) = told["rows"]
    assert (row["stream"], row["day"], told["share"]) == ("studio", "2023-11-14", 1.0)
    assert row["unwatched_s"]["no_record"] == pytest.approx(98, abs=1)
    assert client.get("/api/coverage", params={"from": "2020-01-01", "to": "2020-01-02"}).json()["rows"] == []
    assert problem(client.get("/api/coverage", params={"from": "2020-01-01"}), 422)[1] == "from"
    assert problem(client.get("/api/coverage", params={"from": "yesterday"}), 422)[1] == "from"


def test_who_did_what_is_kept(world: World, client: TestClient, incident: str) -> None:
    client.post("/api/feeds", json={"address": "tcp://192.0.2.7:9/x?key=hunter2", "id": "x"})
    client.post("/api/feeds", json={"address": "tcp://192.0.2.7:9", "id": "x"})
    client.post(f"/api/incidents/{incident}/decision", json={"decision": "confirmed"})
    client.get(f"/api/incidents/{incident}/bundle")
    told = client.get("/api/audit").json()
    assert {(one["who"], one["action"], one["about"]) for one in told} == {
        ("local", "attach", "x"),
        ("local", "incident confirmed", incident),
        ("local", "bundle", incident),
    }
    assert "hunter2" not in json.dumps(told)


def test_a_log_that_is_away_is_said(
    world: World, client: TestClient, monkeypatch: pytest.MonkeyPatch
) -> None:

    assert client.get("/readyz").status_code == 503
    world.look()
    assert client.get("/readyz").status_code == 200

    def away(*args: object) -> None:
        raise UnmaskError(Code.LOG_AWAY, "the cluster does not answer")

    monkeypatch.setattr(world.log, "producer", away)
    answer = client.post("/api/feeds", json={"address": "tcp://192.0.2.7:9", "id": "x"})
    assert (answer.status_code, answer.json()["error"]) == (503, "the cluster does not answer")
    world.view.away = "the cluster does not answer"
    assert client.get("/readyz").status_code == 503
    assert client.get("/healthz").status_code == 200
    assert client.get("/api/wall").json()["away"] == "the cluster does not answer"


def test_pages_and_their_files_are_ours_alone(client: TestClient) -> None:
    for path in ("/", "/incident/abc", "/feeds", "/coverage", "/history", "/review", "/audit"):
        answer = client.get(path)
        assert answer.status_code == 200
        assert "default-src 'none'" in answer.headers["content-security-policy"]
    assert "http://" not in client.get("/").text.replace("http://www.w3.org", "")
    assert client.get("/static/app.js").status_code == 200
    assert client.get("/static/../../config.py").status_code == 404
    assert client.get("/nothing").status_code == 404


ROUTES = [
    ("GET", "/api/wall", Role.VIEWER),
    ("GET", "/api/feeds", Role.VIEWER),
    ("POST", "/api/feeds", Role.OPERATOR),
    ("PATCH", "/api/feeds/studio", Role.OPERATOR),
    ("DELETE", "/api/feeds/studio", Role.OPERATOR),
    ("GET", "/api/feeds/studio/picture", Role.VIEWER),
    ("POST", "/api/feeds/studio/mute", Role.MODERATOR),
    ("DELETE", "/api/feeds/studio/mute", Role.MODERATOR),
    ("GET", "/api/incidents", Role.VIEWER),
    ("GET", "/api/incidents.csv", Role.VIEWER),
    ("GET", "/api/incidents.json", Role.VIEWER),
    ("GET", "/api/incidents/abc", Role.VIEWER),
    ("GET", "/api/incidents/abc/timeline", Role.VIEWER),
    ("GET", "/api/incidents/abc/bundle", Role.VIEWER),
    ("GET", "/api/bundle-key", Role.VIEWER),
    ("POST", "/api/incidents/abc/decision", Role.MODERATOR),
    ("GET", "/api/evidence/" + "0" * 64, Role.VIEWER),
    ("GET", "/api/samples", Role.VIEWER),
    ("GET", "/api/samples/" + "0" * 24 + "/picture", Role.VIEWER),
    ("POST", "/api/samples/" + "0" * 24 + "/decision", Role.MODERATOR),
    ("GET", "/api/precision", Role.VIEWER),
    ("GET", "/api/coverage", Role.VIEWER),
    ("GET", "/api/audit", Role.OPERATOR),
]


def test_every_route_asks_for_its_role(world: World) -> None:
    served = Served(world, open_to_all=False)
    clients = {role: served.client(role) for role in Role}
    stranger = served.client()
    for method, path, needed in ROUTES:
        assert stranger.request(method, path).status_code == 401, path
        for role, client in clients.items():
            status = client.request(method, path).status_code
            assert (status == 403) == (role < needed), (method, path, role, status)
    described = clients[Role.VIEWER].get("/api/openapi.json").json()["paths"]
    known = {(method.upper(), path) for path, methods in described.items() for method in methods}
    assert len(known) == len(ROUTES) + 4, (
        "a route without a line above: /api/events and three of /api/session apart"
    )
    assert stranger.get("/api/openapi.json").status_code == 401
    assert stranger.get("/api/events").status_code == 401
