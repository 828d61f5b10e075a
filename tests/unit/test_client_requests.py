"""What the two clients make of their arguments: requests without a server, and the digits of an answer."""

from __future__ import annotations

import asyncio
import io
import pickle
from functools import partial
from types import SimpleNamespace
from typing import Any

import grpc
import numpy as np
import pytest
import torch
from PIL import Image

from serve.client import Access, AsyncDigitClient, DigitClient, DigitError, DigitSet
from serve.client.digits import from_response
from serve.client.errors import retry_after_s
from serve.client.streaming import ATTEMPTS, Progress
from serve.client.target import addresses, check_target, is_loopback
from serve.pb.digits.v1 import digits_pb2 as pb


class Recorder:
    """A stub whose methods keep their request."""

    def __init__(self) -> None:
        self.request: Any = None

    def __getattr__(self, name: str) -> Any:
        def method(request: Any, **options: Any) -> pb.GenerateResponse:
            self.request = request
            count = request.count or len(request.latents) // (4 * request.latent_size)
            return pb.GenerateResponse(images=[bytes(count * 784)], count=count, height=28, width=28)

        return method


def asked(**arguments: Any) -> pb.GenerateRequest:
    """The request that ``generate`` makes of its arguments."""
    with DigitClient("localhost:1", wait_for_server=False) as client:
        client._stub = Recorder()
        client.generate(**arguments)
        request: pb.GenerateRequest = client._stub.request
        return request


def test_whole_numbers_of_numpy_and_torch_are_taken_wherever_an_int_is() -> None:
    for kind in (np.uint8, np.int64, np.uint64, torch.tensor, int):
        request = asked(count=kind(3), seed=kind(7), start=kind(5), labels=kind(4), version=kind(1))
        assert (request.count, request.seed, request.start, list(request.labels), request.version) == (3, 7, 5, [4], 1)
    assert asked(seed=np.uint64(2**64 - 1)).seed == 2**64 - 1
    for labels in ([1, 2], np.arange(1, 3), torch.arange(1, 3), range(1, 3), (np.int8(1), torch.tensor(2)), iter([1, 2])):
        assert list(asked(labels=labels).labels) == [1, 2]


@pytest.mark.parametrize(
    ("arguments", "field"),
    [
        ({"labels": [7.9]}, "labels"),
        ({"labels": "7"}, "labels"),
        ({"labels": np.array([7.0])}, "labels"),
        ({"count": 2.0}, "count"),
        ({"seed": "7"}, "seed"),
        ({"start": None}, "start"),
        ({"version": 1.5}, "version"),
        ({"model": b"mlp"}, "model"),
        ({"truncation": "0.5"}, "truncation"),
        ({"truncation": None}, "truncation"),
        ({"latents": [[1.0, 2.0], [3.0]]}, "latents"),
        ({"latents": [["1.0x"]]}, "latents"),
        ({"latents": torch.zeros(2, 100, requires_grad=True)}, "latents"),
    ],
)
def test_what_is_no_number_where_one_is_needed_is_a_type_error_naming_the_field(arguments: dict[str, Any], field: str) -> None:
    with pytest.raises(TypeError, match=field):
        asked(**arguments)


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ({"seed": -1}, "seed must be from 0 to .*got -1"),
        ({"seed": 1 << 64}, "seed"),
        ({"start": -1}, "start"),
        ({"count": -1}, "count"),
        ({"count": 1 << 32}, "count"),
        ({"labels": [3, -1]}, "labels"),
        ({"version": 1 << 63}, "version"),
        ({"model": "\udcff"}, "model"),
        ({"latents": np.zeros(100)}, r"latents must have shape \(n, z\)"),
        ({"latents": np.zeros((0, 100))}, "latents"),
        ({"latents": np.zeros((2, 100)), "count": 2}, "count cannot go with latents"),
        ({"latents": np.zeros((1 << 14, 64), np.float32)}, "latents have 4194304 bytes, over the 4194304 of a request"),
    ],
)
def test_a_value_out_of_bounds_is_named_with_its_field_and_not_sent(arguments: dict[str, Any], named: str) -> None:
    with pytest.raises(DigitError, match=named) as caught:
        asked(**arguments)
    assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT


@pytest.mark.parametrize("truncation", [0.001, -1.0, float("nan"), float("inf")])
def test_latents_that_are_drawn_here_have_a_truncation_as_a_server_takes(truncation: float) -> None:
    with DigitClient("localhost:1") as client, pytest.raises(DigitError, match=r"truncation must be 0\.01 or more"):
        client.latents(1, truncation=truncation)


def test_latents_that_are_drawn_here_end_with_the_last_index() -> None:
    with DigitClient("localhost:1") as client, pytest.raises(DigitError, match=r"start \+ count must be at most 2\^63"):
        client.latents(1, start=2**63 - 1, count=2)


@pytest.mark.parametrize("end", [(7,), 7, (7, 0, 1), "70", (7, 0.5)])
def test_an_end_that_is_no_address_is_named(end: Any) -> None:
    with DigitClient("localhost:1") as client, pytest.raises(TypeError, match=r"end.*must be a"):
        client.interpolate((7, 0), end, 5)


@pytest.mark.parametrize("client", [DigitClient, AsyncDigitClient, partial(DigitSet, seed=7, count=9)])
@pytest.mark.parametrize("timeout_s", [0, -1, float("inf"), float("nan"), 1e12, None, "30"])
def test_a_timeout_that_gives_no_time_or_has_no_end_is_named_at_once(client: Any, timeout_s: Any) -> None:
    """gRPC took those beyond its clock for times that have passed, and a stream had no bound."""
    with pytest.raises((TypeError, DigitError), match="timeout_s must be"):
        client("localhost:1", timeout_s=timeout_s)


def test_a_token_is_one_line() -> None:
    assert Access(token="name.secret\n").metadata == (("authorization", "Bearer name.secret"),)
    assert Access(token=None).metadata == ()  # type: ignore[arg-type]  # of a variable that is not set
    for token in ("tök", "a\nb", "a\x00"):
        for client in (DigitClient, AsyncDigitClient):
            with pytest.raises(DigitError, match="INVALID_ARGUMENT: the token is not one line"):
                client("localhost:1", access=Access(token=token))


def test_a_client_that_is_closed_says_so() -> None:
    client, waits = DigitClient("localhost:1", wait_for_server=False), DigitClient("localhost:1")
    for each in (client, waits):
        each.close()
        for call in (each.generate, lambda each=each: list(each.stream(1)), each.list_models):
            with pytest.raises(DigitError, match="CANCELLED: the client is closed"):
                call()

    async def ask() -> None:
        client = AsyncDigitClient("localhost:1")
        await client.close()
        with pytest.raises(DigitError, match="CANCELLED: the client is closed"):
            await client.generate()
        with pytest.raises(DigitError, match="CANCELLED: the client is closed"):
            await anext(client.stream(1))

    asyncio.run(ask())


def test_latents_travel_with_the_size_of_their_rows() -> None:
    rows = np.arange(8.0).reshape(2, 4)
    request = asked(latents=rows.T)
    assert (request.count, request.latent_size) == (0, 2)
    assert request.latents == rows.T.astype("<f4").tobytes()
    assert asked(latents=[[1.0, 2.0]]).latent_size == 2


async def of_async(method: str, *positional: Any, **arguments: Any) -> Any:
    client = AsyncDigitClient("localhost:1", wait_for_server=False)
    seen: list[Any] = []

    async def ask(name: str, request: Any, read: Any) -> Any:
        seen.append((name, request))

    client._ask = ask  # type: ignore[method-assign]
    await getattr(client, method)(*positional, **arguments)
    await client.close()
    return seen[0]


def test_both_clients_send_the_same_requests() -> None:
    calls: list[tuple[str, tuple[Any, ...], dict[str, Any]]] = [
        ("generate", (3,), {"seed": 7, "labels": [1], "truncation": 0.5, "bulk": True, "as_float": True}),
        ("interpolate", ((7, 0), (7, 1), 5), {"model": "mlp", "version": 1}),
        ("get_model", (), {"model": "mlp"}),
        ("list_models", (), {}),
    ]
    for method, positional, arguments in calls:
        seen: list[Any] = []
        client = DigitClient("localhost:1")
        client._ask = lambda name, request, read, seen=seen: seen.append((name, request))  # type: ignore[misc]
        getattr(client, method)(*positional, **arguments)
        client.close()
        assert seen[0] == asyncio.run(of_async(method, *positional, **arguments))


def digits(count: int = 3, as_float: bool = False) -> Any:
    pixels = np.arange(count * 784, dtype=np.uint8).reshape(count, 28, 28)
    images = (pixels / np.float32(255)).astype("<f4").tobytes() if as_float else pixels.tobytes()
    kind = pb.IMAGE_FORMAT_FLOAT32 if as_float else pb.IMAGE_FORMAT_UINT8
    answer = pb.GenerateResponse(
        images=[images], count=count, height=28, width=28, format=kind, model="mlp", version=1, seed=7, start=5
    )
    return from_response(answer, pb.GenerateRequest(count=count), count)


def test_digits_are_a_sequence_of_arrays_that_may_be_written_to() -> None:
    some = digits()
    assert len(some) == len(list(some)) == 3
    assert (some[1] == some.pixels[1]).all()
    assert some[np.int64(1) :].shape == (2, 28, 28)
    some[0][:] = 0
    some.pixels += 1
    assert (some.pixels[0] == 1).all()
    assert repr(some) == "<Digits: 3 by mlp/1, seed 7 from 5, uint8>"
    assert len(repr(digits(4000))) < 100


@pytest.mark.parametrize("as_float", [False, True])
def test_a_notebook_shows_digits_as_a_picture(as_float: bool) -> None:
    some = digits(5, as_float)
    picture = np.array(Image.open(io.BytesIO(some._repr_png_())))
    assert picture.shape == (56, 84)
    expected = digits(5).pixels
    assert (picture[:28, :28] == expected[0]).all()
    assert (picture[28:, 28:56] == expected[4]).all()


def test_an_error_says_its_text_once_and_survives_a_process_pool() -> None:
    error = DigitError(grpc.StatusCode.RESOURCE_EXHAUSTED, "the queue is\nfull", 0.5)
    again = pickle.loads(pickle.dumps(error))
    assert str(error) == str(again) == "RESOURCE_EXHAUSTED: the queue is full"
    assert (again.code(), again.details(), again.retry_after_s) == (grpc.StatusCode.RESOURCE_EXHAUSTED, "the queue is full", 0.5)


@pytest.mark.parametrize(
    ("target", "named"),
    [
        ("http://localhost:8080", "is a URL; give host:port.* as localhost:8080"),
        ("https://digits.example/v1", "is a URL"),
        ("grpc://localhost:50051", "is a URL"),
        ("localhost", "names no port"),
        ("dns:///digits", "names no port"),
        ("", "names no port"),
        ("localhost:port", "names no port"),
        ("localhost:1,localhost:2", "ipv4:"),
    ],
)
@pytest.mark.parametrize("client", [DigitClient, AsyncDigitClient])
def test_a_target_that_is_none_is_refused_at_once(client: Any, target: str, named: str) -> None:
    with pytest.raises(DigitError, match=named):
        client(target)


@pytest.mark.parametrize("client", [DigitClient, AsyncDigitClient])
def test_a_target_of_a_variable_that_is_not_set_is_named(client: Any) -> None:
    with pytest.raises(TypeError, match="target must be host:port, got None"):
        client(None)


def test_targets_of_grpc_are_taken() -> None:
    for target in (
        "localhost:1",
        "[::1]:1",
        "dns:///a.example:1",
        "dns://8.8.8.8/a.example:1",
        "ipv4:127.0.0.1:1,127.0.0.2:2",
        "ipv6:[::1]:1,[::1]:2",
        "unix:/tmp/socket",
        "unix:///tmp/socket",
        "xds:///digits",
        "a.example:443",
    ):
        check_target(target)
    assert addresses("ipv6:[::1]:1,[::2]:2") == [("::1", 1), ("::2", 2)]
    assert addresses("dns://8.8.8.8/a.example:1") == [("a.example", 1)]
    assert all(map(is_loopback, ("localhost:1", "ipv4:127.0.0.1:1,127.0.0.2:1", "[::1]:1", "unix:/tmp/socket")))
    assert not any(map(is_loopback, ("ipv4:127.0.0.1:1,10.0.0.1:1", "a.example:1", "xds:///digits")))


def chunk(count: int, start: int) -> pb.GenerateResponse:
    images, address = [bytes(count * 784)], {"seed": 0, "start": start, "model": "mlp", "version": 4}
    return pb.GenerateResponse(images=images, count=count, height=28, width=28, **address)


def test_a_stream_asks_for_what_has_not_come_of_the_same_model_and_seed() -> None:
    progress = Progress(pb.GenerateStreamRequest(count=5, start=10, labels=[1, 2]))
    progress.take(
        pb.GenerateResponse(images=[bytes(3 * 784)], count=3, height=28, width=28, seed=0, model="mlp", version=4, start=10)
    )
    rest = progress.rest
    assert rest is not None
    assert (rest.HasField("seed"), rest.seed, rest.start, rest.count, rest.model, rest.version) == (True, 0, 13, 2, "mlp", 4)
    cut = DigitError(grpc.StatusCode.UNAVAILABLE, "the connection is too old")
    for _ in range(ATTEMPTS - 1):
        assert 0 < progress.pause_after(cut, 30) < 1
    with pytest.raises(DigitError):
        progress.pause_after(cut, 30)
    progress.take(
        pb.GenerateResponse(images=[bytes(2 * 784)], count=2, height=28, width=28, seed=0, model="mlp", version=4, start=13)
    )
    assert progress.rest is None
    assert progress.pause_after(DigitError(grpc.StatusCode.RESOURCE_EXHAUSTED, "full", 0.7), 30) == 0.7


def test_a_stream_that_did_not_begin_is_not_tried_again() -> None:
    """gRPC has done that five times."""
    with pytest.raises(DigitError):
        Progress(pb.GenerateStreamRequest(count=5)).pause_after(DigitError(grpc.StatusCode.UNAVAILABLE, "nobody"), 30)
    full = DigitError(grpc.StatusCode.RESOURCE_EXHAUSTED, "full", 0.7)
    assert Progress(pb.GenerateStreamRequest(count=5)).pause_after(full, 30) == 0.7, "gRPC has not tried that again"


def test_retry_after_comes_from_the_servers_trailing_metadata() -> None:
    def said(*pairs: tuple[str, str]) -> Any:
        return SimpleNamespace(trailing_metadata=lambda: pairs)

    assert retry_after_s(said(("other", "x"), ("grpc-retry-pushback-ms", "250"))) == 0.25
    assert retry_after_s(said()) is None
    assert retry_after_s(said(("grpc-retry-pushback-ms", "-1"))) is None, "it says: never"
    assert retry_after_s(said(("grpc-retry-pushback-ms", "9" * 5000))) is None
