"""Lock what the images install: ``make lock`` writes deploy/requirements/*.txt, versions and hashes only.

serve.txt is what the server needs beside ONNX Runtime; cpu.txt and gpu.txt are that runtime, without CUDA and with it;
cuda.txt is CUDA and cuDNN themselves; train.txt is for training and export. The hashes are of every file that the index has for a
version, so the lock holds for any base with Python 3.11 or newer.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
FOLDER = ROOT / "deploy" / "requirements"
BUILD_BACKEND = "hatchling>=1.27"


def main() -> int:
    """Write the three files."""
    serve, on_gpu = resolve(("serve", "tracing")), resolve(("serve", "tracing", "cuda"))
    runtime = serve.pop("onnxruntime-gpu")
    pinned = runtime.partition(" ")[0].replace("onnxruntime-gpu", "onnxruntime")
    write("serve.txt", serve)
    write("cpu.txt", {"onnxruntime": resolve(("serve", "tracing"), pinned)["onnxruntime"]})
    write("gpu.txt", {"onnxruntime-gpu": runtime})
    write("cuda.txt", {name: entry for name, entry in on_gpu.items() if name not in (*serve, "onnxruntime-gpu")})
    write("train.txt", resolve(("tracing", "train")))
    return 0


def resolve(extras: tuple[str, ...], also: str = "") -> dict[str, str]:
    """Package name → its entry: the pinned version and its hashes."""
    command = [
        sys.executable, "-m", "uv", "pip", "compile", "--quiet", "--generate-hashes", "--no-emit-index-url", "--no-annotate",
        "--no-header", "--python-version=3.11", "--python-platform=x86_64-manylinux_2_28", "pyproject.toml", "-",
        *(f"--extra={extra}" for extra in extras),
    ]  # fmt: skip
    done = subprocess.run(command, cwd=ROOT, input=f"{BUILD_BACKEND}\n{also}", capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(f"error: {done.stderr.strip()}")
    entries: dict[str, str] = {}
    name = ""
    for line in done.stdout.splitlines():
        if not line.startswith((" ", "#")):
            name = line.partition("==")[0]
        if name:
            entries[name] = entries.get(name, "") + line + "\n"
    return entries


def write(name: str, entries: dict[str, str]) -> None:
    """Replace one file."""
    FOLDER.mkdir(exist_ok=True)
    (FOLDER / name).write_text("".join(entries.values()), encoding="utf-8")
    print(f"deploy/requirements/{name}: {len(entries)} packages")


if __name__ == "__main__":
    sys.exit(main())
