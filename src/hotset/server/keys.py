"""API keys: who may ask, how much at once, and which cached prefixes a key can find."""

import contextlib
import hashlib
import hmac
import re
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from hotset.errors import ConfigError
from hotset.fleet.allowance import NO_LIMITS, KeyLimits, KeyShare, Kind
from hotset.foreign_text import ForeignTextError, parse_toml
from hotset.server.errors import ApiError, too_many

ENVIRONMENT = "HOTSET_API_KEYS"
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,63}")
_LEAST_KEY_LENGTH = 16
_LIMITS = ("max_concurrent", "requests_per_minute", "tokens_per_minute")


@dataclass(slots=True)
class Tenant:
    """Who holds a key. The event loop's thread alone uses it.

    Attributes:
        name: for logs, metrics and the folder of its files; empty where there are no keys.
        limits: of the key.
        share: the part of them that may be used here; tokens are charged once a request has ended.
        get_more: of a front: waits for the desk, which may give more; see `ready`.
    """

    name: str = ""
    limits: KeyLimits = NO_LIMITS
    share: KeyShare = field(init=False)
    get_more: Callable[[KeyShare], Awaitable[None]] | None = field(default=None, init=False)

    def __post_init__(self) -> None:
        self.share = KeyShare(self.limits)

    def salt(self, cache_salt: str) -> bytes:
        """Keeps cached prefixes apart: of tenants, and within one tenant by `cache_salt`."""
        own = f"key:{self.name}\0" if self.name else ""
        return (own + cache_salt).encode("utf-8", "surrogatepass")

    async def ready(self) -> None:
        """Before a request that would be refused: have the desk give more, if it may."""
        if self.get_more is not None and self.share.refusal() is not None:
            await self.get_more(self.share)

    @contextlib.contextmanager
    def request(self) -> Iterator[None]:
        """Hold one of the tenant's places. Raises ApiError (429) where a limit is reached."""
        refusal = self.share.refusal()
        if refusal is not None and refusal.kind is Kind.PLACES:
            message = f"this key has {self.limits.max_concurrent} requests open, its limit"
            raise too_many(message, refusal.wait_s)
        if refusal is not None:
            raise too_many(f"this key has used its {refusal.kind} of this minute", refusal.wait_s)
        self.share.open()
        try:
            yield
        finally:
            self.share.close()

    def charge(self, num_tokens: int) -> None:
        """Count the tokens of a request that has ended."""
        self.share.charge(num_tokens)


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

    @property
    def tenants(self) -> list[Tenant]:
        """Who holds a key."""
        return [tenant for _, tenant in self._tenants]

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
        tenant = Tenant(name, KeyLimits(**{limit: table.get(limit) for limit in _LIMITS}))
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
        if any(tenant.name == name for tenant in self.tenants):
            raise ConfigError(f"{where}: there are two keys named {name!r}")
        return name

    def _add_digest(self, digest: bytes, tenant: Tenant) -> None:
        if any(known == digest for known, _ in self._tenants):
            raise ConfigError(f"the API key of {tenant.name!r} is also that of another name")
        self._tenants.append((digest, tenant))
