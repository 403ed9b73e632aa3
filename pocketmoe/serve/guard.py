"""Who may talk to the server: names under which it is reached, pages that may call it, keys.

A web page that is open in the user's browser can send requests to this machine. By the rules of browsers they carry the
page's origin, and, where an attacker's name was made to point here (DNS rebinding), that name as the host.
"""

from __future__ import annotations

import hashlib
import hmac
import ipaddress
from collections.abc import Sequence
from urllib.parse import urlsplit

from starlette.types import ASGIApp, Receive, Scope, Send

from pocketmoe.serve.api.errors import ApiError, Dialect
from pocketmoe.serve.http import header, send_error

OPEN_PATHS = frozenset({"/", "/health", "/ready"})  # need no key: they tell nothing


def dialect_of(path: str) -> Dialect:
    """In whose words errors of a path are told."""
    return "anthropic" if path.startswith("/v1/messages") else "openai"


def is_loopback(host: str) -> bool:
    """Whether an address can be reached from this machine alone."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


class Guard:
    """Refuses what comes under a foreign name, from a foreign page, or without a key."""

    def __init__(self, app: ASGIApp, names: Sequence[str], origins: Sequence[str], keys: Sequence[str]) -> None:
        """`names`: hosts beside localhost and addresses. `origins`: pages that may call. `keys`: none: not asked."""
        self._app = app
        self._names = {"localhost", *(name.lower() for name in names)}
        self._origins = frozenset(origins)
        self._keys = [_digest(key) for key in keys]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            try:
                self._check(scope)
            except ApiError as error:
                scope["state"]["refused"] = error
                await send_error(send, error, dialect_of(scope["path"]))
                return
        await self._app(scope, receive, send)

    def _check(self, scope: Scope) -> None:
        hosts = [value for key, value in scope["headers"] if key == b"host"]
        if len(hosts) != 1 or not self._is_known(hosts[0].decode("latin-1")):
            raise ApiError(
                403, "this server is not known by that host name (see --allow-host)", code="host_not_allowed"
            )
        origin = header(scope, b"origin")
        if origin is not None and origin not in self._origins and not _same(origin, hosts[0].decode("latin-1")):
            raise ApiError(403, "pages of that origin may not call this server (see --cors)", code="origin_not_allowed")
        if self._keys and scope["path"] not in OPEN_PATHS and not self._has_key(scope):
            raise ApiError(
                401, "give the server's key: Authorization: Bearer KEY, or x-api-key", code="invalid_api_key"
            )

    def _is_known(self, host: str) -> bool:
        """An address cannot be made to point elsewhere, so any is good; a name has to be one of ours."""
        name = host_name(host)
        if name is None:
            return False
        if name in self._names:
            return True
        try:
            ipaddress.ip_address(name)
        except ValueError:
            return False
        return True

    def _has_key(self, scope: Scope) -> bool:
        given = header(scope, b"x-api-key")
        kind, _, token = (header(scope, b"authorization") or "").partition(" ")
        if kind.lower() == "bearer":
            given = token.strip()
        digest = _digest(given or "")
        found = [hmac.compare_digest(digest, key) for key in self._keys]  # all of them, so that none takes less time
        return given is not None and any(found)


def host_name(host: str) -> str | None:
    """The name or address in a Host header, without port and brackets, in small letters; None for what is none."""
    try:
        parts = urlsplit(f"//{host}")
        _ = parts.port  # raises for what is no port
    except ValueError:
        return None
    if parts.netloc != host or "@" in host or not parts.hostname:
        return None
    return parts.hostname.lower().rstrip(".")


def _same(origin: str, host: str) -> bool:
    scheme, _, place = origin.partition("://")
    return scheme in ("http", "https") and place.lower() == host.lower()


def _digest(key: str) -> bytes:
    return hashlib.sha256(key.encode("utf-8", "surrogateescape")).digest()
