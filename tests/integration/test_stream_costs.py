"""What a stream's single messages cost their caller, and what a client keeps between two parts of a stream."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest

from serve.client import DigitClient
from serve.client.channel import Access
from serve.client.errors import DigitError
from serve.client.streaming import Progress
from serve.pb.digits.v1 import digits_pb2 as pb
from serve.pb.inference import open_inference_pb2 as oip
from serve.pb.inference import open_inference_pb2_grpc as oip_grpc
from tests.server_process import ServerProcess
from tests.waiting import wait_until


def asked(count: int, number: int = 0) -> oip.ModelInferRequest:
    request = oip.ModelInferRequest(model_name="mlp", id=str(number), raw_input_contents=[np.int32(count).tobytes()])
    request.inputs.add(name="count", datatype="INT32", shape=[1])
    return request


def test_each_message_of_a_stream_counts_for_its_caller_as_a_call_does(
    tmp_path: Path, add_token: Callable[..., str], start_server: Callable[..., ServerProcess]
) -> None:
    slow, small = add_token("slow", "--requests-per-s=0.01"), add_token("small", "--images=100")
    server = start_server(f"--tokens-file={tmp_path / 'tokens.json'}", "--instances=1")
    with grpc.insecure_channel(server.target) as channel:

        def answers(token: str, *requests: oip.ModelInferRequest) -> list[str]:
            metadata = Access(token=token).metadata
            stream = oip_grpc.GRPCInferenceServiceStub(channel).ModelStreamInfer(iter(requests), timeout=60, metadata=metadata)
            return [each.error_message for each in stream]

        # The stream itself is a call, and its messages are requests: the bucket holds one.
        said = answers(slow, *(asked(1, number) for number in range(3)))
        assert len(said) == 3
        assert all("slow is over its 0.01 requests a second" in each for each in said)
        refusals = answers(small, asked(101), asked(100), asked(101))
        assert ["limit is 100" in each for each in refusals] == [True, False, True]
        # What they held is given back: all of it can be had at once, by a call.
        stub = oip_grpc.GRPCInferenceServiceStub(channel)
        wait_until(lambda: stub.ModelInfer(asked(100), timeout=60, metadata=Access(token=small).metadata).outputs)


def test_a_client_keeps_of_a_stream_where_it_is_and_no_digits(shared_server: ServerProcess) -> None:
    with DigitClient(shared_server.target) as client:
        earlier: list[Any] = []
        for part in client.stream(600, model="mlp", chunk=200, seed=7):
            assert not any(each() for each in earlier), "a part is gone once the next has come"
            earlier.append(weakref.ref(part))
        assert len(earlier) == 3


def answer(request: pb.GenerateStreamRequest, count: int) -> pb.GenerateResponse:
    return pb.GenerateResponse(
        images=[bytes(784 * count)], model="mlp", version=4, seed=99, start=request.start, count=count, height=28, width=28,
        format=pb.IMAGE_FORMAT_UINT8,
    )  # fmt: skip


def test_what_is_asked_for_next_is_the_rest_of_the_same_stream() -> None:
    request = pb.GenerateStreamRequest(count=500, start=10, chunk=200, labels=[3], truncation=0.5, priority=pb.PRIORITY_BULK)
    progress = Progress(request)
    begun = progress.rest
    assert begun is not None
    assert (begun.count, begun.HasField("seed"), begun.version) == (500, False, 0)
    for count, start, left in ((200, 210, 300), (200, 410, 100)):
        progress.take(answer(begun, count))
        rest = progress.rest
        assert rest == pb.GenerateStreamRequest(
            model="mlp", version=4, seed=99, count=left, start=start, chunk=200, labels=[3], truncation=0.5,
            priority=pb.PRIORITY_BULK,
        )  # fmt: skip
    progress.take(answer(begun, 100))
    assert progress.rest is None


def test_a_chunk_between_two_failures_begins_their_count_anew() -> None:
    gone = DigitError(grpc.StatusCode.UNAVAILABLE, "gone")
    progress = Progress(pb.GenerateStreamRequest(count=500))
    with pytest.raises(DigitError):
        progress.pause_after(gone, 30)  # before the first chunk there is nothing to go on with
    for _ in range(3):
        progress.take(answer(pb.GenerateStreamRequest(), 1))
        first, second = progress.pause_after(gone, 30), progress.pause_after(gone, 30)
        assert 0 < first < second
    with pytest.raises(DigitError):
        progress.pause_after(gone, 30)
