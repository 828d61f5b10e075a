"""Digits of a data set are computed anew at random addresses: what was written is confirmed, and what was altered is named."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest

from serve.dataset.command import main
from serve.dataset.header import Dataset, parse_header, read_header
from serve.errors import SettingsError

COUNT = 300
WRITE = ["write", "--provider=cpu", "--seed=18446744073709551615", "--start=77", f"--count={COUNT}", "--shards=3"]
KINDS = {"mlp": ["--model=mlp"], "rpgan": [], "in turn": ["--labels", "3", "1", "4"], "filtered": ["--filter=0.99"]}


@pytest.fixture(scope="module", params=KINDS)
def made(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("made")
    for shard in range(3):
        assert main([*WRITE, *KINDS[request.param], f"--shard={shard}", f"--out={folder}"]) == 0
    return folder


@pytest.fixture
def folder(made: Path, tmp_path: Path) -> Path:
    return shutil.copytree(made, tmp_path / "set")


def verify(folder: Path, sample: int = COUNT, *flags: str) -> int:
    return main(["verify", f"--out={folder}", f"--sample={sample}", "--provider=cpu", *flags])


def test_what_was_written_is_confirmed(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert verify(folder, 70) == 0
    assert capsys.readouterr().out == f"{folder}: 70 of 300 digits computed anew; all have the bytes that were written\n"
    assert verify(folder, 10**9) == 0
    assert "300 of 300 digits" in capsys.readouterr().out


def test_a_digit_that_is_another_is_named_with_its_file(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    part = folder / "part-00001-of-00003.pixels"
    pixels = np.memmap(part, np.uint8, "r+", shape=(100, 28, 28))
    pixels[23, 14] ^= 0x40
    pixels.flush()
    assert verify(folder) == 2
    told = capsys.readouterr().err
    assert told.startswith(f"error: {part}: digit 123 (index ")
    assert "differs by up to 64 grey levels" in told


def test_a_grey_level_is_rounding_as_on_another_processor(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pixels = np.memmap(folder / "part-00002-of-00003.pixels", np.uint8, "r+", shape=(100, 28, 28))
    pixels[5:8, 14, 14] ^= 1
    pixels.flush()
    assert verify(folder) == 0
    assert "297 have the bytes that were written, the others differ by rounding" in capsys.readouterr().out


def test_a_shard_that_is_missing_is_named(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / "part-00002-of-00003.pixels").unlink()
    assert verify(folder) == 2
    assert "part-00002-of-00003.pixels is missing or not whole; write it with --shard 2" in capsys.readouterr().err


def test_a_data_set_of_another_model_file_is_not_compared(
    folder: Path, bundles: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    name = read_header(folder).model
    shutil.rmtree(bundles / name)
    shutil.copytree(bundles / "cdcgan", bundles / name)
    manifest = bundles / name / "1" / "manifest.json"
    manifest.write_text(manifest.read_text().replace('"name": "cdcgan"', f'"name": "{name}"'))
    assert verify(folder, 10, f"--models-dir={bundles}") == 2
    assert "name the --models-dir that has the former" in capsys.readouterr().err


def test_a_header_of_another_shape_is_named(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    header = folder / "dataset.json"
    header.write_text(re.sub('"latent_size": [0-9]+', '"latent_size": 7', header.read_text()))
    assert verify(folder) == 2
    assert f"{header} does not say what" in capsys.readouterr().err


def test_an_index_that_cannot_stand_in_its_place_is_named(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = folder / "part-00000-of-00003.indices"
    if not path.exists():
        return  # of a filtered data set alone
    indices = np.memmap(path, "<i8", "r+")
    for odd in (indices[4] + 1, -1, -(2**63), 2**63 - 1):
        indices[4] = odd
        indices.flush()
        assert verify(folder) == 2
        assert f"{path} is damaged: index {odd} cannot stand in place 4" in capsys.readouterr().err
        for kind in ("idx", "npz"):
            assert main(["join", f"--out={folder}", f"--format={kind}"]) == 2
            assert f"{path} is damaged: index {odd} cannot stand in place 4" in capsys.readouterr().err


def test_a_header_cannot_send_commands_to_a_terminal() -> None:
    fields = {
        "model": "mlp", "version": 1, "digest": "0" * 64, "seed": 0, "start": 0, "count": 9, "shards": 1, "height": 28,
        "width": 28, "latent_size": 8, "classes": 0, "judge": "",
    }  # fmt: skip
    assert parse_header(json.dumps(fields).encode(), "here").model == "mlp"
    for name in ("model", "digest", "judge"):
        with pytest.raises(SettingsError, match="here is no data set's header"):
            parse_header(json.dumps(fields | {name: "\x1b[2J"}).encode(), "here")


def test_every_place_is_in_the_shard_that_holds_it() -> None:
    for count, shards in ((1, 1), (10, 3), (7, 7), (5, 8), (1000, 13)):
        dataset = Dataset(
            model="mlp", version=1, digest="", seed=0, start=50, count=count, shards=shards, height=28, width=28,
            latent_size=8, classes=0,
        )  # fmt: skip
        for place in range(count):
            first, size = dataset.shard_range(dataset.shard_of(place))
            assert first <= 50 + place < first + size
