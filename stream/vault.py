"""Enrolled people at rest: each a file that only the key opens, both readable by their owner alone.

Fernet of the package cryptography (AES-128 in CBC mode, HMAC-SHA256). File names are random and names are in
the encrypted part, so that a folder or a backup of it without the key tells neither who nor what.
"""

import json
import secrets
import stat
from base64 import b64decode, b64encode
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from cryptography.fernet import Fernet, InvalidToken
from numpy.typing import NDArray

from stream.config import Config
from stream.durable import sync_folder, write_whole
from stream.errors import Code, UnmaskError

ENDING = ".person"
SCHEMA = 1
DIMENSIONS = 512

OWNER_ONLY, OWNER_FOLDER = 0o600, 0o700
OTHERS = stat.S_IRWXG | stat.S_IRWXO


@dataclass(frozen=True, slots=True)
class Person:
    """An enrolled person: `embeddings` float32 [K, 512] of length 1, `enrolled_us` in UTC microseconds."""

    name: str
    embeddings: NDArray[np.float32]
    enrolled_us: int


class Vault:
    """A folder of enrolled people. Raises `UnmaskError` (CONFIG), in one sentence, for what is wrong with it.

    `key_file` is made at the first `put`. A key or a folder that others may read is refused, as ssh does.
    """

    def __init__(self, folder: Path, key_file: Path) -> None:
        self._folder = folder
        self._key_file = key_file

    @classmethod
    def of(cls, settings: Config) -> "Vault":
        """The vault that the settings name."""
        given = settings.identity.folder
        folder = Path(given or Path(settings.data_dir) / "identity").expanduser()
        key = settings.identity.key_file
        return cls(folder, Path(key).expanduser() if key else folder / "key")

    def people(self) -> list[Person]:
        """Everybody who is enrolled, by name."""
        with _told(self._folder):
            files = sorted(self._folder.glob(f"*{ENDING}"))
            found = [person for _, person in self._opened(files)]
        return sorted(found, key=lambda person: person.name)

    def find(self, name: str) -> Person | None:
        """The person of that name, None if nobody is."""
        return next((person for person in self.people() if person.name == name), None)

    def put(self, person: Person) -> None:
        """Write a person; one of the same name is replaced."""
        with _told(self._folder):
            self._folder.mkdir(mode=OWNER_FOLDER, parents=True, exist_ok=True)
            _refuse_open(self._folder)
            key = self._key() if self._key_file.exists() else self._new_key()
            old = [path for path, other in self._opened(self._files()) if other.name == person.name]
            write_whole(
                self._folder / f"{secrets.token_hex(16)}{ENDING}", Fernet(key).encrypt(_packed(person))
            )
            self._unlink(old)

    def delete(self, name: str) -> bool:
        """Delete a person; return whether there was one. Of the last one the key goes too."""
        with _told(self._folder):
            gone = [path for path, person in self._opened(self._files()) if person.name == name]
            self._unlink(gone)
            if gone and not self._files():
                self._key_file.unlink()
        return bool(gone)

    def _files(self) -> list[Path]:
        return sorted(self._folder.glob(f"*{ENDING}"))

    def _opened(self, files: list[Path]) -> Iterator[tuple[Path, Person]]:
        if not files:
            return
        _refuse_open(self._folder)
        fernet = Fernet(self._key())
        for path in files:
            try:
                yield path, _unpacked(fernet.decrypt(path.read_bytes()))
            except InvalidToken:
                raise UnmaskError(
                    Code.CONFIG,
                    f"{path} was not written with the key in {self._key_file} (identity.key_file), or was "
                    "changed; delete the file, or name the key that it was written with",
                ) from None

    def _key(self) -> bytes:
        _refuse_open(self._key_file)
        key = self._key_file.read_bytes().strip()
        try:
            Fernet(key)
        except ValueError:
            raise UnmaskError(
                Code.CONFIG, f"{self._key_file} (identity.key_file) holds no key of this vault"
            ) from None
        return key

    def _new_key(self) -> bytes:
        if self._files():
            raise UnmaskError(
                Code.CONFIG,
                f"people are enrolled in {self._folder}, but their key {self._key_file} (identity.key_file) "
                "is missing; bring it back, or delete the folder",
            )
        key = Fernet.generate_key()
        self._key_file.parent.mkdir(mode=OWNER_FOLDER, parents=True, exist_ok=True)
        write_whole(self._key_file, key)
        return key

    def _unlink(self, paths: list[Path]) -> None:
        for path in paths:
            path.unlink()
        if paths:
            sync_folder(self._folder)


def _refuse_open(path: Path) -> None:
    mode = stat.S_IMODE(path.stat().st_mode)
    if mode & OTHERS:
        raise UnmaskError(
            Code.CONFIG,
            f"{path} has permissions {mode:o}: others than its owner can open it; "
            f"chmod {mode & ~OTHERS:o} is right",
        )


def _packed(person: Person) -> bytes:
    data = b64encode(np.ascontiguousarray(person.embeddings, np.float32).tobytes()).decode()
    record = {
        "schema": SCHEMA,
        "name": person.name,
        "enrolled_us": person.enrolled_us,
        "embeddings": data,
    }
    return json.dumps(record).encode()


def _unpacked(content: bytes) -> Person:
    record = json.loads(content)
    if record["schema"] != SCHEMA:
        raise UnmaskError(Code.CONFIG, f"a person has schema {record['schema']}, expected {SCHEMA}")
    embeddings = np.frombuffer(b64decode(record["embeddings"]), np.float32).reshape(-1, DIMENSIONS)
    return Person(record["name"], embeddings, record["enrolled_us"])


@contextmanager
def _told(folder: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise UnmaskError(
            Code.CONFIG, f"{error.filename or folder} (identity): {error.strerror or error}"
        ) from None
