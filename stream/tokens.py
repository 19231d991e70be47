"""`unmask tokens`: who may use the web interface."""

from typing import TextIO

from stream.config import Config
from stream.web.access import Role, add_token, read_tokens, remove_token, tokens_path

OK = 0


def add(config: Config, name: str, role: str, out: TextIO) -> int:
    """Make a token and write it to `out`. Raises `UnmaskError` (CONFIG) for a wrong name or role."""
    token = add_token(tokens_path(config), name, Role.of(role))
    out.write(f"{token}\n")
    return OK


def listed(config: Config, out: TextIO) -> int:
    """Write a line per token."""
    for entry in read_tokens(tokens_path(config)):
        out.write(f"{entry.name} {entry.role.word}\n")
    return OK


def remove(config: Config, name: str, out: TextIO) -> int:
    """Take a token away. Raises `UnmaskError` (CONFIG) if nobody has that name."""
    remove_token(tokens_path(config), name)
    out.write(f"{name}: removed\n")
    return OK
