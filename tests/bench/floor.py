"""The floor: a grpc.aio server that sends a ready-made response and does nothing else, on the same kind of event loop."""

from __future__ import annotations

import sys
from typing import Any

import grpc
import uvloop

from serve.api.digits_v1 import SERVICE


async def run(response_bytes: int) -> None:
    """Answer Generate with so many zero bytes, until killed. Prints its port."""
    server = grpc.aio.server()
    response = bytes(response_bytes)

    async def generate(request: bytes, context: grpc.aio.ServicerContext[Any, Any]) -> bytes:
        return response

    handlers: dict[str, grpc.RpcMethodHandler[Any, Any]] = {"Generate": grpc.unary_unary_rpc_method_handler(generate)}
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(SERVICE, handlers),))
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    print(f"gRPC  127.0.0.1:{port}\nnext", flush=True)
    await server.wait_for_termination()


if __name__ == "__main__":
    uvloop.run(run(int(sys.argv[1])))
