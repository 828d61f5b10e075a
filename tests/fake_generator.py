"""A ``digits.v1.DigitGenerator`` on a port, made of functions that a test gives: for what a real server does seldom."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import grpc

from serve.pb.digits.v1 import digits_pb2 as pb
from serve.pb.digits.v1 import digits_pb2_grpc as pb_grpc


@contextmanager
def generating(port: int = 0, **methods: Callable[[Any, grpc.ServicerContext], Any]) -> Iterator[str]:
    """Answers these methods; yields the target."""
    servicer = pb_grpc.DigitGeneratorServicer()
    for name, method in methods.items():
        setattr(servicer, name, method)
    server = grpc.server(ThreadPoolExecutor(8))
    pb_grpc.add_DigitGeneratorServicer_to_server(servicer, server)
    bound = server.add_insecure_port(f"127.0.0.1:{port}")
    server.start()
    try:
        yield f"127.0.0.1:{bound}"
    finally:
        server.stop(None).wait()


def blank(count: int = 1, start: int = 0) -> pb.GenerateResponse:
    """An answer of black digits."""
    images, address = [bytes(count * 784)], {"seed": 7, "start": start, "model": "mlp", "version": 1}
    return pb.GenerateResponse(images=images, count=count, height=28, width=28, format=pb.IMAGE_FORMAT_UINT8, **address)
