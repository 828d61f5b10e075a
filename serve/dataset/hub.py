"""A data set as Parquet files with a card, in the Hugging Face Hub's layout (https://huggingface.co/docs/hub/datasets-cards).

``datasets.load_dataset`` reads the folder ``hub`` as it is: images as pictures, labels as classes. Needs pyarrow, the extra
``parquet``.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from serve.dataset.joining import Whole
from serve.dataset.verifying import check_bundle
from serve.errors import SettingsError
from serve.files import replacing
from serve.models.repository import Bundle
from serve.pictures import Origin, to_png

ROWS_A_FILE = 1_000_000  # half a gigabyte, as the Hub wants it
MOST_FILES = 128  # of one part: they are all open at once
ROWS_A_GROUP = 1000


def write_parquet(whole: Whole, bundle: Bundle) -> list[Path]:
    """Raises SettingsError without pyarrow, or when the bundle is another one than the data set was made by."""
    try:
        import pyarrow  # noqa: PLC0415  # an extra
        from pyarrow import parquet  # noqa: PLC0415
    except ImportError:
        raise SettingsError("--format parquet needs pyarrow: pip install '.[parquet]'") from None
    check_bundle(whole, bundle)
    dataset, hub = whole.dataset, whole.folder / "hub"
    (hub / "data").mkdir(parents=True, exist_ok=True)
    image = pyarrow.struct({"bytes": pyarrow.binary(), "path": pyarrow.string()})
    labelled = {"label": pyarrow.int64()} if dataset.classes else {}
    columns = {"image": image, **labelled, "index": pyarrow.int64()}
    told = {"huggingface": json.dumps({"info": {"features": _features(dataset.classes)}})}
    schema = pyarrow.schema(list(columns.items()), metadata=told)
    ranges = _files(hub / "data", whole)
    with replacing([*ranges, hub / "README.md"]) as files:
        for (first, count), file in zip(ranges.values(), files, strict=False):
            with parquet.ParquetWriter(file, schema, compression="zstd") as writer:
                for rows in _rows(whole, first, count):
                    writer.write_table(pyarrow.Table.from_pydict({name: rows[name] for name in columns}, schema))
        files[-1].write(card(whole, bundle).encode())
    return [*ranges, hub / "README.md"]


def _features(classes: int) -> dict[str, Any]:
    """The columns' types, as ``datasets`` keeps them in a file's metadata."""
    label = {"label": {"names": [str(label) for label in range(classes)], "_type": "ClassLabel"}} if classes else {}
    return {"image": {"_type": "Image"}, **label, "index": {"dtype": "int64", "_type": "Value"}}


def _files(folder: Path, whole: Whole) -> dict[Path, tuple[int, int]]:
    """The files, with the place of the first digit in each and how many it holds."""
    found = {}
    for part, (first, count) in whole.split().items():
        rows = max(ROWS_A_FILE, -(-count // MOST_FILES))
        begins = range(first, first + count, rows)
        for number, begin in enumerate(begins):
            name = f"{part}-{number:05d}-of-{len(begins):05d}.parquet"
            found[folder / name] = (begin, min(rows, first + count - begin))
    return found


def _rows(whole: Whole, first: int, count: int) -> Iterator[dict[str, list[Any]]]:
    """The columns of a group of rows at a time. Every picture says how it was made."""
    dataset = whole.dataset
    for begin in range(first, first + count, ROWS_A_GROUP):
        some = min(ROWS_A_GROUP, first + count - begin)
        pixels = np.frombuffer(b"".join(whole.pixels(begin, some)), np.uint8).reshape(some, dataset.height, dataset.width)
        labels, indices = list(b"".join(whole.labels(begin, some))), whole.indices(begin, some).tolist()
        made_by = dataset.model, dataset.version, dataset.digest, dataset.seed
        images = []
        for digit, label, index in zip(pixels, labels, indices, strict=True):
            origin = Origin(*made_by, index, 1, (label,) if dataset.classes else ())
            images.append({"bytes": to_png(digit, origin), "path": None})
        yield {"image": images, "label": labels, "index": indices}


def card(whole: Whole, bundle: Bundle) -> str:
    """``README.md``: what the Hub reads of it, and what people do."""
    dataset, manifest = whole.dataset, bundle.manifest
    parts = {part: count for part, (_, count) in whole.split().items() if count}
    files = "".join(f"\n  - split: {part}\n    path: data/{part}-*" for part in parts)
    names = "".join(f'\n          "{number}": "{number}"' for number in range(dataset.classes))
    label = f"\n  - name: label\n    dtype:\n      class_label:\n        names:{names}" if names else ""
    task = "\ntask_categories:\n- image-classification" if names else ""
    filtered = f"""
A judge (SHA-256 `{dataset.judge}`)
reads each as its label with a probability of {dataset.filter:g} or more. It refused {dataset.refused_share or 0:.2%} of what it
was shown, and later digits of the stream took their places.
"""
    needed = "that model file (`--models-dir` names its folder, where it is not a bundled one)"
    needed += " and that judge (`--judge`)" if dataset.filter else ""
    again = f"--model {dataset.model} --version {dataset.version} --seed {dataset.seed} --start {dataset.start}"
    again += f" --count {dataset.count}"
    again += f" --labels {' '.join(map(str, dataset.labels))}" if dataset.labels else ""
    again += f" --filter {dataset.filter:g}" if dataset.filter else ""
    return f"""---
pretty_name: Handwritten digits by {dataset.model}/{dataset.version}{task}
tags:
- synthetic
- handwritten-digits
configs:
- config_name: default
  data_files:{files}
dataset_info:
  features:
  - name: image
    dtype: image{label}
  - name: index
    dtype: int64
---

# {dataset.count:,} handwritten digits

{dataset.height} × {dataset.width} grey pixels, {f"labels 0 to {dataset.classes - 1}" if names else "without labels"}:
{", ".join(f"{count:,} in {part}" for part, count in parts.items())}.
Nobody wrote them: they were made by the generator {dataset.model}/{dataset.version} (architecture `{manifest.architecture}`,
SHA-256 of the model file `{dataset.digest}`)
from seed {dataset.seed}, index {dataset.start} on. `index` is a digit's place in that stream. The text chunk `digits` of each
PNG says how it was made.
{filtered if dataset.filter else ""}
The same digits again, byte for byte on the same kind of processor, with {needed}:

```sh
python -m serve.dataset write --out digits {again}
```

{_quality(bundle)}## Training of the generator

```json
{json.dumps(manifest.training.get("config", {}), indent=2)}
```
"""


def _quality(bundle: Bundle) -> str:
    """The table of the generator's quality beside real digits; empty for a bundle that was not judged."""
    judged = json.loads(bundle.quality_json) if bundle.quality_json else {}
    own, real = judged.get("model", {}), judged.get("real", {})
    figures = {name: value for name, value in own.items() if isinstance(value, float)}
    if not figures:
        return ""
    beside = {name: f"{real[name]:.4g}" for name in figures if isinstance(real.get(name), float)}
    rows = [f"| {name.replace('_', ' ')} | {value:.4g} | {beside.get(name, '')} |\n" for name, value in figures.items()]
    head = f"| of {judged.get('samples', 'its')} digits | generated | real |\n|---|--:|--:|\n"
    return f"## Quality of the generator\n\n{head}{''.join(rows)}\n"
