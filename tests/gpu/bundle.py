"""What a machine with a GPU and no network needs beside its own PyTorch, to be carried there by hand in parts.

    python -m tests.gpu.bundle --python 3.12 --part-mib 55     # build/gpu-bundle: parts, SHA256SUMS, install.sh
    python -m tests.gpu.bundle --architecture 90               # with machine code for an H100 or H200 alone

There: copy ``build/gpu-bundle`` and a checkout over, ``sh install.sh /opt/digits-wheels``, and what it prints last. The machine's
own torch, numpy and CUDA libraries stay as they are; the folder goes before its site-packages, so that its onnxruntime, if it has
one for the CPU, is shadowed and not uninstalled.
"""

from __future__ import annotations

import argparse
import hashlib
import subprocess
import sys
import tempfile
import tomllib
from collections.abc import Callable, Sequence
from pathlib import Path

from tests.gpu import fatbin

# What the machine has with its PyTorch for CUDA 13, or needs not for a check.
LEFT_OUT = ("numpy", "torch", "torchvision")
FOR_CHECKS = ("psutil", "matplotlib", "pillow", "tqdm", "tensorboard", "onnxscript", "onnx")
PLATFORMS = ("manylinux_2_28_x86_64", "manylinux_2_27_x86_64", "manylinux_2_17_x86_64", "manylinux2014_x86_64")

INSTALL = """#!/bin/sh
# Join the parts, check them, install them into a folder of their own, and see that CUDA is there.
set -eu
folder=${1:?usage: sh install.sh FOLDER}
python=${PYTHON:-python3}
here=$(cd "$(dirname "$0")" && pwd)
cd "$here"
sha256sum --check --quiet SHA256SUMS
mkdir -p "$folder/wheels"
cat parts.* > "$folder/wheels.tar"
tar -xf "$folder/wheels.tar" -C "$folder/wheels"
rm "$folder/wheels.tar"
"$python" -m pip install --quiet --no-index --no-deps --no-compile --target "$folder/packages" "$folder"/wheels/*.whl
PYTHONPATH="$folder/packages" "$python" - <<'END'
import onnxruntime
assert "CUDAExecutionProvider" in onnxruntime.get_available_providers(), onnxruntime.get_available_providers()
print("onnxruntime", onnxruntime.__version__, onnxruntime.get_available_providers())
END
echo "next: PYTHONPATH=$folder/packages make gpu-check PYTHON=$python"
"""


def wanted() -> list[str]:
    """The project's own requirements, CUDA's bindings among them and what the machine has left out."""
    project = tomllib.loads(Path("pyproject.toml").read_text(encoding="utf-8"))["project"]
    named = [*project["optional-dependencies"]["serve"], *project["dependencies"], "cuda-bindings>=13", *FOR_CHECKS]
    return [
        each for each in named if not each.split(";")[0].strip().lower().startswith(LEFT_OUT) and "sys_platform != " not in each
    ]


def download(folder: Path, python: str) -> None:
    """Fetch the wheels for that Python, of what is wanted and what that needs. Raises SystemExit with pip's own words."""
    pip = [sys.executable, "-m", "pip", "download", "--quiet", "--only-binary=:all:", "--python-version", python]
    platforms = [word for platform in PLATFORMS for word in ("--platform", platform)]
    command = [*pip, *platforms, "--dest", str(folder), *wanted()]
    if subprocess.run(command, check=False).returncode:
        sys.exit("error: the wheels could not be fetched; see above")


def write(
    out: Path,
    part_bytes: int,
    python: str,
    fetch: Callable[[Path, str], None] = download,
    *,
    architecture: int | None = None,
    without: Sequence[str] = (),
) -> list[Path]:
    """Write the parts, each at most ``part_bytes``, their digests and the script. Returns the parts.

    With an ``architecture`` the machine code of others is left out, and so are the packages ``without`` which it shall be. Raises
    ValueError for an architecture that there is no code for.
    """
    out.mkdir(parents=True, exist_ok=True)
    for old in out.glob("parts.*"):
        old.unlink()
    with tempfile.TemporaryDirectory() as scratch:
        wheels = Path(scratch) / "wheels"
        wheels.mkdir()
        fetch(wheels, python)
        for name in (*LEFT_OUT, *without):
            for wheel in wheels.glob(f"{name.replace('-', '_')}-*"):
                wheel.unlink()
        for wheel in wheels.glob("nvidia_*"):  # with torch's own CUDA there already
            wheel.unlink()
        if architecture is not None:
            for wheel in wheels.glob("onnxruntime_gpu-*"):
                fatbin.slim_wheel(wheel, architecture)
        archive = Path(scratch) / "wheels.tar"
        subprocess.run(["tar", "-cf", str(archive), "-C", str(wheels), "."], check=True)
        parts = []
        with archive.open("rb") as whole:
            while content := whole.read(part_bytes):
                parts.append(out / f"parts.{len(parts):03d}")
                parts[-1].write_bytes(content)
    sums = "".join(f"{hashlib.sha256(part.read_bytes()).hexdigest()}  {part.name}\n" for part in parts)
    (out / "SHA256SUMS").write_text(sums)
    (out / "install.sh").write_text(INSTALL)
    return parts


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.gpu.bundle", description="Bundle wheels for a GPU without a network.")
    parser.add_argument("--out", type=Path, default=Path("build/gpu-bundle"), help="folder (default: build/gpu-bundle)")
    parser.add_argument("--python", default="3.12", help="the machine's Python (default: 3.12)")
    parser.add_argument("--part-mib", type=int, default=55, help="size of a part (default: 55)")
    parser.add_argument("--architecture", type=int, help="of its GPU, 90 for an H100 or H200, to leave out others' machine code")
    parser.add_argument("--without", default="", metavar="NAME,...", help="packages that it has already")
    flags = parser.parse_args(arguments)
    without = [name for name in flags.without.split(",") if name]
    try:
        parts = write(flags.out, flags.part_mib << 20, flags.python, architecture=flags.architecture, without=without)
    except ValueError as error:
        parser.error(f"--architecture {flags.architecture}: {error}")
    for part in parts:
        print(f"{part}: {part.stat().st_size >> 20} MiB")
    print(f"next, there: sh {flags.out.name}/install.sh FOLDER")
    return 0


if __name__ == "__main__":
    sys.exit(main())
