"""The evidence of an incident as one file that can be handed on and checked (DESIGN 3.6).

A ZIP with the clip, the crops, the events, the decisions and the scores; `manifest.json` holds the SHA-256 of
each, `manifest.sig` an Ed25519 signature (RFC 8032) of the manifest by this installation's key. The
signature says that the bundle left here as it is; what the pictures show is another matter.
"""

import hashlib
import json
import os
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import IO, Any

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    PublicFormat,
    load_pem_private_key,
)

from stream.alerts import iso
from stream.evidence import SCHEME, references

SPOOL_BYTES = 4 * 1024 * 1024
"""A bundle up to this size is made in memory, a larger one in a temporary file."""


class Signer:
    """Signs with a key of its own, made at the first use; only its owner can read the file."""

    def __init__(self, path: Path) -> None:
        """Raises `OSError` if the key can neither be read nor made, `ValueError` if the file holds none."""
        try:
            self._key = _load(path)
        except FileNotFoundError:
            self._key = _make(path)

    def sign(self, data: bytes) -> bytes:
        """Return the signature, 64 bytes."""
        return self._key.sign(data)

    @property
    def public(self) -> str:
        """The public key, PEM."""
        return self._key.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo).decode()


def write(
    out: IO[bytes],
    signer: Signer,
    read: Callable[[str], tuple[bytes, str]],
    facts: Mapping[str, Any],
    now_us: int,
) -> None:
    """Write the bundle. `facts` are JSON files by name without suffix; every evidence reference in them is
    looked up by `read` (bytes and suffix), and what is no more there is listed in the manifest under
    `missing`."""
    hashes: dict[str, str] = {}
    missing: list[str] = []
    with zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED) as archive:

        def put(name: str, data: bytes) -> None:
            archive.writestr(name, data)
            hashes[name] = hashlib.sha256(data).hexdigest()

        for name, value in facts.items():
            put(f"{name}.json", json.dumps(value, indent=1, default=str).encode())
        for reference in sorted(references([dict(facts)])):
            try:
                data, suffix = read(reference)
                put(f"evidence/{reference.removeprefix(SCHEME)}{suffix}", data)
            except (FileNotFoundError, ValueError):
                missing.append(reference)
        manifest = {"schema": 1, "made": iso(now_us), "files": hashes, "missing": missing}
        data = json.dumps(manifest, indent=1, sort_keys=True).encode()
        archive.writestr("manifest.json", data)
        archive.writestr("manifest.sig", signer.sign(data))
        archive.writestr("public.pem", signer.public)


def _load(path: Path) -> Ed25519PrivateKey:
    key = load_pem_private_key(path.read_bytes(), None)
    if not isinstance(key, Ed25519PrivateKey):
        raise ValueError(f"{path} holds another key than one of Ed25519")
    return key


def _make(path: Path) -> Ed25519PrivateKey:
    key = Ed25519PrivateKey.generate()
    path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    data = key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
    partial = path.with_name(f"{path.name}.{os.getpid()}")
    with os.fdopen(os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "wb") as file:
        file.write(data)
    try:
        os.link(partial, path)
    except FileExistsError:  # another process was first
        return _load(path)
    finally:
        partial.unlink()
    return key
