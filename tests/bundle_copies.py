"""More versions of the bundled models, for tests that change what is served: the same weights under another number."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

from serve.manifest import MANIFEST_FILE


def add_version(models_dir: Path, name: str, version: int) -> Path:
    """Copy version 1 as ``version``, whole at once, the way export publishes."""
    beside = models_dir / f".new-{name}-{version}"
    shutil.copytree(models_dir / name / "1", beside)
    renumber(beside, version)
    return beside.rename(models_dir / name / str(version))


def renumber(bundle: Path, version: int) -> None:
    """Write another version number into a bundle's manifest."""
    values = json.loads((bundle / MANIFEST_FILE).read_text())
    values["version"] = version
    (bundle / MANIFEST_FILE).write_text(json.dumps(values))


def break_golden(bundle: Path) -> None:
    """Make a bundle whose digests are right and whose model is not the one that the golden samples are from."""
    values = json.loads((bundle / MANIFEST_FILE).read_text())
    values["golden"]["pixels"] = "//AA" * 100 + values["golden"]["pixels"][400:]  # base64, white and black by turns
    (bundle / MANIFEST_FILE).write_text(json.dumps(values))
