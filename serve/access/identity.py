"""Callers: identity, scopes and limits of whoever makes a call. Safe to call from any thread."""

from __future__ import annotations

import ipaddress
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

import msgspec

from serve.access.tokens import TokenFile
from serve.errors import CallerLimitError, ForbiddenError, UnauthenticatedError

Scope = Literal["open", "generate"]

SCHEME = "bearer "
BURST_S = 1.0  # a caller may use up a second's requests at once
IMAGES_RETRY_S = 0.1  # the images of a caller's own calls come back at their own pace
MANY_CALLERS = 10_000


class Caller(msgspec.Struct, frozen=True, eq=False):
    """Who a call is from, as its transport saw it."""

    peer: Callable[[], str] = str  # as the transport has it, asked when it is needed: grpcio takes its time to tell
    authorization: Sequence[str | bytes] = ()  # the values of every ``authorization`` header
    request_id: str = ""
    trace: Mapping[str, str] = {}  # its trace context; empty without tracing

    @property
    def address(self) -> str:
        """As ``peer_address`` writes it: the same whatever transport the call came by."""
        return peer_address(self.peer())


def peer_address(peer: str) -> str:
    """A peer without its port: ``ipv4:1.2.3.4:5``, ``ipv6:%5B::1%5D:5``, ``1.2.3.4`` or ``::1`` as an IP address alone.

    An IPv4 address in IPv6's clothes is that IPv4 address. What is no IP address, a Unix socket for one, stays as it is.
    """
    kind, _, rest = peer.partition(":")
    if kind in ("ipv4", "ipv6"):
        peer = rest.replace("%5B", "[").replace("%5D", "]").rpartition(":")[0]
    try:
        address = ipaddress.ip_address(peer.strip("[]"))
    except ValueError:
        return peer
    return str(getattr(address, "ipv4_mapped", None) or address)


@dataclass
class Account:
    """One caller's limits and what is used of them; 0 is no limit."""

    name: str
    images_limit: int
    requests_per_s: float
    everyone: bool = False  # all callers, where they are not told apart
    images: int = 0  # in flight
    allowance: float = field(default=0.0, init=False)  # requests that may come at once: a token bucket
    allowance_at: float = field(default=0.0, init=False)
    lock: threading.Lock = field(default_factory=threading.Lock, init=False, repr=False)

    def __post_init__(self) -> None:
        self.allowance, self.allowance_at = self._burst, time.monotonic()

    @property
    def _burst(self) -> float:
        return max(1.0, self.requests_per_s * BURST_S)

    def count_request(self) -> None:
        """Raises CallerLimitError when the caller has had its requests for now."""
        if not self.requests_per_s:
            return
        with self.lock:
            self.allowance, self.allowance_at = self._allowance_now(), time.monotonic()
            if self.allowance < 1:
                raise CallerLimitError(
                    f"{self.name} is over its {self.requests_per_s:g} requests a second",
                    (1 - self.allowance) / self.requests_per_s,
                    "requests",
                    self.requests_per_s,
                )
            self.allowance -= 1

    def take(self, images: int) -> int:
        """Count so many images as in flight; returns how many were counted. Raises CallerLimitError when they are too many."""
        if not self.images_limit:
            return 0
        with self.lock:
            if self.images + images > self.images_limit:
                raise CallerLimitError(
                    f"{self.name} has {self.images} images in flight and asks for {images}; its limit is {self.images_limit}",
                    IMAGES_RETRY_S,
                    "images",
                    self.images_limit,
                )
            self.images += images
            return images

    def give_back(self, images: int) -> None:
        """The images of ``take`` are in flight no longer."""
        with self.lock:
            self.images -= images

    @property
    def at_rest(self) -> bool:
        """Whether forgetting this caller changes nothing for it."""
        return not self.images and self._allowance_now() == self._burst

    def _allowance_now(self) -> float:
        return min(self._burst, self.allowance + (time.monotonic() - self.allowance_at) * self.requests_per_s)


class Accounts:
    """Admits callers by token, or, without a tokens file, all of them, told apart by address."""

    def __init__(self, tokens: TokenFile | None, images: int, requests_per_s: float) -> None:
        """``images`` and ``requests_per_s`` limit each caller."""
        self._tokens = tokens
        self._limits = (images, requests_per_s)
        self._everyone = Account("a caller", 0, 0.0, everyone=True)
        self._known: dict[str, Account] = {}
        self._pruned_at = 0.0
        self._lock = threading.Lock()

    @property
    def by_token(self) -> bool:
        """Whether callers need a token: then what one has been answered is not for others."""
        return self._tokens is not None

    def admit(self, caller: Caller, scope: Scope) -> Account:
        """The account of a caller. Raises UnauthenticatedError, ForbiddenError or CallerLimitError."""
        account = self.identify(caller, scope)
        account.count_request()
        return account

    def identify(self, caller: Caller, scope: Scope) -> Account:
        """The account of a caller, its request not counted. Raises UnauthenticatedError or ForbiddenError."""
        if scope == "open":
            return self._everyone
        if self._tokens is None:
            return self._account(caller.address, *self._limits) if any(self._limits) else self._everyone
        token = self._tokens.check(_bearer(caller))
        if scope not in token.scopes:
            raise ForbiddenError(f"the token {token.name!r} lacks the scope {scope}; it has {', '.join(token.scopes)}")
        images, requests_per_s = self._limits
        images = images if token.images is None else token.images
        requests_per_s = requests_per_s if token.requests_per_s is None else token.requests_per_s
        return self._account(token.name, images, requests_per_s)

    def _account(self, name: str, images_limit: int, requests_per_s: float) -> Account:
        with self._lock:
            account = self._known.get(name)
            if account is None:
                self._forget_idle()
                account = self._known[name] = Account(name, images_limit, requests_per_s)
        account.images_limit, account.requests_per_s = images_limit, requests_per_s  # the tokens file may have changed
        return account

    def _forget_idle(self) -> None:
        now = time.monotonic()
        if len(self._known) >= MANY_CALLERS and now - self._pruned_at > BURST_S:
            self._pruned_at = now
            self._known = {name: account for name, account in self._known.items() if not account.at_rest}


def _bearer(caller: Caller) -> str:
    presented = caller.authorization
    if not presented:
        raise UnauthenticatedError("a bearer token is needed: authorization: Bearer <token>", "missing")
    if len(presented) > 1 or not isinstance(presented[0], str) or not presented[0].lower().startswith(SCHEME):
        raise UnauthenticatedError("the authorization must be one bearer token: Bearer <token>", "malformed")
    return presented[0][len(SCHEME) :].strip()
