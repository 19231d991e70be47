"""Which addresses a webhook may reach: names are resolved once, and what was checked is connected to.

Guards against server-side request forgery: whoever can have a sink's address written, or owns the name
in it, must not reach what only this machine can (its loopback, its network, a cloud's metadata service).
"""

import socket
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from ipaddress import IPv4Address, IPv6Address, ip_address, ip_network

Address = IPv4Address | IPv6Address
Resolver = Callable[[str, int], Sequence[str]]

METADATA = frozenset(map(ip_address, ("169.254.169.254", "fd00:ec2::254", "100.100.100.200")))
"""Where clouds hand out credentials to whoever asks from the machine."""

NAT64 = ip_network("64:ff9b::/96")
"""RFC 6052: an IPv4 address in its last 32 bits."""


class ForbiddenError(Exception):
    """An address must not be reached; the text says why."""


@dataclass(frozen=True, slots=True)
class Guard:
    """`allow_private`: loopback and private networks may be reached too; nothing else that is refused."""

    allow_private: bool
    resolve: Resolver

    def addresses(self, host: str, port: int) -> list[str]:
        """Return the addresses of `host`, all of them allowed; at least one.

        Raises `ForbiddenError` if a single one is not (a name with good and bad addresses is no accident),
        `OSError` if the name has none.
        """
        found = list(dict.fromkeys(self.resolve(host, port)))
        if not found:
            raise OSError(f"{host} has no address")
        for text in found:
            reason = self._refusal(ip_address(text.partition("%")[0]))
            if reason is not None:
                raise ForbiddenError(f"{host} is {text}, {reason}")
        return found

    def _refusal(self, address: Address) -> str | None:
        inner = embedded(address)
        if inner is not None:
            return self._refusal(inner)
        if address in METADATA:
            return "a cloud's metadata service, which no sink may reach"
        if address.is_global and not address.is_multicast and not address.is_reserved:
            return None
        # The unspecified address reaches the loopback; ::1 lies in a reserved range.
        if not address.is_loopback and (
            address.is_link_local or address.is_multicast or address.is_unspecified or address.is_reserved
        ):
            return "which no sink may reach: it is link-local, multicast, reserved or unspecified"
        return None if self.allow_private else "a private address; allow_private: true would allow it"


def embedded(address: Address) -> IPv4Address | None:
    """Return the IPv4 address that an IPv6 one stands for (mapped, 6to4, NAT64, Teredo), else None."""
    if isinstance(address, IPv4Address):
        return None
    if address in NAT64:
        return IPv4Address(int(address) & 0xFFFFFFFF)
    teredo = address.teredo
    return address.ipv4_mapped or address.sixtofour or (teredo[1] if teredo else None)


def system_resolver(host: str, port: int) -> list[str]:
    """Ask the system, as `connect` would."""
    found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    return [str(place[4][0]) for place in found]
