"""Answers that no server of ours gives: the clients make DigitErrors of them, in one line."""

from __future__ import annotations

import asyncio
import tracemalloc
from collections.abc import Callable
from typing import Any

import grpc
import pytest

from serve.client import AsyncDigitClient, DigitClient, DigitError, DigitSet
from serve.pb.digits.v1 import digits_pb2 as pb
from tests.fake_generator import blank, generating


def changed(**fields: Any) -> pb.GenerateResponse:
    """An answer of two digits, with these fields otherwise."""
    answer = blank(2)
    for name, value in fields.items():
        if isinstance(value, list):
            answer.ClearField(name)  # type: ignore[arg-type]
            getattr(answer, name).extend(value)
        else:
            setattr(answer, name, value)
    return answer


ODD = {
    "no images": changed(images=[]),
    "no digits": changed(images=[b""], count=0),
    "too few": blank(1),
    "too many": blank(3),
    "fewer pixels": changed(images=[bytes(784)]),
    "more digits than pixels": changed(count=2**32 - 1),
    "no size": changed(height=0),
    "another size": changed(height=2, width=392),
    "floats": changed(format=pb.IMAGE_FORMAT_FLOAT32),
    "half a float": changed(images=[bytes(2 * 784 + 1)], format=pb.IMAGE_FORMAT_FLOAT32),
    "other labels": changed(labels=[1, 2, 3]),
    "a terminal's commands": changed(model="\x1b[2J"),
    "commands as a digest": changed(digest="\x1b[2J"),
}


async def asked_by_asyncio(target: str, ask: Callable[[Any], Any]) -> None:
    async with AsyncDigitClient(target, timeout_s=10) as client:
        await ask(client)


@pytest.mark.parametrize("name", ODD)
def test_an_answer_that_does_not_fit_together_is_an_error(name: str) -> None:
    with generating(
        Generate=lambda request, context: ODD[name],
        Interpolate=lambda request, context: ODD[name],
        GenerateStream=lambda request, context: iter([ODD[name]] * 9),
    ) as target:
        with DigitClient(target, timeout_s=10) as client:
            for ask in (
                lambda client: client.generate(2),
                lambda client: client.generate(latents=[[0.0] * 4] * 2),
                lambda client: client.interpolate((1, 0), (2, 0), 2),
            ):
                with pytest.raises(DigitError, match="INTERNAL: the server's answer cannot be used"):
                    ask(client)
            with pytest.raises(DigitError, match="INTERNAL: the server's answer cannot be used"):
                list(client.stream(2))
        with pytest.raises(DigitError, match="INTERNAL: the server's answer cannot be used"):
            asyncio.run(asked_by_asyncio(target, lambda client: client.generate(2)))


@pytest.mark.parametrize("about", [{"latent_size": 0}, {"latent_size": 2**32 - 1}, {"latent_size": 4, "labels": 2**32 - 1}])
def test_a_model_that_cannot_be_is_an_error_and_nothing_is_drawn_for_it(about: dict[str, int]) -> None:
    with generating(GetModel=lambda request, context: pb.GetModelResponse(**about)) as target:  # type: ignore[arg-type]
        tracemalloc.start()
        try:
            with DigitClient(target, timeout_s=10) as client, pytest.raises(DigitError, match="no model has"):
                client.latents(seed=7)
            with pytest.raises(DigitError, match="no model has"):
                DigitSet(target, seed=7, count=9)
            assert tracemalloc.get_traced_memory()[1] < 32 << 20
        finally:
            tracemalloc.stop()


def sending_away(request: Any, context: grpc.ServicerContext) -> Any:
    yield blank(1)
    context.set_trailing_metadata((("grpc-retry-pushback-ms", "6000"),))
    context.abort(grpc.StatusCode.UNAVAILABLE, "come back in six seconds")


async def all_of(target: str) -> None:
    async with AsyncDigitClient(target, timeout_s=5) as client:
        async for _ in client.stream(3):
            pass


def test_a_stream_waits_no_longer_than_its_timeout_because_a_server_says_so() -> None:
    with generating(GenerateStream=sending_away) as target, DigitClient(target, timeout_s=5) as client:
        with pytest.raises(DigitError, match="UNAVAILABLE: come back in six seconds"):
            list(client.stream(3))
        with pytest.raises(DigitError, match="UNAVAILABLE: come back in six seconds"):
            asyncio.run(asyncio.wait_for(all_of(target), 20))


def test_what_a_server_says_cannot_move_the_terminals_cursor() -> None:
    error = DigitError(grpc.StatusCode.INTERNAL, "\x1b]0;title\x07 of\ttwo\nlines, \u202eré …")
    assert str(error) == "INTERNAL: \\x1b]0;title\\x07 of two lines, \\u202eré …"
