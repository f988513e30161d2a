"""The compile cache: entries in a private folder, safe against torn files, other users and many processes at once.

An entry is one file: a line of JSON (format, key, the key's components, length and checksum of each part), then the parts, which
are texts. It is written under a temporary name and renamed, so that a reader sees a whole entry or none. It is read with distrust:
what is not exactly as it was written for this key counts as absent, and a warning says so. Nothing of an entry is ever executed: it
holds graphs, which are verified when they are read.
"""

from __future__ import annotations

import json
import os
import secrets
import stat
import time
import warnings
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

from deltaloom.graph.errors import ConfigError
from deltaloom.passes.cache_key import CacheKey, nearest
from deltaloom.passes.config import CACHE_DEFAULT, CACHE_OFF, CompileConfig

FORMAT = 1
"""Version of the entries; those of a newer one are not read."""
MOST_BYTES = 256 << 20
"""When entries take more than this, the oldest go."""
STALE = 3600.0
"""Seconds after which a temporary file is left over from a writer that was ended."""
HEADER = 1 << 16
"""Most bytes of an entry's first line."""
_TEMPORARY = ".writing-"


class CacheWarning(UserWarning):
    """An entry or folder that cannot be used; the program is compiled instead."""


class _Unusable(Exception):
    """Why an entry counts as absent."""


@dataclass(frozen=True)
class Entry:
    """What is known of an entry without reading its parts."""

    name: str
    components: Mapping[str, str]
    bytes: int
    written: float


def default_folder() -> Path:
    """``$XDG_CACHE_HOME/deltaloom``, otherwise ``~/.cache/deltaloom``."""
    base = os.environ.get("XDG_CACHE_HOME", "")
    return (Path(base) if os.path.isabs(base) else Path("~/.cache").expanduser()) / "deltaloom"


def folder_fault(folder: Path) -> str | None:
    """Why ``folder`` is not private to this user, as a sentence; None if it is, or is not there yet."""
    try:
        found = folder.lstat()
    except FileNotFoundError:
        return None
    except OSError as error:
        return f"the cache folder {folder} cannot be looked at: {error.strerror}"
    mode = stat.S_IMODE(found.st_mode)
    if not stat.S_ISDIR(found.st_mode):
        return f"the cache folder {folder} is not a folder, nor may it be a link to one; give another one (--cache)"
    if found.st_uid != os.geteuid():
        return f"the cache folder {folder} belongs to user {found.st_uid}, and you are {os.geteuid()}; give another one (--cache)"
    if mode & 0o077:
        open_to = f"is open to other users (mode {mode:03o}, expected 700)"
        return f"the cache folder {folder} {open_to}; give one of your own, or run chmod 700 on it"
    return None


def cache_of(config: CompileConfig) -> CompileCache | None:
    """The cache that a configuration asks for; None where it is off, and while graphs are dumped, for which passes have to run.

    ``ConfigError`` for a folder that is not private."""
    if config.cache == CACHE_OFF or config.dump is not None:
        return None
    return CompileCache(default_folder() if config.cache == CACHE_DEFAULT else Path(config.cache).expanduser())


class CompileCache:
    """Entries under their keys in one folder, which is made when the first one is written."""

    def __init__(self, folder: Path, *, instead: str = "compiling") -> None:
        """``ConfigError`` for a folder that other users can get at. ``instead``: what is done where an entry cannot be used."""
        self.folder = folder
        self._instead = instead
        fault = folder_fault(folder)
        if fault is not None:
            raise ConfigError(f"{fault}, or switch the cache off (--no-cache)")

    def read(self, key: CacheKey, kind: str) -> dict[str, str] | None:
        """The parts of an entry by name; None if there is none, with a warning if there is one that cannot be used."""
        path = self._path(key, kind)
        try:
            return _parts(_contents(path), key, kind)
        except FileNotFoundError:
            return None
        except (_Unusable, OSError) as error:
            self._warn(f"the cache entry {path} is not used: {_reason(error)}; {self._instead} instead")
            return None

    def reject(self, key: CacheKey, kind: str, reason: object) -> None:
        """Say that the contents of an entry turned out to be unusable."""
        self._warn(f"the cache entry {self._path(key, kind)} is not used: {reason}; {self._instead} instead")

    def write(self, key: CacheKey, kind: str, parts: Mapping[str, str]) -> bool:
        """Keep ``parts``; False, with a warning, where that cannot be done."""
        temporary = self.folder / f"{_TEMPORARY}{os.getpid()}-{secrets.token_hex(8)}"
        try:
            self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            if (fault := folder_fault(self.folder)) is not None:
                raise _Unusable(fault)
            _create(temporary, _serialised(key, kind, parts))
            os.replace(temporary, self._path(key, kind))
            self._prune()
        except (_Unusable, OSError) as error:
            _remove(temporary)
            self._warn(f"nothing can be kept in the cache {self.folder}: {_reason(error)}; going on without it")
            return False
        return True

    def entries(self, kind: str | None = None) -> Iterator[Entry]:
        """The entries that can be read, by name."""
        for path in sorted(self.folder.glob(f"*.{kind or '*'}")):
            if path.name.startswith("."):
                continue
            try:
                with _open(path) as file:
                    header, status = _header(file.readline(HEADER)), os.fstat(file.fileno())
                yield Entry(path.name, dict(header["components"]), status.st_size, status.st_mtime)
            except (_Unusable, OSError, KeyError, TypeError, ValueError):
                continue

    def explain(self, key: CacheKey, kind: str) -> list[str]:
        """Whether there is an entry, and if not, in what the nearest one of that kind differs; lines to print."""
        lines = [f"key {key.digest}"]
        if self._path(key, kind).exists():
            return [*lines, f"hit: it is in {self.folder}"]
        found = nearest(key, ((entry.name, entry.components) for entry in self.entries(kind)))
        if found is None:
            return [*lines, f"miss: {self.folder} has no entry of that kind"]
        name, changed = found
        return [*lines, f"miss: the nearest entry, {name[:12]}…, differs in", *(f"  {one}" for one in changed)]

    def _path(self, key: CacheKey, kind: str) -> Path:
        return self.folder / f"{key.digest}.{kind}"

    def _prune(self) -> None:
        """Remove what writers left behind that were ended, and the oldest entries beyond ``MOST_BYTES``."""
        now, kept, files = time.time(), 0, []
        for path in self.folder.iterdir():
            try:
                found = path.lstat()
            except FileNotFoundError:
                continue
            if path.name.startswith(_TEMPORARY):
                if now - found.st_mtime > STALE:
                    path.unlink(missing_ok=True)
            elif stat.S_ISREG(found.st_mode):
                files.append((found.st_mtime, found.st_size, path))
        for _, size, path in sorted(files, reverse=True):
            kept += size
            if kept > MOST_BYTES:
                path.unlink(missing_ok=True)

    @staticmethod
    def _warn(message: str) -> None:
        warnings.warn(message, CacheWarning, stacklevel=4)


def _remove(path: Path) -> None:
    with suppress(OSError):
        path.unlink()


def _create(path: Path, content: bytes) -> None:
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o600)
    with os.fdopen(descriptor, "wb") as file:
        file.write(content)


def _open(path: Path) -> Any:
    """The file of an entry, which has to be a regular one that nobody else can write."""
    descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    file = os.fdopen(descriptor, "rb")
    found = os.fstat(descriptor)
    if not stat.S_ISREG(found.st_mode) or found.st_uid != os.geteuid() or found.st_mode & 0o022:
        file.close()
        raise _Unusable("it is not a plain file that only you can write")
    return file


def _contents(path: Path) -> bytes:
    fault = folder_fault(path.parent)
    if fault is not None:
        raise _Unusable(fault)
    with _open(path) as file:
        content: bytes = file.read(MOST_BYTES + 1)
    return content


def _serialised(key: CacheKey, kind: str, parts: Mapping[str, str]) -> bytes:
    texts = {name: text.encode() for name, text in parts.items()}
    header = {
        "format": FORMAT,
        "kind": kind,
        "key": key.digest,
        "components": dict(key.components),
        "parts": [[name, len(text), sha256(text).hexdigest()] for name, text in texts.items()],
    }
    return b"".join([json.dumps(header, sort_keys=True).encode(), b"\n", *texts.values()])


def _header(line: bytes) -> dict[str, Any]:
    if not line.endswith(b"\n"):
        raise _Unusable("it ends within its first line")
    try:
        header = json.loads(line)
        version = header["format"]
    except (ValueError, TypeError, KeyError):
        raise _Unusable("its first line is damaged") from None
    if version != FORMAT:
        raise _Unusable(f"it has format {version!r}, and this deltaloom reads format {FORMAT}")
    found: dict[str, Any] = header
    return found


def _parts(content: bytes, key: CacheKey, kind: str) -> dict[str, str]:
    """The parts, checked against the header; the header, against the key."""
    line, newline, body = content.partition(b"\n")
    header = _header(line + newline)
    if header.get("key") != key.digest or header.get("kind") != kind or header.get("components") != dict(key.components):
        raise _Unusable("it was written for something else")
    parts, start = {}, 0
    try:
        for name, length, checksum in header["parts"]:
            text = body[start : start + length]
            if len(text) != length or sha256(text).hexdigest() != checksum:
                raise _Unusable(f"its part '{name}' is damaged")
            parts[str(name)] = text.decode()
            start += length
    except (KeyError, TypeError, ValueError):
        raise _Unusable("its first line is damaged") from None
    if start != len(body):
        raise _Unusable("it is longer than it should be")
    return parts


def _reason(error: Exception) -> str:
    return str(error.strerror) if isinstance(error, OSError) and error.strerror else str(error)
