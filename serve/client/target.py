"""Parses a target into addresses, as far as its text contains them. The forms are gRPC's (its ``doc/naming.md``)."""

from __future__ import annotations

import ipaddress
import re

from serve.client.errors import mistake

DEFAULT_TARGET = "localhost:50051"
SCHEMES = ("dns", "ipv4", "ipv6", "unix", "unix-abstract", "xds", "vsock")


def check_target(target: str) -> None:
    """Raises TypeError for what is no text.

    Raises DigitError for texts that gRPC would take for a host name, without an explanation when it is not found.
    """
    if not isinstance(target, str):
        raise TypeError(f"target must be host:port, got {target!r:.64}")
    scheme, colon, _ = target.partition("://")
    if colon and scheme not in SCHEMES:
        shown = addresses(target.partition("://")[2].partition("/")[0])
        instead = f"{shown[0][0]}:{shown[0][1]}" if shown else DEFAULT_TARGET
        raise mistake(f"target {target:.128} is a URL; give host:port of the gRPC port, such as {instead}")
    if _by_address(target) and not addresses(target):
        raise mistake(f"target {target:.128} names no port; give host:port, such as {DEFAULT_TARGET}")
    if "," in target and not target.startswith(("ipv4:", "ipv6:")):
        raise mistake(f"target {target:.128} is a list; gRPC takes one of addresses, as ipv4:10.0.0.1:50051,10.0.0.2:50051")


def addresses(target: str) -> list[tuple[str, int]]:
    """The hosts and ports of a target; none where a resolver of another kind finds them."""
    found = []
    if _by_address(target):
        for each in re.sub(r"^(dns://[^/]*/|(dns|ipv4|ipv6):)", "", target).split(","):
            host, _, port = each.rpartition(":")
            if port.isascii() and port.isdecimal():
                found.append((host.strip("[]") or "localhost", int(port)))
    return found


def is_loopback(target: str) -> bool:
    """Whether it leads to this machine alone."""
    return target.startswith("unix") or (bool(found := addresses(target)) and all(_is_loopback_host(host) for host, _ in found))


def _is_loopback_host(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _by_address(target: str) -> bool:
    scheme, colon, _ = target.partition(":")
    return not (colon and scheme in SCHEMES and scheme not in ("dns", "ipv4", "ipv6"))
