"""Topics with feeds in them, written as detect and ingest write them, on a clock of the test's own."""

import json
from pathlib import Path
from typing import Any

import cv2
import numpy as np

from stream.alerts import Publisher
from stream.clock import FakeClock
from stream.config import Config
from stream.controls import EndReason
from stream.glimpses import glimpse_record, jpeg
from stream.incidents import ClipRequest
from stream.log import TopicPartition, partitions_of
from stream.records import Control, OutRecord, Topic
from stream.scores import ScoreRecord
from stream.sqlite_log import SqliteLog
from stream.topics import topic_name, topic_specs
from stream.web.follow import Follower
from stream.web.view import View
from tests.stream.story import CALIBRATION, PROVENANCE, START_US, Story, tick

MANIPULATED = "M" * 40
"""Twenty seconds of a manipulated face: an incident opens, and its clip comes."""

AUTHENTIC = "a" * 40


class World:
    """An embedded log in `folder` with a story in it, and a view that follows it when told to."""

    def __init__(self, folder: Path, **settings: Any) -> None:
        self.config = Config(data_dir=str(folder), **settings)
        self.clock = FakeClock(START_US)
        self.log = SqliteLog(folder / "log", self.config.log, self.clock)
        self.log.create_topics(topic_specs(self.config))
        self.story = Story(folder / "evidence", self.config, CALIBRATION)
        self.publisher = Publisher(self.config, PROVENANCE, self.clock)
        self.view = View(self.config, self.clock)
        self.follower = Follower(self.config, self.log, self.clock, self.view)

    def list_source(self, stream: str, **entry: Any) -> None:
        entry = {"id": stream, "url": f"tcp://192.0.2.7:9000/{stream}", **entry}
        self.send(
            OutRecord(self.topic(Topic.SOURCES), stream, json.dumps(entry).encode(), {}, self.clock.now_us())
        )

    def unlist(self, stream: str) -> None:
        self.send(OutRecord(self.topic(Topic.SOURCES), stream, None, {}, self.clock.now_us()))

    def tell(self, drawn: str, picture_every: int = 0) -> None:
        """Let the feed `studio` show what is drawn, and time pass; of every so many pictures one is kept."""
        for sign in drawn.replace(" ", ""):
            before = len(self.story.said)
            self.story.tell(sign)
            self.clock.advance(max(0.0, (self.story.teller.media_us - self.clock.now_us()) / 1e6))
            for output in self.story.said[before:]:
                if isinstance(output, ClipRequest):
                    continue
                self.send(self.publisher.record(output))
                if (
                    isinstance(output, ScoreRecord)
                    and picture_every
                    and self.story.teller.pts % picture_every == 0
                ):
                    self.send(self.glimpse(output))

    def end(self) -> None:
        """The feed is taken out by somebody."""
        self._control(Control.END, {"reason": EndReason.STOPPED.value, "code": None, "sentence": None})

    def tick(self) -> None:
        """Ingest says that pictures come."""
        self._control(Control.TICK, tick(True))

    def _control(self, control: Control, body: dict[str, Any]) -> None:
        before = len(self.story.said)
        self.story.apply(self.story.teller.applied(control, body))
        self.send(*(self.publisher.record(output) for output in self.story.said[before:]))  # type: ignore[arg-type]

    def glimpse(self, score: ScoreRecord) -> OutRecord:
        image = np.full((360, 640, 3), 90, np.uint8)
        for face in score.frame.faces:
            x0, y0, x1, y1 = (int(edge) for edge in face.detection.box)
            cv2.rectangle(image, (x0, y0), (x1, y1), (200, 150, 120), -1)
        return glimpse_record(self.topic(Topic.PICTURES), score, jpeg(image), self.clock.now_us())

    def copies(self, count: int, drawn: str) -> list[str]:
        """List more feeds that show the same as the story does from here on; return their ids."""
        names = [f"feed-{number:03d}" for number in range(count)]
        for name in names:
            self.list_source(name)
        before = len(self.story.said)
        self.story.tell(drawn)
        records = [
            self.publisher.record(output) for output in self.story.said[before:] if hasattr(output, "as_json")
        ]
        for name in names:
            self.send(*(renamed(record, name) for record in records))
        return names

    def send(self, *records: OutRecord) -> None:
        with self.log.producer("world") as producer:
            for record in records:
                producer.send(record)
            producer.flush(10)

    def look(self) -> None:
        """Let the view take in what is there."""
        self.follower.look()
        self.follower.add_up()

    def card(self, stream: str = "studio") -> dict[str, Any]:
        found = self.view.card(stream)
        assert found is not None
        return found

    def topic(self, topic: Topic) -> str:
        return topic_name(self.config, topic)

    def places(self, topic: Topic) -> list[TopicPartition]:
        return partitions_of(self.log, self.topic(topic))

    def close(self) -> None:
        self.log.close()


def renamed(record: OutRecord, stream: str) -> OutRecord:
    value = {**json.loads(record.value or b"{}"), "stream": stream}
    return OutRecord(record.topic, stream, json.dumps(value).encode(), record.headers, record.timestamp_us)
