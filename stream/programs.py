"""Which streams of an MPEG-TS belong to which program (ISO/IEC 13818-1, 2.4.4: PAT and PMT).

FFmpeg knows, but PyAV does not tell; stream ids in PyAV are the PIDs listed here.
"""

PACKET = 188
SYNC = 0x47
PAT_PID = 0
TABLE_PAT = 0
TABLE_PMT = 2
SNIFF_BYTES = 2 * 1024 * 1024
"""PAT and PMT come at least every 0.5 s: at 30 Mbit/s within this many bytes."""


def programs(data: bytes) -> dict[int, frozenset[int]]:
    """Return program number -> PIDs of its streams, in the order of the PAT; empty if `data` is no TS.

    `data` may begin and end anywhere. A program whose PMT did not come is left out.
    """
    start = _first_packet(data)
    if start is None:
        return {}
    tables: dict[int, int] = {}
    found: dict[int, frozenset[int]] = {}
    for offset in range(start, len(data) - PACKET + 1, PACKET):
        packet = data[offset : offset + PACKET]
        section = _section(packet)
        if section is None:
            continue
        pid = (packet[1] & 0x1F) << 8 | packet[2]
        if pid == PAT_PID and section[0] == TABLE_PAT:
            tables |= _read_pat(section)
        elif pid in tables.values() and section[0] == TABLE_PMT:
            found.setdefault(section[3] << 8 | section[4], _read_pmt(section))
        if tables and tables.keys() == found.keys():
            break
    return {number: found[number] for number in tables if number in found}


def _first_packet(data: bytes) -> int | None:
    """Return where packets begin: three sync bytes at packet distance."""
    for start in range(min(PACKET, max(0, len(data) - 2 * PACKET))):
        if all(data[start + n * PACKET] == SYNC for n in range(3)):
            return start
    return None


def _section(packet: bytes) -> bytes | None:
    """Return the table section that begins in `packet`, if it lies wholly in it (all but huge PMTs do)."""
    begins, control = packet[1] & 0x40, packet[3] >> 4 & 3
    if packet[0] != SYNC or not begins or not control & 1:
        return None
    offset = 4 + (1 + packet[4] if control & 2 else 0)
    if offset >= PACKET:
        return None
    offset += 1 + packet[offset]
    if offset + 12 > PACKET:
        return None
    length = (packet[offset + 1] & 0x0F) << 8 | packet[offset + 2]
    end = offset + 3 + length
    return packet[offset:end] if end <= PACKET else None


def _read_pat(section: bytes) -> dict[int, int]:
    """Return program number -> PID of its PMT. Number 0 is the network table, no program."""
    pairs = {}
    for at in range(8, len(section) - 4 - 3, 4):
        number = section[at] << 8 | section[at + 1]
        if number:
            pairs[number] = (section[at + 2] & 0x1F) << 8 | section[at + 3]
    return pairs


def _read_pmt(section: bytes) -> frozenset[int]:
    at = 12 + ((section[10] & 0x0F) << 8 | section[11])
    pids = set()
    while at + 5 <= len(section) - 4:
        pids.add((section[at + 1] & 0x1F) << 8 | section[at + 2])
        at += 5 + ((section[at + 3] & 0x0F) << 8 | section[at + 4])
    return frozenset(pids)
