"""``serve.client --again``: the digits of a picture are made again from what it says, and what differs is told."""

from __future__ import annotations

import base64
import io
import json
import shutil
import struct
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, PngImagePlugin

from serve.client import DigitClient
from serve.client.again import make_again
from serve.client.command import main
from serve.pictures import Origin, Way, read_origin, read_pixels, to_png
from tests.integration.test_http_api import get
from tests.server_process import ServerProcess

SEED = 2**64 - 1


@pytest.fixture
def again(shared_server: ServerProcess, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str]]:
    """Runs the command on a picture's bytes; gives the exit status and the last line that it printed."""

    def run(png: bytes | None, *flags: str, target: str = shared_server.target) -> tuple[int, str]:
        path = tmp_path / "picture.png"
        if png is not None:
            path.write_bytes(png)
        capsys.readouterr()
        status = main([f"--target={target}", f"--again={path}", f"--out={tmp_path / 'new.png'}", *flags])
        printed = capsys.readouterr()
        assert printed.err.count("\n") == bool(printed.err)
        return status, (printed.err or printed.out).splitlines()[-1]

    return run


def test_a_picture_of_the_command_is_made_again_byte_for_byte(
    shared_server: ServerProcess, again: Callable[..., tuple[int, str]], tmp_path: Path
) -> None:
    flags = [f"--seed={SEED}", "--start=9", "--count=7", "--digit", "1", "2", "3", "4", "5", "6", "7", "--truncation=0.584"]
    assert main([f"--target={shared_server.target}", *flags, f"--out={tmp_path / 'picture.png'}"]) == 0
    first = (tmp_path / "picture.png").read_bytes()
    assert read_origin(first).labels == (1, 2, 3, 4, 5, 6, 7)
    status, said = again(None)
    assert status == 0
    assert f"7 digits by rpgan/1, seed {SEED}, from 9; by the same model file; the same pixels" in said
    assert (tmp_path / "new.png").read_bytes() == first


def test_a_picture_of_the_clients_is_made_again(shared_server: ServerProcess, again: Callable[..., tuple[int, str]]) -> None:
    """Every PNG says how it was made: one that a program or a notebook makes of an answer too."""
    with DigitClient(shared_server.target) as client:
        latents = client.latents(7)
        asked = [
            client.generate(5, seed=SEED, start=3, truncation=0.584),
            client.generate(4, model="mlp"),
            client.generate(3, seed=1, labels=[1, 2, 3], as_float=True),
            client.interpolate((1, 0), (2, 9), 7, labels=3),
            *list(client.stream(9, seed=7, chunk=4, labels=[3, 1, 4]))[1:],
        ]
        unaddressed = client.generate(latents=latents, labels=1)
    for digits in asked:
        png = digits._repr_png_()
        assert digits.origin is not None
        assert read_origin(png).text() == digits.origin.text()
        status, said = again(png)
        assert (status, "by the same model file; " in said) == (0, True), said
        assert digits.pixels.dtype != np.uint8 or "the same pixels" in said
    assert read_origin(unaddressed.to_png()).seed is None


@pytest.mark.parametrize(
    "path",
    [
        f"/v1/digits?seed={SEED}&start=3&count=4&labels=7,1,0,9&truncation=0.584&format=png",
        "/v1/digits?model=mlp&count=30&format=png",
        "/v1/interpolation?seed=1&to_seed=2&to_start=9&steps=7&format=png",
        "/v1/interpolation?seed=1&to_seed=2&to_start=9&steps=7&labels=1,2,3,4,5,6,7&truncation=0.01&format=png",
    ],
)
def test_a_picture_had_over_http_is_made_again(
    shared_server: ServerProcess, again: Callable[..., tuple[int, str]], path: str
) -> None:
    status, said = again(get(shared_server, path)[2])
    assert (status, "by the same model file; the same pixels" in said) == (0, True), said


@pytest.mark.parametrize("path", ["/v1/digits?seed=8&start=3&count=4", "/v1/interpolation?seed=1&to_seed=2&steps=7&labels=3"])
def test_one_digit_of_many_is_made_again(shared_server: ServerProcess, again: Callable[..., tuple[int, str]], path: str) -> None:
    listed = json.loads(get(shared_server, path)[2])["digits"]
    status, said = again(base64.b64decode(listed[2]["png"]))
    assert status == 0
    assert ": 1 digits by rpgan/1" in said
    assert "the same pixels" in said


def test_some_steps_of_a_way_have_their_own_labels(shared_server: ServerProcess) -> None:
    with DigitClient(shared_server.target) as client:
        whole = client.interpolate((1, 0), (2, 9), 7, labels=[1, 2, 3, 4, 5, 6, 7])
        part = make_again(client, Origin("rpgan", 1, "", 1, 0, 3, (3, 4, 5), 0.0, Way(2, 9, 7, 2)))
    assert np.array_equal(part.pixels, whole.pixels[2:5])
    assert part.labels.tolist() == [3, 4, 5]


def test_another_model_file_is_told_and_what_differs(
    start_server: Callable[..., ServerProcess], again: Callable[..., tuple[int, str]], shared_server: ServerProcess, bundles: Path
) -> None:
    shutil.rmtree(bundles / "rpgan")
    shutil.copytree(bundles / "cdcgan", bundles / "rpgan")
    manifest = bundles / "rpgan" / "1" / "manifest.json"
    manifest.write_text(manifest.read_text().replace('"name": "cdcgan"', '"name": "rpgan"'))
    other = start_server(f"--models-dir={bundles}")
    png = get(shared_server, "/v1/digits?model=rpgan&seed=8&count=4&format=png")[2]
    status, said = again(png, target=other.target)
    assert status == 1
    assert (
        f"by another model file (SHA-256 {read_origin(get(other, '/v1/digits?seed=1&model=rpgan&format=png')[2]).digest[:12]}…"
        in said
    )
    assert f"the picture was made by {read_origin(png).digest[:12]}…); 4 of 4 digits differ, by up to 2" in said


def test_altered_pixels_are_told(shared_server: ServerProcess, again: Callable[..., tuple[int, str]]) -> None:
    png = get(shared_server, "/v1/digits?model=rpgan&seed=8&count=5&format=png")[2]
    pixels = read_pixels(png, 56, 84)
    assert pixels is not None
    altered = pixels.copy()
    altered[40, 40] ^= 0x80
    status, said = again(to_png(altered, read_origin(png)))
    assert (status, "1 of 5 digits differ, by up to 128 grey levels" in said) == (1, True), said
    altered = pixels ^ 1
    altered[28:, 56:] = 0
    assert again(to_png(altered, read_origin(png)))[0] == 0, "rounding, as on another kind of processor"


def test_a_picture_that_another_program_saved_is_made_again_and_not_compared(
    shared_server: ServerProcess, again: Callable[..., tuple[int, str]]
) -> None:
    png = get(shared_server, "/v1/digits?seed=8&count=4&format=png")[2]
    saved, info = io.BytesIO(), PngImagePlugin.PngInfo()
    with Image.open(io.BytesIO(png)) as picture:
        info.add_text("digits", picture.info["digits"])
        picture.resize((200, 200)).save(saved, "PNG", pnginfo=info)
    status, said = again(saved.getvalue())
    assert (status, "saved by another program, its pixels are not compared" in said) == (0, True), said


ORIGIN = Origin("rpgan", 1, "0" * 64, 7, 0, 1, (7,))
DIGIT = np.zeros((28, 28), np.uint8)


@pytest.mark.parametrize(
    ("png", "flags", "text"),
    [
        (b"no picture", (), "picture.png: it is no PNG picture"),
        (to_png(DIGIT), (), "picture.png: it does not say how its digits were made"),
        (to_png(DIGIT, Origin("rpgan", 1, "0" * 64, None, 0, 1)), (), "have no address: they were made of latents"),
        (to_png(DIGIT, Origin("rpgan", 2, "0" * 64, 7, 0, 1)), (), "NOT_FOUND"),
        (to_png(DIGIT, Origin("rpgan", 1, "0" * 64, 7, 0, 2**20)), (), "count must be from 1 to 4096"),
        (to_png(DIGIT, ORIGIN), ("--count=25", "--seed=0"), "error: --seed cannot go with --again"),
        (to_png(DIGIT, ORIGIN), ("--digit", "1"), "error: --digit cannot go with --again"),
    ],
)
def test_what_cannot_be_made_again_is_one_line(
    again: Callable[..., tuple[int, str]], png: bytes, flags: tuple[str, ...], text: str, tmp_path: Path
) -> None:
    status, said = again(png, *flags)
    assert status in (1, 2)
    assert text in said
    assert not (tmp_path / "new.png").exists()


def test_a_picture_that_is_not_there_is_one_line(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert main([f"--again={tmp_path / 'none.png'}"]) == 2
    assert capsys.readouterr().err == f"error: {tmp_path / 'none.png'} cannot be read (No such file or directory)\n"


def chunk(kind: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


def test_packed_pixels_are_unpacked_no_further_than_they_are_wanted() -> None:
    head = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", struct.pack(">II", 28, 28) + bytes([8, 0, 0, 0, 0]))
    assert read_pixels(head + chunk(b"IDAT", zlib.compress(bytes(100 << 20))), 28, 28) is None
    assert read_pixels(head + chunk(b"IDAT", b"none"), 28, 28) is None
    assert read_pixels(head, 28, 28) is None
    assert read_pixels(to_png(DIGIT), 28, 56) is None
    assert read_pixels(to_png(DIGIT), 28, 28) is not None
