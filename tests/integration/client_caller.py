"""A caller's few lines, for ``mypy --strict`` and old and new libraries. Run by an interpreter of its own; prints what it saw."""

import asyncio
import json
import sys

from serve.client import AsyncDigitClient, DigitClient, DigitError, Digits


def ask(target: str) -> Digits:
    with DigitClient(target) as client:
        try:
            client.generate(count=0)
        except DigitError as error:
            print(error.details(), error.retry_after_s, file=sys.stderr)
        parts: list[Digits] = list(client.stream(300, seed=7))
        assert sum(len(part) for part in parts) == 300
        assert client.latents(7, count=2).shape == (2, client.get_model().latent_size)
        assert client.list_models().default_model
        assert len(client.interpolate((7, 0), (7, 1), steps=4)) == 4
        return client.generate(3, seed=7, labels=[1, 2, 3])


async def ask_async(target: str) -> Digits:
    async with AsyncDigitClient(target) as client:
        async for part in client.stream(300, seed=7):
            assert part.seed == 7
        assert (await client.latents(7, count=2)).shape == (2, (await client.get_model()).latent_size)
        assert (await client.list_models()).default_model
        assert len(await client.interpolate((7, 0), (7, 1), steps=4)) == 4
        return await client.generate(3, seed=7, labels=[1, 2, 3])


def main(target: str) -> None:
    blocking, asynchronous = ask(target), asyncio.run(ask_async(target))
    assert (blocking.pixels == asynchronous.pixels).all()
    ours = sorted(name for name in sys.modules if name.split(".")[0] in ("serve", "train", "export"))
    print(json.dumps({"pixels": blocking.pixels.tolist(), "modules": ours, "png": len(blocking.to_png())}))


main(sys.argv[1])
