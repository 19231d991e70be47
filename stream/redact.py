"""Nothing secret is printed: credentials, tokens and stream keys are taken out of every text.

When in doubt a harmless part is masked too: an address that reads a little poorer costs nothing, a
password in a log cannot be taken back. What stays readable of an address: scheme, host, port, path
(without `name=value` parts and parts that look like a random key), names of query fields.
"""

import logging
import re
from urllib.parse import unquote

MASK = "***"

_SCHEME = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://")
_PLACES = re.compile(
    r"(?P<url>[A-Za-z][A-Za-z0-9+.-]*(?:://|(?i:%(?:25)*3a%(?:25)*2f%(?:25)*2f))\S+)"
    r"|(?P<userinfo>[^\s/:@'\"]+:(?!//)[^\s@]+@(?=[\w\[]))"
    r"|(?P<name>(?i:\b[\w-]{0,40}?(?:authorization|password|passwd|pwd|passphrase|passcode|token|secret"
    r"|credentials?|api[-_]?key|access[-_]?key|secret[-_]?key|stream[-_]?key|signature|streamid|cookie)"
    r"['\"]?\s*[:=]\s*['\"]?))(?i:(?:bearer|basic|digest)\s+)?[^\s'\"]+"
)
"""Where secrets stand: an address, also percent-encoded; `user:password@host` without a scheme;
`name: value` or `name=value` as headers, command lines and environments have them, whatever their prefix."""
_CLOSING = "'\"`>)]},;.:"
"""What a sentence puts behind an address."""
_KEY_LIKE = 16
"""Path parts this long with letters and digits mixed are taken for keys (YouTube's have 24 characters)."""
_FLAGS = frozenset({"listen"})
"""Query words that say how to attach and are no secret."""
_DECODE_ROUNDS = 4
"""Addresses inside addresses are percent-encoded once per nesting; nobody nests deeper."""


def redact(text: str) -> str:
    """Return `text` with every secret that an address or a `name=value` pair in it carries masked."""
    return _PLACES.sub(_mask_place, text)


def _mask_place(match: re.Match[str]) -> str:
    if match["url"]:
        return redact_url(match["url"])
    if match["userinfo"]:
        return f"{MASK}@"
    return f"{match['name']}{MASK}"


def redact_url(url: str) -> str:
    """Return one address without its secrets; what a sentence put behind it stays."""
    bare = url.rstrip(_CLOSING)
    tail = url[len(bare) :]
    bare = _decode_scheme(bare)
    found = _SCHEME.match(bare)
    if found is None:
        return MASK
    scheme, rest = found.group(), bare[found.end() :]
    if scheme == "file://":
        return bare + tail
    userinfo, rest = _split_userinfo(rest)
    path, mark, query = _split_query(rest)
    path = _mask_path(path, scheme.lower().startswith("rtmp") and "listen" in re.split("[&;=?]", query))
    return f"{scheme}{userinfo}{path}{mark}{_mask_query(query)}{tail}"


def _decode_scheme(url: str) -> str:
    """Return `url` percent-decoded until its `://` is plain."""
    for _ in range(_DECODE_ROUNDS):
        if _SCHEME.match(url):
            break
        url = unquote(url)
    return url


def _split_userinfo(rest: str) -> tuple[str, str]:
    """Return the masked userinfo and what follows.

    A password with a raw `/`, `?`, `#` or `@` in it reaches further than the standard says, so everything
    up to the last `@` counts, unless host and path before it are plain (`http://host/@channel`).
    """
    rest = re.sub("(?i)%(?:25)*40", "@", rest)
    place = rest.rfind("@")
    if place < 0:
        return "", rest
    before = rest[:place]
    if before == "" or re.fullmatch(r"[\w.-]+(/[\w.-]*)*/", before):
        return "", rest
    return f"{MASK}@", rest[place + 1 :]


def _split_query(rest: str) -> tuple[str, str, str]:
    found = re.search(r"[?#&;]", rest)
    if found is None:
        return rest, "", ""
    return rest[: found.start()], found.group(), rest[found.end() :]


def _mask_path(path: str, last_is_key: bool) -> str:
    host, *parts = path.split("/")
    masked = [_mask_part(part) for part in parts]
    if last_is_key and len(masked) > 1:
        masked[-1] = MASK
    return "/".join([host, *masked])


def _mask_part(part: str) -> str:
    if "=" in part:
        return f"{part.split('=', 1)[0]}={MASK}"
    word = part.rsplit(".", 1)[0]
    mixed = re.search("[0-9]", word) and re.search("[A-Za-z]", word)
    return MASK if len(word) >= _KEY_LIKE and mixed else part


def _mask_query(query: str) -> str:
    return re.sub(r"[^&;?#]+", lambda match: _mask_field(match.group()), query)


def _mask_field(field: str) -> str:
    name, equals, _ = field.partition("=")
    if name in _FLAGS:
        return field if not equals else name
    return f"{name}={MASK}" if equals else MASK


class RedactingFilter(logging.Filter):
    """Redacts the finished message of every log record, and its traceback."""

    def filter(self, record: logging.LogRecord) -> bool:
        record.msg, record.args = redact(record.getMessage()), None
        if record.exc_info and not record.exc_text:
            record.exc_text = logging.Formatter().formatException(record.exc_info)
        if record.exc_text:
            record.exc_text = redact(record.exc_text)
        if record.stack_info:
            record.stack_info = redact(record.stack_info)
        return True


def install_logging(level: int = logging.INFO) -> None:
    """Send the log of this process to stderr, redacted. Call once, in each process; stdout stays free."""
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s %(message)s"))
    handler.addFilter(RedactingFilter())
    logging.basicConfig(level=level, handlers=[handler], force=True)
