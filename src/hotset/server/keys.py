"""API keys: who may ask, how much at once, and which cached prefixes a key can find."""

import contextlib
import hashlib
import hmac
import re
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from hotset.errors import ConfigError
from hotset.foreign_text import ForeignTextError, parse_toml
from hotset.server.errors import ApiError, too_many

ENVIRONMENT = "HOTSET_API_KEYS"
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,63}")
_LEAST_KEY_LENGTH = 16
_LIMITS = ("max_concurrent", "requests_per_minute", "tokens_per_minute")


class Bucket:
    """A minute's allowance that refills steadily: a token bucket that may be overdrawn."""

    def __init__(self, per_minute: int) -> None:
        self._per_s = per_minute / 60
        self._most = float(per_minute)
        self._left = float(per_minute)
        self._at_s = time.monotonic()

    def wait_s(self) -> float:
        """Seconds until something is left; 0 is now."""
        now_s = time.monotonic()
        self._left = min(self._most, self._left + (now_s - self._at_s) * self._per_s)
        self._at_s = now_s
        return 0.0 if self._left > 0 else (1 - self._left) / self._per_s

    def take(self, amount: float) -> None:
        """Use some of it, more than is left too."""
        self._left -= amount


@dataclass(slots=True)
class Tenant:
    """Who holds a key. The event loop's thread alone uses it.

    Attributes:
        name: for logs, metrics and the folder of its files; empty where there are no keys.
        max_concurrent: most requests at once; None is no limit.
        requests, tokens: allowances; tokens are charged once a request has ended.
    """

    name: str = ""
    max_concurrent: int | None = None
    requests: Bucket | None = None
    tokens: Bucket | None = None
    num_open: int = field(default=0, init=False)

    def salt(self, cache_salt: str) -> bytes:
        """Keeps cached prefixes apart: of tenants, and within one tenant by `cache_salt`."""
        own = f"key:{self.name}\0" if self.name else ""
        return (own + cache_salt).encode("utf-8", "surrogatepass")

    @contextlib.contextmanager
    def request(self) -> Iterator[None]:
        """Hold one of the tenant's places. Raises ApiError (429) where a limit is reached."""
        if self.max_concurrent is not None and self.num_open >= self.max_concurrent:
            raise too_many(f"this key has {self.num_open} requests open, its limit", 1)
        for bucket, what in ((self.requests, "requests"), (self.tokens, "tokens")):
            if bucket is not None and (wait_s := bucket.wait_s()) > 0:
                raise too_many(f"this key has used its {what} of this minute", wait_s)
        if self.requests is not None:
            self.requests.take(1)
        self.num_open += 1
        try:
            yield
        finally:
            self.num_open -= 1

    def charge(self, num_tokens: int) -> None:
        """Count the tokens of a request that has ended."""
        if self.tokens is not None:
            self.tokens.take(num_tokens)


class Keys:
    """The keys a server takes. Only their SHA-256 digests are kept.

    Raises:
        ConfigError: a key or a name that cannot be used.
    """

    def __init__(self) -> None:
        self._tenants: list[tuple[bytes, Tenant]] = []

    def __len__(self) -> int:
        return len(self._tenants)

    def add(self, key: str, tenant: Tenant) -> None:
        """Take `key` for `tenant`."""
        if len(key) < _LEAST_KEY_LENGTH or not key.isascii() or not key.isprintable():
            raise ConfigError(
                f"the API key of {tenant.name!r} cannot be used; expected at least "
                f"{_LEAST_KEY_LENGTH} printable ASCII characters"
            )
        self._add_digest(hashlib.sha256(key.encode()).digest(), tenant)

    def find(self, key: str) -> Tenant:
        """The tenant of a key; takes as long for a wrong key as for a right one.

        Raises:
            ApiError: no tenant has this key (401).
        """
        digest = hashlib.sha256(key.encode("utf-8", "surrogatepass")).digest()
        found: Tenant | None = None
        for known, tenant in self._tenants:
            if hmac.compare_digest(known, digest):
                found = tenant
        if found is None:
            message = (
                "the API key is missing or wrong; send it as 'Authorization: Bearer KEY' or "
                "'x-api-key: KEY'"
            )
            headers = {"WWW-Authenticate": "Bearer"}
            raise ApiError(401, message, code="invalid_api_key", headers=headers)
        return found

    def read_file(self, path: Path) -> None:
        """Take the keys of a TOML file: one table per key, by name.

        [keys.alice]
        key = "..."             # or sha256 = "..." of it, in hex
        max_concurrent = 64     # each limit is optional
        requests_per_minute = 600
        tokens_per_minute = 200000
        """
        try:
            data = parse_toml(path.read_bytes())
        except OSError as error:
            raise ConfigError(f"{path}: {error.strerror}") from error
        except ForeignTextError as error:
            raise ConfigError(f"{path} {error}") from None
        tables = data.get("keys")
        if not isinstance(tables, dict) or not tables or data.keys() != {"keys"}:
            raise ConfigError(f"{path} has no keys; expected tables such as [keys.alice]")
        for name, table in tables.items():
            self._read_table(path, name, table)

    def read_text(self, text: str) -> None:
        """Take keys from an environment variable: `NAME:KEY`, with commas between them."""
        for entry in filter(None, (part.strip() for part in text.split(","))):
            name, colon, key = entry.partition(":")
            if not colon:
                raise ConfigError(f"{ENVIRONMENT} has an entry that is not NAME:KEY")
            self.add(key, Tenant(self._checked_name(name, ENVIRONMENT)))

    def _read_table(self, path: Path, name: str, table: object) -> None:
        self._checked_name(name, str(path))
        where = f"{path}: keys.{name}"
        if not isinstance(table, dict):
            raise ConfigError(f"{where} is not a table")
        if unknown := sorted(table.keys() - {"key", "sha256", *_LIMITS}):
            raise ConfigError(f"{where} has an unknown entry {unknown[0]!r}")
        for limit in _LIMITS:
            value = table.get(limit, 1)
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ConfigError(f"{where}: {limit} is {value!r}; expected a number from 1 on")
        requests, tokens = table.get("requests_per_minute"), table.get("tokens_per_minute")
        tenant = Tenant(
            name,
            table.get("max_concurrent"),
            None if requests is None else Bucket(requests),
            None if tokens is None else Bucket(tokens),
        )
        key, digest = table.get("key"), table.get("sha256")
        if (key is None) == (digest is None) or not isinstance(key or digest, str):
            raise ConfigError(f"{where} needs either a key or its sha256, as a string")
        if key is not None:
            self.add(key, tenant)
            return
        try:
            raw = bytes.fromhex(str(digest))
        except ValueError:
            raw = b""
        if len(raw) != hashlib.sha256().digest_size:
            raise ConfigError(f"{where}: sha256 is not 64 hex digits")
        self._add_digest(raw, tenant)

    def _checked_name(self, name: str, where: str) -> str:
        if not _NAME.fullmatch(name):
            raise ConfigError(
                f"{where}: {name!r} cannot name a key; expected letters, digits, '_', '.' or '-'"
            )
        if any(tenant.name == name for _, tenant in self._tenants):
            raise ConfigError(f"{where}: there are two keys named {name!r}")
        return name

    def _add_digest(self, digest: bytes, tenant: Tenant) -> None:
        if any(known == digest for known, _ in self._tenants):
            raise ConfigError(f"the API key of {tenant.name!r} is also that of another name")
        self._tenants.append((digest, tenant))
