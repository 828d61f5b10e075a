"""The server's command line: reads the settings, runs the server and prints what it serves."""

from __future__ import annotations

import itertools
import logging
import os
import sys
import threading
from collections.abc import Iterator, Mapping, Sequence

from serve.background import DAEMON_THREAD
from serve.batching.instance import INSTANCE_THREAD
from serve.command_line import OutputError, drop_output
from serve.errors import StartError
from serve.observability.logs import configure, last_line
from serve.ports.grpc_port import address
from serve.server import Ports, Server, serve
from serve.settings import Settings, env_name, flag_name, from_arguments

log = logging.getLogger(__name__)

USUAL_TARGETS = ("127.0.0.1:50051", "localhost:50051")  # make generate's own


def main(arguments: Sequence[str] | None = None) -> int:
    """Serve until a signal. Returns the exit status; an error is one line on stderr."""
    given = sys.argv[1:] if arguments is None else arguments
    try:
        if _wants_json(given, os.environ):
            configure("info", "json")  # an unusable setting is said so too
        settings = from_arguments(given, os.environ)
        configure(settings.log_level, settings.log_format)
        serve(settings, lambda server, ports: _announce(server, ports, settings))
        status = 0
    except StartError as error:
        last_line(str(error))
        status = 2
    if any(thread.name.startswith((INSTANCE_THREAD, DAEMON_THREAD)) for thread in threading.enumerate()):
        # A hung run or load cannot be ended, and ending the interpreter under it would abort the process.
        logging.shutdown()
        os._exit(status)
    return status


def _wants_json(arguments: Sequence[str], environment: Mapping[str, str]) -> bool:
    """Whether the log is to be JSON, as far as can be told before the settings are known to be usable."""
    flag = flag_name("log_format")
    given = [value for name, value in itertools.pairwise(arguments) if name == flag]
    given += [each.removeprefix(f"{flag}=") for each in arguments if each.startswith(f"{flag}=")]
    return (given or [environment.get(env_name("log_format"), "")])[-1] == "json"


def _announce(server: Server, ports: Ports, settings: Settings) -> None:
    """What is served and where: for a person on standard output, for machines in the log."""
    for line in _banner(server, ports, settings):
        if settings.log_format == "json":
            log.info(line)
            continue
        try:
            print(line, flush=True)
        except OutputError:  # nobody reads it, or a disk is full: no reason not to serve
            drop_output()


def _banner(server: Server, ports: Ports, settings: Settings) -> Iterator[str]:
    tls, tokens = settings.tls_cert is not None, settings.tokens_file is not None
    target, http = address(settings.host, ports.grpc), address(settings.http_host, ports.http)
    yield f"gRPC  {target}{' with TLS' * tls}{' and bearer tokens' * tokens}"
    yield f"HTTP  http://{http}/metrics /healthz /readyz"
    api = f"http://{http}" if ports.https is None else f"https://{address(settings.http_host, ports.https)}"
    if settings.http_api:
        yield f"API   {api}/v1 /v2"
    if settings.page:
        yield f"page  {api}/"
    for model in server.catalog.models():
        limits = model.batcher.limits
        mark = " (default)" if model.manifest.name == server.catalog.default_model else ""
        yield (
            f"model {model.manifest.name}/{model.manifest.version}{mark} on {model.provider}: "
            f"{limits.instances} instances, batches of up to {limits.max_batch_size}"
        )
    if not server.catalog.names():
        yield f"model none yet: {settings.models_dir} is looked at every {settings.poll_interval_s:g} s"
    needs = " --ca FILE" * tls + " --token-file FILE" * tokens
    make = "make generate" + f" TARGET={target}" * (target not in USUAL_TARGETS) + f' ARGS="{needs.strip()}"' * bool(needs)
    yield f"next  {make}    or: python -m serve.client --target {target}{needs}"
