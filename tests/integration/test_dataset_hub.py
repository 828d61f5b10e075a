"""A data set in the Hub's layout: read back by ``datasets``, pandas and torchvision, and its card."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from serve.dataset.command import main
from serve.dataset.joining import open_whole
from serve.manifest import BUNDLED_DIR
from serve.models.repository import read_bundle
from serve.pictures import Origin

PYTHON = Path("build/hub/bin/python")
COUNT = 1501
RPGAN = ["write", "--model=rpgan", "--provider=cpu", "--seed=7", "--start=100", f"--count={COUNT}", "--shards=2"]


def with_pyarrow(*command: str, home: Path) -> str:
    assert PYTHON.exists(), "it is not set up: run the long tests with make test-all, which does that"
    environment = os.environ | {"HF_HOME": str(home), "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(Path.cwd())}
    done = subprocess.run([str(PYTHON), *command], capture_output=True, text=True, timeout=300, check=False, env=environment)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(
    scope="module", params=[[], ["--filter=0.9", "--labels", "3", "1", "4"], ["--model=mlp"]], ids=["plain", "filtered", "mlp"]
)
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("set")
    for shard in range(2):
        assert main([*RPGAN, *request.param, f"--shard={shard}", f"--out={out}"]) == 0
    printed = with_pyarrow(
        "-m", "serve.dataset", "join", "--format=parquet", "--test-share=0.2", f"--out={out}", home=out
    ).splitlines()
    names = [path.relative_to(out / "hub").as_posix() for path in map(Path, printed)]
    assert names == ["data/train-00000-of-00001.parquet", "data/test-00000-of-00001.parquet", "README.md"]
    assert sorted(path.name for path in (out / "hub" / "data").iterdir()) == sorted(Path(name).name for name in names[:2])
    return out


@pytest.mark.long
def test_others_read_the_digits_and_labels_that_were_written(folder: Path) -> None:
    whole = open_whole(folder)
    seen: dict[str, Any] = json.loads(with_pyarrow("tests/integration/hub_reader.py", str(folder / "hub"), home=folder))
    test = round(COUNT * 0.2)
    for split, first, count in (("train", 0, COUNT - test), ("test", COUNT - test, test)):
        pixels = hashlib.sha256(b"".join(whole.pixels(first, count))).hexdigest()
        assert (seen[split]["pixels"], seen[split]["torchvision"]) == (pixels, pixels)
        assert seen[split]["index"] == whole.indices(first, count).tolist()
        assert seen[split]["features"] == seen["card"], "the card says of the columns what the files say"
        assert seen[split]["features"]["image"].startswith("Image(")
        if whole.dataset.classes:
            assert seen[split]["labels"] == list(b"".join(whole.labels(first, count)))
            assert seen[split]["features"]["label"] == "ClassLabel(names=['0', '1', '2', '3', '4', '5', '6', '7', '8', '9'])"
        else:
            assert list(seen[split]["features"]) == ["image", "index"]
    assert seen["pandas"]["pixels"] == seen["train"]["pixels"]
    dataset, labels = whole.dataset, list(b"".join(whole.labels(0, 3)))
    for index, label, text in zip(whole.indices(0, 3).tolist(), labels, seen["pandas"]["texts"], strict=True):
        own = (label,) if dataset.classes else ()
        assert text == Origin(dataset.model, 1, dataset.digest, 7, index, 1, own).text(), "a picture says how it was made"


@pytest.mark.long
def test_the_card_says_what_the_digits_are_and_how_to_make_them_again(folder: Path, tmp_path: Path) -> None:
    _, head, body = (folder / "hub" / "README.md").read_text().split("---\n", 2)
    told, dataset = yaml.safe_load(head), open_whole(folder).dataset
    assert told["configs"][0]["data_files"] == [{"split": part, "path": f"data/{part}-*"} for part in ("train", "test")]
    assert ("task_categories" in told) == bool(dataset.classes)
    bundle = read_bundle(BUNDLED_DIR / dataset.model / "1")
    assert bundle.digest in body
    figure = json.loads(bundle.quality_json)["model"]["frechet_distance"]
    assert f"| frechet distance | {figure:.4g} |" in body
    assert ("A judge (" in body) == ("`--judge`" in body) == bool(dataset.filter)
    assert json.loads(body.split("```json\n")[1].split("```")[0]) == bundle.manifest.training["config"]
    [command] = [line for line in body.splitlines() if line.startswith("python -m serve.dataset ")]
    flags = command.split()[3:]
    assert main([*flags[:1], "--provider=cpu", *flags[1:][:1], str(tmp_path / "again"), *flags[3:]]) == 0
    [again] = (tmp_path / "again").glob("part-*.pixels")
    assert again.read_bytes() == b"".join(open_whole(folder).pixels(0, COUNT))


@pytest.mark.long
def test_a_full_disk_leaves_nothing_half_written(folder: Path) -> None:
    limited = (
        "import resource, sys; resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, 200_000)); "
        "from serve.dataset.command import main; sys.exit(main(sys.argv[1:]))"
    )

    def there() -> dict[Path, int]:
        return {path: path.stat().st_mtime_ns for path in (folder / "hub").rglob("*") if path.is_file()}

    before = there()
    command = [str(PYTHON), "-c", limited, "join", "--format=parquet", f"--out={folder}"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert (done.returncode, done.stderr.count("\n")) == (2, 1), done.stderr
    assert there() == before


def test_without_pyarrow_it_is_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(__import__("sys").modules, "pyarrow", None)
    assert main(["write", "--model=mlp", "--provider=cpu", "--count=10", f"--out={tmp_path}"]) == 0
    capsys.readouterr()
    assert main(["join", "--format=parquet", f"--out={tmp_path}"]) == 2
    assert capsys.readouterr().err == "error: --format parquet needs pyarrow: pip install '.[parquet]'\n"


def test_pixels_and_labels_are_had_from_any_place_on(tmp_path: Path) -> None:
    for shard in range(2):
        assert main([*RPGAN, f"--shard={shard}", f"--out={tmp_path}"]) == 0
    whole = open_whole(tmp_path)
    everything = np.frombuffer(b"".join(whole.pixels(0, COUNT)), np.uint8).reshape(-1, 784)
    labels = b"".join(whole.labels(0, COUNT))
    for first, count in ((0, 1), (749, 3), (COUNT - 1, 1)):
        assert b"".join(whole.pixels(first, count)) == everything[first : first + count].tobytes()
        assert b"".join(whole.labels(first, count)) == labels[first : first + count]
        assert whole.indices(first, count).tolist() == list(range(100 + first, 100 + first + count))
