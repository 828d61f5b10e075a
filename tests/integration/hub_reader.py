"""What others read of a data set in the Hub's layout, as JSON; run by the interpreter that has ``datasets`` and pandas.

build/hub/bin/python tests/integration/hub_reader.py FOLDER
"""

from __future__ import annotations

import hashlib
import io
import json
import sys
from typing import Any

import datasets
import numpy as np
import pandas
from PIL import Image
from torchvision.transforms.v2.functional import pil_to_tensor


def digest(pictures: Any) -> str:
    return hashlib.sha256(b"".join(np.asarray(picture).tobytes() for picture in pictures)).hexdigest()


folder = sys.argv[1]
read = datasets.load_dataset(folder)
seen: dict[str, Any] = {}
for split, rows in read.items():
    labels = rows["label"] if "label" in rows.column_names else None
    seen[split] = {
        "features": {name: repr(feature) for name, feature in rows.features.items()},
        "pixels": digest(rows["image"]),
        "labels": None if labels is None else list(labels),
        "index": list(rows["index"]),
        "torchvision": digest(pil_to_tensor(picture)[0].numpy() for picture in rows["image"]),
    }
train = pandas.read_parquet(f"{folder}/data/train-00000-of-00001.parquet")
pictures = [Image.open(io.BytesIO(cell["bytes"])) for cell in train["image"]]
seen["pandas"] = {
    "columns": list(train.columns),
    "pixels": digest(pictures),
    "texts": [picture.info["digits"] for picture in pictures[:3]],
}
card = datasets.load_dataset_builder(folder).info
seen["card"] = {name: repr(feature) for name, feature in (card.features or {}).items()}
print(json.dumps(seen))
