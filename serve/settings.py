"""The server's settings: one frozen dataclass. Each field is a flag, an environment variable and a line of help.

``--grpc-port 50051`` and ``DIGITS_GRPC_PORT=50051`` are the same setting; the flag wins.
"""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import ipaddress
import re
import typing
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

from serve.command_line import OneLineParser, release
from serve.errors import SettingsError
from serve.manifest import BUNDLED_DIR

ENV_PREFIX = "DIGITS_"
LOOPBACK_NAMES = ("localhost", "127.0.0.1", "::1")
# As browsers send it: in lower case, without the scheme's own port, without a path.
ORIGIN = re.compile(r"\*|https://[a-z0-9.\[\]:_-]+(?<!:443)|http://[a-z0-9.\[\]:_-]+(?<!:80)", re.ASCII)
UNIX = "unix:"  # how a --host begins that is a Unix socket's path
# What others read, and what Kubernetes sets in every container for a Service called digits or digits-serve.
NO_SETTINGS = re.compile(r"DIGITS_(TOKEN|(\w+_)?SERVICE_(HOST|PORT)(_\w+)?|(\w+_)?PORT(_\w+)?)")

# Settings of earlier versions, and what to do instead.
RETIRED = {"front": "there is one gRPC transport; leave it out (docs/decisions/0014-one-transport.md)"}


def _setting(default: Any, text: str, **metadata: Any) -> Any:
    return field(default=default, metadata={"help": text, **metadata})


DEFAULT_MODEL = "rpgan"


@dataclass(frozen=True, kw_only=True)
class Settings:
    """How to serve. Raises SettingsError, naming the flag, when made with an unusable value."""

    models_dir: Path = _setting(BUNDLED_DIR, "folder of <name>/<version> bundles (default: the bundled models)")
    default_model: str = _setting(
        "",
        f"model that answers requests without a model (default: {DEFAULT_MODEL} if it is there, else the first by name)",
    )
    versions: str = _setting("latest", "versions to serve: latest, latest:N or 1+4; for one model mlp=latest:2; joined by commas")
    serving_file: Path | None = _setting(
        None, "JSON file of the desired state: versions and routes of models (default: serving.json in the models folder)"
    )
    single_model: bool = _setting(False, "the models folder contains the versions of one model, as KServe mounts it")
    wait_for_models: bool = _setting(False, "start also without a usable model, and serve models when they appear in the folder")
    poll_interval_s: float = _setting(
        5.0, "interval between polls of the models folder and of the serving file", low=0.05, high=86400
    )
    host: str = _setting("127.0.0.1", "address the gRPC port listens on")
    grpc_port: int = _setting(50051, "gRPC port; 0 takes a free one", low=0, high=65535)
    tls_cert: Path | None = _setting(None, "PEM file of the certificate chain for gRPC and HTTPS; reloaded when it changes")
    tls_key: Path | None = _setting(None, "PEM file of its private key")
    tls_client_ca: Path | None = _setting(None, "PEM file of the authorities whose client certificates are accepted")
    insecure: bool = _setting(False, "allow plaintext on an address that is not loopback")
    tokens_file: Path | None = _setting(
        None, "file of bearer tokens, as hashes with scopes; reloaded when it changes (serve.access.tokens)"
    )
    caller_images: int = _setting(0, "images that one caller may have in flight; 0: no limit", low=0, high=1 << 24)
    caller_requests_per_s: float = _setting(0.0, "requests a second of one caller; 0: no limit", low=0, high=1e6)
    http_host: str = _setting("127.0.0.1", "address the HTTP and the HTTPS port listen on")
    http_port: int = _setting(
        8080,
        "port of /metrics, /healthz and /readyz, and, without --tls-cert, of the API and the page; 0 takes a free one",
        low=0,
        high=65535,
    )
    https_port: int = _setting(
        8443, "port of the API and the page over TLS, with --tls-cert; 0 takes a free one", low=0, high=65535
    )
    http_names: str = _setting(
        "",
        "names in the Host header that the page and the HTTP API answer to, joined by commas (default: this machine's own on"
        " loopback, else every name)",
    )
    http_origins: str = _setting(
        "",
        "other sites whose pages may call the HTTP API (CORS): origins such as https://app.example.org, joined by commas,"
        " or * for all (default: none)",
    )
    http_api: bool = _setting(True, "answer requests for digits over HTTP: /v1 and the Open Inference Protocol at /v2")
    page: bool = _setting(True, "serve the web page and /openapi.json over HTTP; it needs --http-api")
    provider: str = _setting("auto", "where models run", choices=("auto", "cuda", "cpu"))
    device: int = _setting(0, "number of the CUDA device; for several devices start one process each", low=0, high=255)
    buckets: str = _setting(
        "auto",
        "batch sizes to pad to; auto: on CUDA those of the bundle or some powers of two, on the CPU none; powers: powers of two",
        choices=("auto", "powers"),
    )
    cuda_graphs: str = _setting("auto", "capture each batch size as a CUDA graph; auto: on CUDA", choices=("auto", "on", "off"))
    device_latents: bool = _setting(True, "on CUDA, draw latents on the device if that gives the same bits as on the host")
    cuda_options: str = _setting("", "options of ONNX Runtime's CUDA provider, for example prefer_nhwc=1,use_tf32=0")
    gpu_mem_limit_mib: int = _setting(
        0, "limit in MiB of each instance's memory arena on the GPU; 0: no limit", low=0, high=1 << 20
    )
    instances: int = _setting(0, "concurrent runs of a model; 0: one per usable core on the CPU, two on CUDA", low=0, high=256)
    intra_op_threads: int = _setting(1, "CPU threads of one run", low=1, high=256)
    max_batch_size: int = _setting(0, "most images in one batch; 0: the bundle's own maximum", low=0, high=4096)
    linger_us: int = _setting(
        5000,
        "longest time that a partly filled batch waits for more requests while other batches run",
        low=0,
        high=1_000_000,
    )
    max_queue_images: int = _setting(16384, "most images in the queue, per model and priority", low=1, high=1 << 24)
    max_count: int = _setting(4096, "most images in one answer", low=1, high=1 << 20)
    max_inflight_mib: int = _setting(
        0,
        "memory in MiB that open calls may hold, one caller half of it; 0: a quarter of the container's limit, or of the machine",
        low=0,
        high=1 << 24,
    )
    watchdog_s: float = _setting(
        30.0,
        "longest time of one run of a model; after it the process exits, for its supervisor to start it again",
        low=0.05,
        high=3600,
    )
    self_check_interval_s: float = _setting(
        60.0, "time between two golden checks through the batcher; 0: never", low=0, high=86400
    )
    drain_grace_s: float = _setting(0.0, "on SIGTERM: time between NOT_SERVING and refusing new requests", low=0, high=600)
    drain_deadline_s: float = _setting(20.0, "on SIGTERM: time for accepted requests to finish", low=0, high=3600)
    max_connection_age_s: float = _setting(
        300.0,
        "longest life of a connection; then the client reconnects, so that the load is spread; 0: no limit",
        low=0,
        high=86400,
    )
    load_reports: bool = _setting(
        False, "end each gRPC answer with a load report (ORCA), from which clients learn to send a slow replica fewer calls"
    )
    reflection: bool = _setting(True, "answer gRPC server reflection")
    metrics: bool = _setting(True, "answer /metrics")
    log_format: str = _setting("text", "lines for people, or JSON objects for machines", choices=("text", "json"))
    log_level: str = _setting("info", "least severity that is logged", choices=("debug", "info", "warning", "error"))

    @property
    def max_count_float32(self) -> int:
        """``max_count`` for float images, four times the bytes: the default stays under gRPC's usual limit of 4 MiB."""
        return max(1, self.max_count // 4)

    @property
    def answered_http_names(self) -> set[str] | None:
        """The names that the HTTP port answers to; None for all. On loopback nobody but this machine has any business there."""
        named = {name.strip().lower() for name in self.http_names.split(",") if name.strip()}
        if not named and not is_loopback(self.http_host):
            return None
        return {*named, *LOOPBACK_NAMES, self.http_host.strip("[]").lower()}

    @property
    def https(self) -> bool:
        """Whether the HTTP API is on a port of its own, over TLS."""
        return self.http_api and self.tls_cert is not None

    @property
    def allowed_http_origins(self) -> set[str]:
        """As browsers send them; ``*`` for every one."""
        return {origin.strip().lower() for origin in self.http_origins.split(",") if origin.strip()}

    def __post_init__(self) -> None:
        for spec in dataclasses.fields(self):
            value, meta = getattr(self, spec.name), spec.metadata
            if "choices" in meta and value not in meta["choices"]:
                raise SettingsError(f"{flag_name(spec.name)} must be one of {', '.join(meta['choices'])}, got {value!r}")
            if "low" in meta and not meta["low"] <= value <= meta["high"]:
                raise SettingsError(f"{flag_name(spec.name)} must be from {meta['low']} to {meta['high']}, got {value}")
        parse_cuda_options(self.cuda_options)
        if self.cuda_graphs == "on" and self.provider != "cuda":
            raise SettingsError(f"--cuda-graphs on needs --provider cuda, and it is {self.provider}")
        self._check_ports()
        if self.caller_images and self.caller_images < self.max_count:
            raise SettingsError(
                f"--caller-images {self.caller_images} is under --max-count {self.max_count}: it could never be served"
            )
        if self.max_count > self.max_queue_images:
            raise SettingsError(
                f"--max-count {self.max_count} is over --max-queue-images {self.max_queue_images}: it could never be served"
            )

    def _check_ports(self) -> None:
        """What would be open to more than it should, or to nobody."""
        if (self.tls_cert is None) != (self.tls_key is None):
            raise SettingsError("--tls-cert and --tls-key go together: one of them is missing")
        if self.tls_client_ca is not None and self.tls_cert is None:
            raise SettingsError("--tls-client-ca needs --tls-cert and --tls-key")
        if self.tls_cert is None and not self.insecure and not is_loopback(self.host):
            raise SettingsError(f"--host {self.host} would be served in plaintext: give --tls-cert and --tls-key, or --insecure")
        if self.page and not self.http_api:
            raise SettingsError("--page needs --http-api: give --page false too, or --http-api true")
        if self.http_api and self.tls_cert is None and not self.insecure and not is_loopback(self.http_host):
            raise SettingsError(
                f"--http-host {self.http_host} would serve digits in plaintext: give --tls-cert and --tls-key,"
                " --http-api false --page false, or --insecure"
            )
        if self.https and self.https_port == self.http_port != 0:
            raise SettingsError(
                f"--https-port {self.https_port} is --http-port too, which is plaintext for probes and metrics: name another"
            )
        if self.http_origins and not self.http_api:
            raise SettingsError("--http-origins needs --http-api true: nothing else answers another site's pages")
        for origin in sorted(self.allowed_http_origins):
            if not ORIGIN.fullmatch(origin):
                raise SettingsError(
                    f"--http-origins: {origin[:100]!r} is no origin as browsers send it: https://HOST or http://HOST,"
                    " with :PORT where it is not 443 or 80, and nothing behind"
                )


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach ``host``."""
    try:
        unix = host.startswith(UNIX)
        return unix or host == "localhost" or ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False


# What --cuda-options may set, and to what. Not cuDNN's DEFAULT algorithm: an H100 made a third of the digits by it, for every
# model with convolutions.
CUDA_OPTIONS = {
    "use_tf32": ("0", "1"),
    "prefer_nhwc": ("0", "1"),
    "cudnn_conv_algo_search": ("EXHAUSTIVE", "HEURISTIC"),
    "cudnn_conv_use_max_workspace": ("0", "1"),
    "tunable_op_enable": ("0", "1"),
    "tunable_op_tuning_enable": ("0", "1"),
}


def parse_cuda_options(text: str) -> dict[str, str]:
    """Read ``name=value,name=value``. Raises SettingsError naming the option and what it takes."""
    options = {}
    for entry in filter(None, text.split(",")):
        name, _, value = entry.strip().partition("=")
        if name not in CUDA_OPTIONS:
            raise SettingsError(f"--cuda-options: {name[:64]!r} is unknown; there are {', '.join(CUDA_OPTIONS)}")
        if value not in CUDA_OPTIONS[name]:
            raise SettingsError(f"--cuda-options: {name} must be one of {', '.join(CUDA_OPTIONS[name])}, got {value[:64]!r}")
        options[name] = value
    return options


def flag_name(name: str) -> str:
    return "--" + name.replace("_", "-")


def env_name(name: str) -> str:
    return ENV_PREFIX + name.upper()


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Give ``parser`` one flag per setting."""
    for spec in dataclasses.fields(Settings):
        shown = str(spec.default).lower() if isinstance(spec.default, bool) else spec.default
        default = "" if spec.name == "models_dir" or shown in (None, "") else f" (default: {shown})"
        text = f"{spec.metadata['help']}{default} [{env_name(spec.name)}]"
        options: dict[str, Any] = {"nargs": "?", "const": "true"} if isinstance(spec.default, bool) else {}
        choices = ("true", "false") if isinstance(spec.default, bool) else spec.metadata.get("choices")
        shape = "{" + ",".join(choices) + "}" if choices else "VALUE"
        parser.add_argument(flag_name(spec.name), help=text.replace("%", "%%"), default=None, metavar=shape, **options)
    for name in RETIRED:
        parser.add_argument(flag_name(name), help=argparse.SUPPRESS, default=None)


def resolve(flags: Mapping[str, str | None], environment: Mapping[str, str]) -> Settings:
    """Flags over environment over defaults. Raises SettingsError naming the flag or variable."""
    for name, instead in RETIRED.items():
        if flags.get(name) is not None or env_name(name) in environment:
            source = flag_name(name) if flags.get(name) is not None else env_name(name)
            raise SettingsError(f"{source} is no setting any more: {instead}")
    known = {env_name(spec.name) for spec in dataclasses.fields(Settings)}
    for name in environment:
        if name.startswith(ENV_PREFIX) and name not in known and not NO_SETTINGS.fullmatch(name):
            close = difflib.get_close_matches(name, known, 1)
            raise SettingsError(f"{name} is no setting{f'; is {close[0]} meant?' if close else ''} (see python -m serve --help)")
    hints = typing.get_type_hints(Settings)
    values: dict[str, Any] = {}
    for spec in dataclasses.fields(Settings):
        text, source = flags.get(spec.name), flag_name(spec.name)
        if text is None and env_name(spec.name) in environment:
            text, source = environment[env_name(spec.name)], env_name(spec.name)
        if text is not None:
            values[spec.name] = _parse(text, hints[spec.name], source)
    return Settings(**values)


class _Parser(OneLineParser):
    def error(self, message: str) -> NoReturn:
        raise SettingsError(f"{message} (see {self.prog} --help)")


def from_arguments(arguments: Sequence[str], environment: Mapping[str, str]) -> Settings:
    """Settings from a command line. Raises SettingsError."""
    parser = _Parser(prog="python -m serve", description="Serve digit generators over gRPC.")
    add_flags(parser)
    parser.add_argument("--version", action="version", version=f"digits-serve {release()}")
    return resolve(vars(parser.parse_args(arguments)), environment)


def _parse(text: str, kind: Any, source: str) -> Any:
    if kind is bool:
        if text.lower() not in ("true", "false"):
            raise SettingsError(f"{source} must be true or false, got {text!r}")
        return text.lower() == "true"
    if kind == Path | None:
        return Path(text)
    try:
        return kind(text)
    except ValueError:
        wanted = "a whole number" if kind is int else "a number"
        raise SettingsError(f"{source} must be {wanted}, got {text!r}") from None
