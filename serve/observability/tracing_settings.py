"""OpenTelemetry's documented variables: which of them turn tracing on, and which values cannot hold here.

What is not named here is read by OpenTelemetry's SDK itself
(https://opentelemetry.io/docs/specs/otel/configuration/sdk-environment-variables).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from urllib.parse import urlsplit

from serve.errors import SettingsError

ENDPOINT_VARIABLE, TRACES_ENDPOINT_VARIABLE = "OTEL_EXPORTER_OTLP_ENDPOINT", "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT"
EXPORTER_VARIABLE, SAMPLER_VARIABLE, RATIO_VARIABLE = "OTEL_TRACES_EXPORTER", "OTEL_TRACES_SAMPLER", "OTEL_TRACES_SAMPLER_ARG"
TURN_ON = (ENDPOINT_VARIABLE, TRACES_ENDPOINT_VARIABLE, EXPORTER_VARIABLE)
DEFAULT_SAMPLER = "parentbased_always_on"
SAMPLERS = ["always_on", "always_off", "traceidratio"]
SAMPLERS += [f"parentbased_{name}" for name in SAMPLERS]
OTLP = ("OTEL_EXPORTER_OTLP_", "OTEL_EXPORTER_OTLP_TRACES_")  # for all signals, and for traces alone


def wanted(environment: Mapping[str, str]) -> bool:
    """Whether calls are to be traced. Raises SettingsError naming a variable whose value cannot hold."""
    given = {name: value.strip() for name, value in environment.items() if name.startswith("OTEL_") and value.strip()}
    _check("OTEL_SDK_DISABLED", given, ("true", "false"))
    _check(EXPORTER_VARIABLE, given, ("otlp", "none"))
    if given.get("OTEL_SDK_DISABLED", "").lower() == "true" or given.get(EXPORTER_VARIABLE) == "none":
        return False
    if not set(TURN_ON) & given.keys():
        return False
    _check(_otlp("PROTOCOL", given), given, ("grpc",), "; name the collector's gRPC port, usually 4317")
    _check_endpoint(_otlp("ENDPOINT", given), given)
    _check_number(_otlp("TIMEOUT", given), given)
    for kind in ("CERTIFICATE", "CLIENT_KEY", "CLIENT_CERTIFICATE"):
        if (name := _otlp(kind, given)) in given and not Path(given[name]).is_file():
            raise SettingsError(f"{name} must be a file, got {given[name]!r}")
    _check(SAMPLER_VARIABLE, given, SAMPLERS)
    if given.get(SAMPLER_VARIABLE, "").endswith("ratio"):
        _check_number(RATIO_VARIABLE, given, most=1)
    for name in ("SCHEDULE_DELAY", "EXPORT_TIMEOUT", "MAX_QUEUE_SIZE", "MAX_EXPORT_BATCH_SIZE"):
        _check_number(f"OTEL_BSP_{name}", given, whole=True)
    propagators = given.get("OTEL_PROPAGATORS", "tracecontext").split(",")
    if "tracecontext" not in map(str.strip, propagators):
        raise SettingsError("OTEL_PROPAGATORS must contain tracecontext: callers' traces are continued by W3C's headers alone")
    if "OTEL_CONFIG_FILE" in given:
        raise SettingsError("OTEL_CONFIG_FILE is not read; say it in the other OTEL_ variables, as docs/serving.md has them")
    return True


def _otlp(kind: str, given: Mapping[str, str]) -> str:
    """The variable that has effect: that for traces, where it is set, and else that for all signals."""
    for_all, for_traces = (f"{prefix}{kind}" for prefix in OTLP)
    return for_traces if for_traces in given else for_all


def _check(name: str, given: Mapping[str, str], known: tuple[str, ...] | list[str], hint: str = "") -> None:
    value = given.get(name, known[0])
    if value not in known and (value.lower() not in known or name != "OTEL_SDK_DISABLED"):
        raise SettingsError(f"{name} must be {' or '.join(known)}, got {value[:64]!r}{hint}")


def _check_endpoint(name: str, given: Mapping[str, str]) -> None:
    """A name and a port alone would be taken for a scheme, and called with TLS."""
    if name not in given:
        return
    try:
        parts = urlsplit(given[name])
        good = parts.scheme in ("http", "https") and parts.hostname and parts.port != 0
    except ValueError:
        good = False
    if not good:
        raise SettingsError(f"{name} must be a URL as http://collector:4317, got {given[name][:64]!r}")


def _check_number(name: str, given: Mapping[str, str], most: float = math.inf, *, whole: bool = False) -> None:
    value = given.get(name, "1")
    try:
        number = int(value) if whole else float(value)
        good = 0 <= number <= most and (number > 0 or most == 1)
    except ValueError:
        good = False
    if not good:
        kind = "from 0 to 1" if most == 1 else "a whole number above 0" if whole else "a number above 0"
        raise SettingsError(f"{name} must be {kind}, got {value[:64]!r}")
