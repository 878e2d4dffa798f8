"""A cache on the disk that holds JSON only, so that reading one is safe whoever wrote it.

diskcache 5.6.3 unpickles values if the cache's database says so, even with its JSONDisk (CVE-2025-69872). It also reads
and deletes any file that the database names. A cache opened by this module does neither.
"""

from __future__ import annotations

import contextlib
import errno
import os
import re
import sqlite3
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import diskcache
from diskcache.core import DBNAME, DEFAULT_SETTINGS, EVICTION_POLICY, METADATA, MODE_BINARY, MODE_RAW, UNKNOWN

# Names that diskcache gives to the files of large values.
VALUE_FILE = re.compile(r"[0-9a-f]{2}[/\\][0-9a-f]{2}[/\\][0-9a-f]{28}\.val")
SETTINGS = {
    **DEFAULT_SETTINGS,
    "disk_compress_level": 1,
    # Nothing is evicted: results are small, and computing them again is slow.
    "eviction_policy": "none",
    "cull_limit": 0,
}
SQLITE_TROUBLE = {  # words in sqlite's messages
    "full": errno.ENOSPC, "readonly": errno.EACCES, "unable to open": errno.EACCES, "locked": errno.EAGAIN
}  # fmt: skip
WORDS = {"wal", *EVICTION_POLICY}  # values of settings that are no numbers


class UntrustedCacheError(ValueError):
    """A cache folder was written by another program, tampered with, or damaged."""

    def __init__(self, folder: str | Path, found: str):
        super().__init__(
            f"the cache {folder} holds {found}, which this program does not write and does not read (it could run "
            "commands): delete the folder or move it away; results are then computed anew"
        )


class TrustedDisk(diskcache.JSONDisk):
    """diskcache's JSONDisk, which refuses to read anything but JSON."""

    def get(self, key: Any, raw: int) -> Any:
        """Decode a stored key; UntrustedCacheError if it is pickled or no JSON."""
        if not raw:
            raise UntrustedCacheError(self._directory, "a pickled key")
        try:
            return super().get(key, raw)
        except (zlib.error, ValueError, TypeError) as error:
            raise UntrustedCacheError(self._directory, f"a key that is no JSON ({error})") from None

    def store(self, value: Any, read: bool, key: Any = UNKNOWN) -> tuple[int, int, str | None, Any]:
        """Encode a value for the database; TypeError if it is no JSON, or a file (`read`)."""
        if read:
            raise TypeError("the result cache holds JSON values, not files")
        return super().store(value, read, key=key)

    def fetch(self, mode: int, filename: str | None, value: Any, read: bool) -> Any:
        """Decode a stored value; UntrustedCacheError if it is pickled, no JSON, or in a foreign file."""
        if mode not in (MODE_RAW, MODE_BINARY) or read:
            raise UntrustedCacheError(self._directory, "a value that is pickled or otherwise no JSON")
        if mode == MODE_BINARY:
            self._check_file(filename)
        try:
            return super().fetch(mode, filename, value, read)
        except (zlib.error, ValueError, TypeError) as error:
            raise UntrustedCacheError(self._directory, f"a value that is no JSON ({error})") from None

    def remove(self, file_path: str) -> None:
        """Delete the file of a value; UntrustedCacheError, and nothing is deleted, if it is not the cache's."""
        self._check_file(file_path)
        super().remove(file_path)

    def _check_file(self, name: Any) -> None:
        folder = Path(self._directory).resolve()
        expected = isinstance(name, str) and VALUE_FILE.fullmatch(name) is not None
        if not expected or not (folder / name).resolve().is_relative_to(folder):
            raise UntrustedCacheError(self._directory, f"a value that is said to be in the file {str(name)[:80]!r}")


def open_cache(folder: str | Path) -> diskcache.Cache:
    """Open or create a cache of JSON keys and values.

    Nothing is evicted. Several processes may use it at once. A process killed while it writes loses that entry only.
    `incr` and `decr` do not work, as with any JSONDisk.

    Raises:
        UntrustedCacheError: another kind of cache, or one that was tampered with or damaged. Reading an entry later can
            raise it too. For sqlite's errors see `cache_errors`.
        ValueError: the folder's name contains an environment variable, as in "$HOME".
    """
    folder = Path(folder).absolute()  # so that diskcache does not expand a ~
    if os.path.expandvars(folder) != str(folder):
        raise ValueError(f"the cache folder {folder}: diskcache would expand the $ in its name; use another name")
    _check_settings(folder)
    try:
        return diskcache.Cache(str(folder), disk=TrustedDisk, **SETTINGS)
    except sqlite3.DatabaseError as error:
        raise _unreadable(folder, error) from None


@contextlib.contextmanager
def cache_errors(folder: str | Path) -> Iterator[None]:
    """Turn errors of sqlite and diskcache into ones that name the cache and the trouble.

    Raises:
        UntrustedCacheError: the database is damaged.
        OSError: ENOSPC: the disk is full; EACCES: the cache cannot be opened or written; EAGAIN: another process keeps
            it locked.
    """
    try:
        yield
    except diskcache.Timeout:
        raise OSError(errno.EAGAIN, "another process keeps the cache locked", str(folder)) from None
    except sqlite3.DatabaseError as error:
        trouble = _unreadable(Path(folder), error)
        if isinstance(trouble, UntrustedCacheError):
            raise trouble from None
        number = next((number for words, number in SQLITE_TROUBLE.items() if words in str(error)), errno.EIO)
        raise OSError(number, f"the cache cannot be used ({error})", str(folder)) from None


def _unreadable(folder: Path, error: sqlite3.DatabaseError) -> Exception:
    # A lock or a full disk is the machine's trouble, not the cache's.
    if isinstance(error, sqlite3.OperationalError) and "no such" not in str(error):
        return error
    return UntrustedCacheError(folder, f"a database that cannot be read ({error})")


def _check_settings(folder: Path) -> None:
    """Check the settings in a database before diskcache puts them into PRAGMA statements and attributes.

    Raises:
        UntrustedCacheError: a setting that diskcache does not write.
    """
    database = folder / DBNAME
    if not database.exists():
        return
    try:
        connection = sqlite3.connect(database, timeout=60)
        try:
            tables = {name for (name,) in connection.execute("SELECT name FROM sqlite_master WHERE type = 'table'")}
            rows = connection.execute("SELECT key, value FROM Settings").fetchall() if "Settings" in tables else []
        finally:
            connection.close()
    except sqlite3.DatabaseError as error:
        raise _unreadable(folder, error) from None
    for key, value in rows:
        if key not in SETTINGS and key not in METADATA:
            raise UntrustedCacheError(folder, f"the setting {str(key)[:80]!r}")
        if not isinstance(value, (int, float)) and value not in WORDS:
            raise UntrustedCacheError(folder, f"a value of the setting {key!r} that is no number")
