"""The server's command line: settings in, a running server and a few lines on what it serves out."""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Sequence

from serve.batching.slot import SLOT_THREAD
from serve.config.settings import Settings, from_arguments
from serve.errors import StartError
from serve.observability.logs import configure
from serve.runtime.server import Ports, Server, serve


def main(arguments: Sequence[str] | None = None) -> int:
    """Serve until a signal. Returns the exit status; an error is one line on stderr."""
    try:
        settings = from_arguments(sys.argv[1:] if arguments is None else arguments, os.environ)
        configure(settings.log_level, settings.log_format)
        serve(settings, lambda server, ports: _announce(server, ports, settings))
        if any(thread.name.startswith(SLOT_THREAD) for thread in threading.enumerate()):
            # A hung run cannot be ended, and ending the interpreter under it would abort the process.
            sys.stderr.flush()
            os._exit(0)
    except StartError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def _announce(server: Server, ports: Ports, settings: Settings) -> None:
    tls, tokens = settings.tls_cert is not None, settings.tokens_file is not None
    print(f"gRPC  {settings.host}:{ports.grpc}{' with TLS' * tls}{' and bearer tokens' * tokens}")
    print(f"HTTP  http://{settings.http_host}:{ports.http}/metrics /healthz /readyz")
    if settings.page:
        print(f"page  http://{settings.http_host}:{ports.http}/")
    for model in server.catalog.models():
        limits = model.batcher.limits
        mark = " (default)" if model.manifest.name == server.catalog.default_model else ""
        print(
            f"model {model.manifest.name}/{model.manifest.version}{mark} on {model.provider}: "
            f"{limits.slots} instances, batches of up to {limits.max_batch_size}"
        )
    needs = " --ca FILE" * tls + " --token-file FILE" * tokens
    print(f"next  make generate    or: python -m serve.client --target {settings.host}:{ports.grpc}{needs}", flush=True)
