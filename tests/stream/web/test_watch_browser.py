"""The whole way, as a moderator goes it: a real RTMP feed, `unmask watch`, a browser.

Screenshots for the docs are written where UNMASK_SCREENSHOTS names a folder.
"""

import json
import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx2 as httpx
import pytest

from stream.marker import write_clip
from tests.conftest import requires
from tests.stream.servers import Publisher, RtmpServer, free_port, running
from tests.stream.services import Service
from tests.stream.web.browser import page, settled

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

PLANTED = [(6, 16)]

RED = """(() => {
  const video = document.querySelector('video'), canvas = document.createElement('canvas');
  [canvas.width, canvas.height] = [video.videoWidth, video.videoHeight];
  const context = canvas.getContext('2d');
  context.drawImage(video, 0, 0);
  const { data } = context.getImageData(0, 0, canvas.width, canvas.height);
  for (let at = 0; at < data.length; at += 4) if (data[at] > 150 && data[at + 1] < 60) return true;
  return false;
})()"""


@pytest.fixture
def watched(tmp_path: Path) -> Iterator[str]:
    """A running watch with one feed that nobody publishes yet; its web address."""
    requires("chromium", "nginx-rtmp", "ffmpeg")
    port = free_port()
    settings = {
        "members.names": '["marker"]',
        "web.listen": f"127.0.0.1:{port}",
        "web.picture_every_s": "1",
        "evidence.post_roll_s": "1",
        "freshness.max_staleness_s": "120",
    }
    address = f"hall=tcp://127.0.0.1:{free_port()}?listen"
    service = Service(tmp_path / "watch", settings, "watch", address)
    try:
        yield f"http://127.0.0.1:{port}"
        service.signal(signal.SIGTERM)
        assert service.wait() == 0, service.said()
    finally:
        service.end()


def picture(tab: Any, name: str, **options: Any) -> None:
    folder = os.environ.get("UNMASK_SCREENSHOTS")
    if folder:
        tab.wait_for_timeout(500)
        tab.screenshot(path=Path(folder) / f"{name}.png", **options)


def test_a_feed_is_attached_an_incident_opens_is_seen_and_dismissed(watched: str, tmp_path: Path) -> None:
    clip = write_clip(tmp_path / "clip.mp4", 24, PLANTED, bframes=0)
    with running(RtmpServer(tmp_path)) as server, page() as tab:
        assert isinstance(server, RtmpServer)
        _arrive(tab, watched)
        with running(Publisher(clip, server.url())):
            tab.goto(f"{watched}/feeds")
            tab.get_by_label("Address").fill(server.url())
            tab.get_by_label("Id (optional)").fill("studio")
            tab.get_by_label("Labels").fill("region=north")
            tab.get_by_role("button", name="Attach").click()
            tab.wait_for_selector('tr[data-feed="studio"]')
            picture(tab, "feeds")
            tab.get_by_role("link", name="Wall").click()
            tab.wait_for_selector('[data-feed="studio"].bad')
            settled(tab, "document.querySelector('[data-feed=studio] img')?.naturalWidth > 0")
            picture(tab, "wall")
            tab.get_by_role("link", name="Look at the incident").click()
            tab.wait_for_selector("video")
            _plays(tab)
            picture(tab, "incident", full_page=True)
            tab.get_by_role("button", name="Dismiss").click()
            tab.get_by_label("Why (everybody").fill("a rehearsal")
            tab.locator("dialog").get_by_role("button", name="Dismiss").click()
            tab.wait_for_selector("text=retracted: a rehearsal")
            tab.get_by_role("link", name="History").click()
            tab.wait_for_selector("td >> text=retracted")
            picture(tab, "history", full_page=True)
            tab.get_by_role("link", name="Coverage").click()
            tab.wait_for_selector("th >> text=studio")
            tab.get_by_role("link", name="Feeds").click()
            row = tab.locator('tr[data-feed="studio"]')
            row.get_by_role("button", name="Detach").click()
            tab.locator("dialog").get_by_role("button", name="Detach").click()
            tab.wait_for_selector('tr[data-feed="studio"]', state="detached")
    told = httpx.get(f"{watched}/api/incidents", params={"q": "rehearsal"}, timeout=30).json()
    assert told["incidents"][0]["status"] == "retracted"
    assert json.dumps(told).count('"decision": "dismissed"') == 1


def _arrive(tab: Any, url: str) -> None:
    """Wait until the process serves."""
    for _ in range(600):
        try:
            httpx.get(f"{url}/healthz", timeout=5)
            break
        except httpx.HTTPError:
            tab.wait_for_timeout(200)
    tab.goto(url)
    tab.wait_for_selector('[data-feed="hall"]')


def _plays(tab: Any) -> None:
    """The clip stands at the strongest moment, and goes on from there."""
    settled(tab, "document.querySelector('video').readyState >= 2")
    begin = tab.evaluate("document.querySelector('video').currentTime")
    assert 1 < begin < tab.evaluate("document.querySelector('video').duration") - 0.5
    assert tab.evaluate(RED), "the mark is red where the networks were surest"
    tab.get_by_role("button", name="Play the strongest moment").click()
    settled(tab, f"document.querySelector('video').currentTime > {begin + 0.2}")
