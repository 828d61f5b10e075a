"""Callers: who a call is from, what they may do, and how much of it at once. For the event loop's thread alone."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any, Literal

from serve.access.tokens import TokenFile
from serve.errors import CallerLimitError, ForbiddenError, UnauthenticatedError

Scope = Literal["open", "generate", "admin"]

SCHEME = "bearer "
BURST_S = 1.0  # a caller may use up a second's requests at once
IMAGES_RETRY_S = 0.1  # the images of a caller's own calls come back at their own pace
MANY_CALLERS = 10_000
NO_LIMIT = nullcontext()  # one for all: it is entered once for every request


@dataclass
class Caller:
    """One caller and what is used of the limits; 0 is no limit."""

    name: str
    images_limit: int
    requests_per_s: float
    images: int = 0  # in flight
    allowance: float = field(default=0.0, init=False)  # requests that may come at once: a token bucket
    allowance_at: float = field(default=0.0, init=False)

    def __post_init__(self) -> None:
        self.allowance, self.allowance_at = self._burst, time.monotonic()

    @property
    def _burst(self) -> float:
        return max(1.0, self.requests_per_s * BURST_S)

    def count_request(self) -> None:
        """Raises CallerLimitError when the caller has had its requests for now."""
        if not self.requests_per_s:
            return
        self.allowance, self.allowance_at = self._allowance_now(), time.monotonic()
        if self.allowance < 1:
            raise CallerLimitError(
                f"{self.name} is over its {self.requests_per_s:g} requests a second",
                (1 - self.allowance) / self.requests_per_s,
                "requests",
            )
        self.allowance -= 1

    def hold(self, images: int) -> AbstractContextManager[None]:
        """A block in which so many images count as in flight. Entering it raises CallerLimitError when they are too many."""
        return self._holding(images) if self.images_limit else NO_LIMIT

    @contextmanager
    def _holding(self, images: int) -> Iterator[None]:
        if self.images + images > self.images_limit:
            raise CallerLimitError(
                f"{self.name} has {self.images} images in flight and asks for {images}; its limit is {self.images_limit}",
                IMAGES_RETRY_S,
                "images",
            )
        self.images += images
        try:
            yield
        finally:
            self.images -= images

    @property
    def at_rest(self) -> bool:
        """Whether forgetting this caller changes nothing for it."""
        return not self.images and self._allowance_now() == self._burst

    def _allowance_now(self) -> float:
        return min(self._burst, self.allowance + (time.monotonic() - self.allowance_at) * self.requests_per_s)


class Callers:
    """Lets callers in by token, or, without a tokens file, all of them, told apart by address."""

    def __init__(self, tokens: TokenFile | None, images: int, requests_per_s: float, open_admin: bool) -> None:
        """``images`` and ``requests_per_s`` limit each caller; ``open_admin``: without a tokens file, may anyone administer?"""
        self._tokens = tokens
        self._limits = (images, requests_per_s)
        self._open_admin = open_admin
        self._everyone = Caller("a caller", 0, 0.0)
        self._known: dict[str, Caller] = {}
        self._pruned_at = 0.0

    def admit(self, context: Any, scope: Scope) -> Caller:
        """Who is calling. Raises UnauthenticatedError, ForbiddenError or CallerLimitError."""
        caller = self._identify(context, scope)
        caller.count_request()
        return caller

    def _identify(self, context: Any, scope: Scope) -> Caller:
        if scope == "open":
            return self._everyone
        if self._tokens is None:
            if scope == "admin" and not self._open_admin:
                raise ForbiddenError("model control beyond loopback needs --tokens-file and a token with the scope admin")
            if not any(self._limits):
                return self._everyone
            peer: str = context.peer()
            return self._caller(peer.rpartition(":")[0] or peer, *self._limits)
        token = self._tokens.check(_bearer(context))
        if scope not in token.scopes:
            raise ForbiddenError(f"the token {token.name!r} lacks the scope {scope}; it has {', '.join(token.scopes)}")
        images, requests_per_s = self._limits
        images = images if token.images is None else token.images
        requests_per_s = requests_per_s if token.requests_per_s is None else token.requests_per_s
        return self._caller(token.name, images, requests_per_s)

    def _caller(self, name: str, images_limit: int, requests_per_s: float) -> Caller:
        caller = self._known.get(name)
        if caller is None:
            self._forget_idle()
            caller = self._known[name] = Caller(name, images_limit, requests_per_s)
        caller.images_limit, caller.requests_per_s = images_limit, requests_per_s  # the tokens file may have changed
        return caller

    def _forget_idle(self) -> None:
        now = time.monotonic()
        if len(self._known) >= MANY_CALLERS and now - self._pruned_at > BURST_S:
            self._pruned_at = now
            self._known = {name: caller for name, caller in self._known.items() if not caller.at_rest}


def _bearer(context: Any) -> str:
    presented = [value for key, value in context.invocation_metadata() or () if key == "authorization"]
    if not presented:
        raise UnauthenticatedError("a bearer token is needed: authorization: Bearer <token>", "missing")
    if len(presented) > 1 or not isinstance(presented[0], str) or not presented[0].lower().startswith(SCHEME):
        raise UnauthenticatedError("the authorization must be one bearer token: Bearer <token>", "malformed")
    return presented[0][len(SCHEME) :].strip()
