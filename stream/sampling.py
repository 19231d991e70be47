"""Which frames are looked at: a fixed grid in media time (DESIGN 3.3, 3.8)."""

MICRO = 1_000_000


def tick(media_us: int, fps: float) -> int:
    """Return the number of the sampling interval that holds `media_us` (microseconds) at `fps` (Hz, > 0).

    The rate is rounded to a millionth of a hertz, so that the sum is exact in whole numbers: in floating
    point a media time of today (1.7e15 us) times 60 has an ulp above 10 us.
    """
    return media_us * max(1, round(fps * MICRO)) // (MICRO * MICRO)


class Sampler:
    """Takes the first frame of every interval of the grid.

    `last_us`, the media time of the last frame taken (None: none yet), is its whole state: where chunks or
    restarts fall cannot change what is taken, and a new rate holds from the next frame on.
    """

    __slots__ = ("last_us",)

    def __init__(self, last_us: int | None = None) -> None:
        self.last_us = last_us

    def take(self, media_us: int, fps: float) -> bool:
        """Return whether the frame at `media_us` is to be sampled, and remember it if so.

        Media time that steps back (a foreign producer's anchor) takes a frame rather than none until it
        has caught up: silence would be unwatched time.
        """
        if self.last_us is not None and tick(media_us, fps) == tick(self.last_us, fps):
            return False
        self.last_us = media_us
        return True
