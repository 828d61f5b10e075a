"""A client with a health watch and ten streams that it reads, to be stopped: ``python -m tests.hostile.stopped_client TARGET``.

Stopped amid its reading it leaves the connection full. It says ``ready`` once all of them have come.
"""

from __future__ import annotations

import sys
import threading
from collections import deque
from typing import Any

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

from serve.pb.digits.v1 import digits_pb2 as pb
from serve.pb.digits.v1 import digits_pb2_grpc as pb_grpc

STREAMS = 10


def main() -> None:
    with grpc.insecure_channel(sys.argv[1]) as channel:
        health: Any = health_pb2_grpc.HealthStub(channel)
        calls: list[Any] = [health.Watch(health_pb2.HealthCheckRequest())]
        asked = pb.GenerateStreamRequest(model="mlp", count=1 << 40, seed=1)
        calls += [pb_grpc.DigitGeneratorStub(channel).GenerateStream(asked) for _ in range(STREAMS)]
        for call in calls:
            next(call)
        print("ready", flush=True)
        readers = [threading.Thread(target=deque, args=(call, 0)) for call in calls]
        for reader in readers:
            reader.start()
        for reader in readers:
            reader.join()


if __name__ == "__main__":
    main()
