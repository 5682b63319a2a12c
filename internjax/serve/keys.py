"""API keys at rest: a file with a salted hash a key, from which no key can be read back.

One line a key, `NAME SALT HASH` in hexadecimal. A key carries 256 random bits, so that one round
of SHA-256 is enough: what slow hashes protect, guessable passwords, is never stored here.
"""

import hashlib
import hmac
import os
import re
import secrets
from dataclasses import dataclass, field
from pathlib import Path

from internjax.errors import Corrupt, Missing, UserError

PREFIX = "ij-"
_NAME = re.compile(r"[A-Za-z0-9_.-]{1,64}")
_LINE = re.compile(rf"({_NAME.pattern}) ([0-9a-f]{{32}}) ([0-9a-f]{{64}})")


@dataclass(frozen=True)
class StoredKey:
    """A key's name, its salt (16 bytes) and its hash (32 bytes)."""

    name: str
    salt: bytes
    hash: bytes

    def fits(self, key: str) -> bool:
        """Whether this is the key; takes as long for a wrong one as for the right one."""
        return hmac.compare_digest(_hash(self.salt, key), self.hash)

    def line(self) -> str:
        """The key as it stands in the file."""
        return f"{self.name} {self.salt.hex()} {self.hash.hex()}\n"


@dataclass
class Keys:
    """Who may ask: the keys of a file, read again when it changes, and one given in the open.

    Fields:
      file: None without one; single: a key from the configuration, "" without one.
    """

    file: Path | None = None
    single: str = ""
    _stored: tuple[StoredKey, ...] = ()
    _seen: tuple[int, int] | None = field(default=None, repr=False)

    def __post_init__(self):
        if self.file is not None:
            self._refresh()

    @property
    def open(self) -> bool:
        """Whether everybody may ask: there is neither a file nor a key."""
        return self.file is None and not self.single

    def owner(self, key: str) -> str | None:
        """Returns the name of a key's owner, None for a key that is not known.

        Every stored key is compared, so that the time does not tell which one was near.
        """
        self._refresh()
        fitting = [stored.name for stored in self._all() if stored.fits(key)]
        return fitting[0] if fitting else None

    def _all(self) -> tuple[StoredKey, ...]:
        single = (store("default", self.single),) if self.single else ()
        return self._stored + single

    def _refresh(self) -> None:
        """Reads the file when it has changed: a removed key is refused at once."""
        if self.file is None:
            return
        state = self.file.stat() if self.file.is_file() else None
        seen = (state.st_mtime_ns, state.st_size) if state else None
        if seen is None or seen != self._seen:
            self._stored, self._seen = read_keys(self.file), seen


def store(name: str, key: str) -> StoredKey:
    """Returns what is kept of a key."""
    salt = secrets.token_bytes(16)
    return StoredKey(name, salt, _hash(salt, key))


def read_keys(file: Path) -> tuple[StoredKey, ...]:
    """Reads a keys file; empty lines and lines that begin with # are skipped.

    Raises:
      Missing: there is no such file. Corrupt: a line is no key.
    """
    if not file.is_file():
        raise Missing(f"{file}: no such keys file; `internjax keys new NAME file={file}` makes it.")
    keys = []
    try:
        text = file.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise Corrupt(f"{file}: is no text; `internjax keys` makes such files.") from error
    for number, line in enumerate(text.splitlines(), 1):
        if not line or line.startswith("#"):
            continue
        match = _LINE.fullmatch(line)
        if not match:
            raise Corrupt(f"{file}:{number}: not `NAME SALT HASH`; `internjax keys` makes them.")
        keys.append(StoredKey(match[1], bytes.fromhex(match[2]), bytes.fromhex(match[3])))
    return tuple(keys)


def new_key(file: Path, name: str) -> str:
    """Adds a random key to a file, which only its owner may read, and returns the key itself.

    Raises:
      UserError: the name is not legal, or taken.
    """
    if not _NAME.fullmatch(name):
        raise UserError(f"name={name!r}: use 1 to 64 letters, digits, `_`, `.` and `-`.")
    stored = read_keys(file) if file.is_file() else ()
    if name in [key.name for key in stored]:
        raise UserError(f"{file} has a key {name!r}: remove it first, or take another name.")
    key = PREFIX + secrets.token_urlsafe(32)
    _write(file, (*stored, store(name, key)))
    return key


def remove_key(file: Path, name: str) -> None:
    """Takes a key out of a file; running servers refuse it from their next request on.

    Raises:
      UserError: there is no such key.
    """
    stored = read_keys(file)
    rest = tuple(key for key in stored if key.name != name)
    if len(rest) == len(stored):
        names = ", ".join(key.name for key in stored) or "none"
        raise UserError(f"{file} has no key {name!r}; it has {names}.")
    _write(file, rest)


def _write(file: Path, keys: tuple[StoredKey, ...]) -> None:
    """Replaces the file in one step: a server never reads half of it, and nothing is left behind.

    Raises:
      UserError: the disk or its rights say no.
    """
    new = file.with_name(f".{file.name}.{os.getpid()}")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        handle = os.open(new, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
        try:
            with os.fdopen(handle, "w", encoding="utf-8") as out:
                out.writelines(key.line() for key in keys)
            new.replace(file)
        except OSError:
            new.unlink()
            raise
    except OSError as error:
        raise UserError(f"{file}: cannot be written: {error.strerror}.") from error


def _hash(salt: bytes, key: str) -> bytes:
    return hashlib.sha256(salt + key.encode()).digest()
