"""The guard lets nothing through that only this machine can reach."""

from ipaddress import IPv4Address, IPv6Address, ip_address

import pytest
from hypothesis import given
from hypothesis import strategies as st

from stream.sinks.addresses import ForbiddenError, Guard

PRIVATE = [
    "127.0.0.1",
    "127.255.0.9",
    "10.0.0.1",
    "172.16.3.4",
    "192.168.1.1",
    "100.64.0.1",
    "198.18.0.1",
    "::1",
    "fc00::1",
    "fd12::1",
]
NEVER = [
    "0.0.0.0",
    "169.254.169.254",
    "169.254.1.1",
    "224.0.0.1",
    "240.0.0.1",
    "255.255.255.255",
    "100.100.100.200",
    "::",
    "fe80::1",
    "fe80::1%eth0",
    "ff02::1",
    "fd00:ec2::254",
    "::7f00:1",
    "::ffff:169.254.169.254",
    "64:ff9b::a9fe:a9fe",
    "2002:a9fe:a9fe::1",
]
PUBLIC = ["93.184.216.34", "8.8.8.8", "2606:4700::1111", "::ffff:8.8.8.8", "64:ff9b::808:808"]


def guard(*addresses: str, allow_private: bool = False) -> Guard:
    return Guard(allow_private, lambda host, port: addresses)


def allowed(address: str, allow_private: bool = False) -> bool:
    try:
        guard(address, allow_private=allow_private).addresses("x.example", 443)
    except ForbiddenError:
        return False
    return True


@pytest.mark.parametrize("address", PUBLIC)
def test_public_addresses_are_allowed(address: str) -> None:
    assert allowed(address)


@pytest.mark.parametrize("address", [*PRIVATE, "::ffff:127.0.0.1", "::ffff:10.0.0.1", "64:ff9b::7f00:1"])
def test_private_addresses_are_allowed_only_where_that_is_set(address: str) -> None:
    assert not allowed(address)
    assert allowed(address, allow_private=True)


@pytest.mark.parametrize("address", NEVER)
def test_some_are_never_allowed(address: str) -> None:
    assert not allowed(address)
    assert not allowed(address, allow_private=True)


def test_one_bad_address_condemns_the_name() -> None:
    with pytest.raises(ForbiddenError, match=r"10\.0\.0\.1"):
        guard("8.8.8.8", "10.0.0.1").addresses("x.example", 443)


def test_a_name_without_addresses_is_an_error() -> None:
    with pytest.raises(OSError, match="no address"):
        guard().addresses("x.example", 443)


@given(st.one_of(st.ip_addresses(v=4), st.ip_addresses(v=6)))
def test_what_is_allowed_is_public(address: IPv4Address | IPv6Address) -> None:
    if allowed(str(address)):
        assert address.is_global or getattr(address, "sixtofour", None) or _mapped(address)
        assert not address.is_multicast
        assert not address.is_loopback


def _mapped(address: IPv4Address | IPv6Address) -> bool:
    return address in _NAT64 or getattr(address, "ipv4_mapped", None) is not None


class _Nat64:
    def __contains__(self, address: object) -> bool:
        return isinstance(address, IPv6Address) and int(address) >> 32 == int(ip_address("64:ff9b::")) >> 32


_NAT64 = _Nat64()


@given(st.ip_addresses(v=4))
def test_an_ipv4_address_is_judged_alike_in_every_guise(address: IPv4Address) -> None:
    plain = allowed(str(address))
    number = int(address)
    for base in (0xFFFF << 32, int(ip_address("64:ff9b::"))):
        assert allowed(str(IPv6Address(base | number))) == plain
    assert allowed(str(IPv6Address((0x2002 << 112) | (number << 80) | 1))) == plain
