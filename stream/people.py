"""Who is who on a feed, where the settings want to know (docs/identity.md); else nothing is kept."""

import logging

from detectors.cues.identity import CLAIM, IDENTITY, Claimed, People
from stream.closer import wanted_cues
from stream.config import Config
from stream.errors import UnmaskError

logger = logging.getLogger(__name__)


def people_of(settings: Config, stream: str) -> People | None:
    """The people of one feed, and who is said to be on it; None unless a cue that is wanted needs them."""
    wanted = wanted_cues(settings)
    if not wanted & {IDENTITY, CLAIM}:
        return None
    return People(_claimed(settings, stream) if CLAIM in wanted else None, drift=IDENTITY in wanted)


def _claimed(settings: Config, stream: str) -> Claimed | None:
    claims = dict(claim.split("=", 1) for claim in settings.identity.claims)
    name = claims.get(stream)
    if name is None:
        return None
    from stream.vault import Vault

    try:
        person = Vault.of(settings).find(name)
    except UnmaskError as error:
        # Watching goes on without: what is asked of a feed must not cost the feed.
        logger.error("%s: who is enrolled cannot be read: %s", stream, error)
        return Claimed(name, None, "who is enrolled cannot be read")
    if person is None:
        logger.error("%s: %r of identity.claims is not enrolled", stream, name)
        return Claimed(name, None, "the person of the claim is not enrolled")
    return Claimed(name, person.embeddings)
