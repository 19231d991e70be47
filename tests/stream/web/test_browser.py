"""The pages in a real browser, over topics written as detect writes them."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from stream.config import Web
from stream.marker import write_clip
from stream.web.access import Role, add_token, tokens_path
from stream.web.server import WebServer
from tests.conftest import requires
from tests.stream.web.browser import page, settled
from tests.stream.web.test_server import Running
from tests.stream.web.world import AUTHENTIC, MANIPULATED, World

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]


@pytest.fixture
def running(tmp_path: Path) -> Iterator[Running]:
    requires("chromium")
    made = Running(tmp_path, audit_rate=1.0)
    yield made
    made.close()


def incident(running: Running, folder: Path) -> None:
    """The feed `studio` has an open incident with a clip, `calm` and the copies have none."""
    world = running.world
    clip = write_clip(folder / "clip.mp4", 6, [(2, 6)])
    world.story.clip = world.story.store.put(clip.read_bytes(), ".mp4")
    world.list_source("studio", labels={"region": "north"})
    world.tell(AUTHENTIC[:8] + MANIPULATED, picture_every=4)
    running.until("/api/wall", lambda told: told["open_total"] == 1)


def test_from_the_wall_to_a_dismissal_by_keyboard_alone(running: Running, tmp_path: Path) -> None:
    incident(running, tmp_path)
    with page() as tab:
        tab.goto(running.url)
        tab.wait_for_selector('[data-feed="studio"].bad')
        settled(tab, "document.querySelector('[data-feed=studio] img')?.naturalWidth > 0")
        assert tab.locator("[data-feed=studio] rect.manipulated").count() == 1
        tab.get_by_role("link", name="Look at the incident").focus()
        tab.keyboard.press("Enter")
        tab.wait_for_selector("svg.chart")
        settled(tab, "document.querySelector('video')?.readyState >= 1")
        assert tab.evaluate("document.querySelector('video').duration") == pytest.approx(6, abs=0.2)
        settled(tab, "document.querySelector('.crops img')?.naturalWidth > 0")
        overlay = tab.get_by_role("button", name="Where the networks looked").first
        before = tab.locator(".crops img").first.get_attribute("src")
        overlay.focus()
        tab.keyboard.press("Space")
        assert tab.locator(".crops img").first.get_attribute("src") != before
        tab.get_by_role("button", name="Dismiss").focus()
        tab.keyboard.press("Enter")
        assert tab.evaluate("document.activeElement.name") == "reason"
        tab.keyboard.press("Tab")
        tab.keyboard.press("Enter")  # without a reason
        tab.wait_for_selector("#error-reason:not(:empty)")
        assert "reason is empty" in tab.inner_text("#error-reason")
        tab.keyboard.type("a poster in the background")
        tab.keyboard.press("Tab")
        tab.keyboard.press("Enter")
        tab.wait_for_selector("text=by local")
        running.until("/api/incidents?decision=dismissed", lambda told: told["total"] == 1)
        tab.get_by_role("link", name="History").click()
        tab.wait_for_selector("text=a poster in the background")
        tab.said.clear()  # the refusal of the empty reason


def test_a_feed_is_attached_with_its_errors_beside_the_field(running: Running) -> None:
    with page() as tab:
        tab.goto(f"{running.url}/feeds")
        tab.get_by_label("Address").fill("rtsp://u:hunter2@192.0.2.7/cam")
        tab.get_by_role("button", name="Attach").click()
        tab.wait_for_selector("#error-address:not(:empty)")
        assert "holds a credential" in tab.inner_text("#error-address")
        assert tab.evaluate("document.activeElement.name") == "address"
        assert tab.locator("input[name=address]").get_attribute("aria-invalid") == "true"
        tab.get_by_label("Address").fill("rtmp://192.0.2.7/live/lobby")
        tab.get_by_label("Labels").fill("region=north")
        tab.get_by_role("button", name="Attach").click()
        tab.wait_for_selector('tr[data-feed="lobby"]')
        assert "region=north" in tab.inner_text('tr[data-feed="lobby"]')
        tab.get_by_role("button", name="Detach").click()
        tab.locator("dialog").get_by_role("button", name="Detach").click()
        tab.wait_for_selector('tr[data-feed="lobby"]', state="detached")
        tab.said.clear()  # the refusal


def test_two_hundred_feeds_draw_only_what_is_seen_and_fit_a_phone(running: Running) -> None:
    running.world.list_source("studio")
    running.world.copies(200, AUTHENTIC[:6])
    with page(width=390, height=844, color_scheme="dark") as tab:
        tab.goto(running.url)
        settled(tab, "document.querySelectorAll('.tile').length === 201")
        tiles = "[...document.querySelectorAll('.tile')]"
        drawn = tab.evaluate(f"{tiles}.filter((one) => one.tile.visible).length")
        assert 0 < drawn < 40
        assert tab.evaluate("document.documentElement.scrollWidth <= innerWidth")
        assert tab.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(16, 21, 27)"
        for path in ("/history", "/coverage", "/feeds", "/review", "/audit"):
            tab.goto(running.url + path)
            tab.wait_for_selector("h1")
            assert tab.evaluate("document.documentElement.scrollWidth <= innerWidth"), path


def test_a_face_without_an_alert_is_reviewed(running: Running) -> None:
    running.world.list_source("studio")
    running.world.tell(AUTHENTIC, picture_every=4)
    running.until("/api/samples", lambda told: told["total"] == 1)
    with page() as tab:
        tab.goto(f"{running.url}/review")
        settled(tab, "document.querySelector('.tile img')?.naturalWidth > 0")
        tab.get_by_role("button", name="Not manipulated").click()
        tab.wait_for_selector("text=Noted.")
        running.until("/api/precision", lambda told: told["missed"]["reviewed"] == 1)


def test_who_has_no_token_sees_nothing_and_a_viewer_cannot_decide(world: World, tmp_path: Path) -> None:
    requires("chromium")
    config = world.config.model_copy(update={"web": Web(listen="127.0.0.1:0", auth="always")})
    token = add_token(tokens_path(config), "vera", Role.VIEWER)
    server = WebServer(config, world.log, world.clock)
    server.start()
    try:
        with page() as tab:
            tab.goto(server.url)
            tab.get_by_label("Token").fill("wrong")
            tab.get_by_role("button", name="Log in").click()
            tab.wait_for_selector("text=this token is not known")
            tab.get_by_label("Token").fill(token)
            tab.get_by_role("button", name="Log in").click()
            tab.wait_for_selector("text=vera, viewer")
            assert not tab.get_by_role("link", name="Audit").is_visible()
            tab.get_by_role("link", name="Feeds").click()
            tab.wait_for_selector("text=Attaching needs the role operator.")
            tab.get_by_role("button", name="Log out").click()
            tab.wait_for_selector("text=Token")
            tab.said.clear()  # the refused token
    finally:
        assert server.stop(30)
