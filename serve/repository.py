"""Bundles on disk: found, read whole, and checked against their own digests. Knows no session and no request.

A bundle is read into memory once; what is served is what was checked, whatever happens to the folder afterwards.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from serve.errors import BundleError
from serve.manifest import MANIFEST_FILE, NAME_PATTERN, ONNX_FILE, PARITY_FILE, Manifest, parse_manifest, read_file, sha256

BUNDLED_DIR = Path(__file__).parent / "bundled"


@dataclass(frozen=True)
class Bundle:
    """A bundle whose files all have the digests its manifest lists. ``model`` is model.onnx's bytes."""

    path: Path
    manifest: Manifest
    model: bytes
    parity_json: str

    @property
    def digest(self) -> str:
        """SHA-256 of the model file."""
        return self.manifest.files[ONNX_FILE]


def read_bundle(path: Path) -> Bundle:
    """Read and check one ``<name>/<version>`` folder. Raises BundleError naming the file and the way out."""
    manifest = parse_manifest(read_file(path / MANIFEST_FILE), str(path / MANIFEST_FILE))
    if (manifest.name, str(manifest.version)) != (path.parent.name, path.name):
        raise BundleError(
            f"{path} holds model {manifest.name}/{manifest.version}; the folders must be called as the manifest says"
        )
    contents = {}
    for name, digest in manifest.files.items():
        if "/" in name or name.startswith("."):
            raise BundleError(f"{path / MANIFEST_FILE} lists {name[:40]!r}, which is no plain file name; export again")
        contents[name] = read_file(path / name)
        if sha256(contents[name]) != digest:
            raise BundleError(f"{path / name} is not the file that was exported (SHA-256 differs); export the model again")
    return Bundle(path, manifest, contents[ONNX_FILE], contents[PARITY_FILE].decode("utf-8", "replace"))


def latest_bundles(models_dir: Path) -> list[Path]:
    """The highest version's folder of each model below ``models_dir``. Raises BundleError when there is none.

    A folder without a manifest is still being copied and is passed over: the manifest is written last.
    """
    if not models_dir.is_dir():
        raise BundleError(f"--models-dir {models_dir} is not a folder; make export writes one, or leave the flag out")
    latest: list[Path] = []
    for folder in sorted(models_dir.iterdir()):
        if not folder.is_dir() or not NAME_PATTERN.fullmatch(folder.name):
            continue
        versions = [
            entry
            for entry in folder.iterdir()
            if entry.name.isascii() and entry.name.isdecimal() and (entry / MANIFEST_FILE).is_file()
        ]
        if versions:
            latest.append(max(versions, key=lambda entry: int(entry.name)))
    if not latest:
        raise BundleError(f"--models-dir {models_dir} holds no complete model; make export writes one")
    return latest
