"""Bearer keys, from the settings and from a file that may change under the running server."""

from __future__ import annotations

import hashlib
import hmac
import logging
from pathlib import Path

from serve_app.errors import AuthenticationFailed
from serve_app.settings import HttpSettings

logger = logging.getLogger(__name__)


class ApiKeys:
    """Who may come in. Keys are held and compared as SHA-256 digests, all of them for every request, so that the time
    taken tells nothing of them.

    The file is read again when it changes. Where it is then missing or malformed no key of it counts: a key that was
    taken out must not live on. So replace it in one step (write another, rename it over).
    """

    def __init__(self, keys: list[str], path: Path | None = None):
        """Raises ValueError if there are no keys at all, and for a blank key or an unusable file."""
        if any(not key.strip() for key in keys):
            raise ValueError("http.api_keys holds a blank key")
        self._digests = [_digest(key.encode()) for key in keys]
        self._path = path
        self._file_digests: list[bytes] = []
        self._seen: tuple[int, ...] | None = None
        if path is not None:
            self._seen = _version(path)
            self._file_digests = _read(path)
        elif not keys:
            raise ValueError("there are no keys")

    @classmethod
    def from_settings(cls, http: HttpSettings) -> ApiKeys | None:
        """None where no keys are configured: the server is open."""
        if not http.api_keys and http.api_keys_file is None:
            return None
        return cls(http.api_keys, http.api_keys_file)

    def check(self, key: str | None) -> None:
        """Raises AuthenticationFailed unless it is one of the keys. ``key`` is as HTTP headers decode: Latin-1."""
        if not key:
            raise AuthenticationFailed("You didn't provide an API key. Send it as `Authorization: Bearer KEY`.")
        self._reread()
        presented = _digest(key.encode("latin-1"))
        known = False
        for digest in self._digests + self._file_digests:
            known |= hmac.compare_digest(digest, presented)
        if not known:
            raise AuthenticationFailed("Incorrect API key provided.")

    def _reread(self) -> None:
        if self._path is None or (version := _version(self._path)) == self._seen:
            return
        self._seen = version
        self._file_digests = []
        try:
            self._file_digests = _read(self._path)
        except ValueError as error:
            logger.error("no key of the file counts until it is mended: %s", error)
        else:
            logger.info("read %d API keys from %s", len(self._file_digests), self._path)


def _digest(key: bytes) -> bytes:
    return hashlib.sha256(key).digest()


def _version(path: Path) -> tuple[int, ...] | None:
    """What changes when the file does: some editors keep the time, renaming changes the inode."""
    try:
        stat = path.stat()
    except OSError:
        return None
    return stat.st_mtime_ns, stat.st_size, stat.st_ino


def _read(path: Path) -> list[bytes]:
    """One key a line; blank lines and lines that begin with # are left out."""
    try:
        lines = path.read_text().splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"http.api_keys_file {path} cannot be read: {error}") from error
    keys = []
    for number, line in enumerate(lines, start=1):
        key = line.strip()
        if not key or key.startswith("#"):
            continue
        if len(key.split()) > 1:
            raise ValueError(
                f"http.api_keys_file {path}, line {number}: keys have no spaces; comments have lines of their own"
            )
        keys.append(_digest(key.encode()))
    if not keys:
        raise ValueError(f"http.api_keys_file {path} holds no key")
    return keys
