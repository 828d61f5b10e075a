"""``make protos-check``: what callers use of protos/ may not change."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
DIGITS = "digits/v1/digits.proto"


def check(protos: Path, folder: Path = ROOT) -> subprocess.CompletedProcess[str]:
    command = ["make", "--no-print-directory", "protos-check", f"PROTOS={protos}"]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=60, check=False)


@pytest.mark.parametrize(
    ("was", "becomes", "said"),
    [
        ("", "", ""),
        ("  uint32 latent_size = 11;", "  uint32 latent_size = 11;\n  uint32 more = 12;", ""),
        ("  uint32 count = 3; ", "  uint64 count = 3; ", "count"),
        ("  uint64 start = 5; ", "  uint64 start = 15; ", "start"),
        ("  rpc ListModels(ListModelsRequest) returns (ListModelsResponse);", "", "ListModels"),
        ("uint32 latent_size = 11;", "uint32 latentSize = 11;", "latentSize"),
    ],
)
def test_protos_may_grow_and_not_change(was: str, becomes: str, said: str, tmp_path: Path) -> None:
    protos = tmp_path / "protos"
    shutil.copytree(ROOT / "protos", protos)
    text = (protos / DIGITS).read_text()
    assert was in text
    (protos / DIGITS).write_text(text.replace(was, becomes, 1))
    done = check(protos)
    assert (done.returncode == 0) == (not said), done.stdout + done.stderr
    assert said in done.stdout


@pytest.mark.long
def test_once_there_is_a_tag_it_is_what_they_are_compared_with(tmp_path: Path) -> None:
    clone = tmp_path / "clone"
    for command in (["clone", "--quiet", str(ROOT), str(clone)], ["-C", str(clone), "tag", "v9"]):
        subprocess.run(["git", *command], check=True)
    (clone / "protos" / "released.binpb").unlink()
    for name in ("build", ".venv"):
        (clone / name).symlink_to(ROOT / name)
    shutil.copy(ROOT / "Makefile", clone)
    done = check(Path("protos"), clone)
    assert done.returncode == 0, done.stdout + done.stderr
    text = (clone / "protos" / DIGITS).read_text()
    (clone / "protos" / DIGITS).write_text(text.replace("  uint64 start = 5; ", "  uint64 start = 15; ", 1))
    done = check(Path("protos"), clone)
    assert done.returncode != 0
    assert "start" in done.stdout
