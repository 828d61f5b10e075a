"""What PyTorch's DataLoader reads of a DigitSet, as JSON: digests of its batches, by workers and by how they are started.

python tests/integration/digit_set_reader.py TARGET-OR-FOLDER fork|spawn
"""

from __future__ import annotations

import hashlib
import json
import sys
from typing import Any

from torch.utils.data import DataLoader, DistributedSampler, RandomSampler

from serve.client import DigitClient, DigitSet

COUNT, BATCH = 70, 16


def digest(batches: Any) -> str:
    found = hashlib.sha256()
    for images, labels in batches:
        assert images.shape[1:] == (1, 28, 28)
        found.update(images.numpy().tobytes() + labels.numpy().tobytes())
    return found.hexdigest()


def main() -> None:
    source, started = sys.argv[1:]
    digits = DigitSet(source, seed=2**64 - 1, count=COUNT, start=5)
    seen: dict[str, Any] = {}
    # The process that forks has called the server before, and still has its connections.
    if ":" in source:
        DigitClient(source).generate(1)
    digits[3]
    context = {"multiprocessing_context": started}
    for workers in (0, 1, 2):
        own: dict[str, Any] = context if workers else {}
        digits.set_epoch(0)
        seen[f"{workers} workers"] = digest(DataLoader(digits, BATCH, num_workers=workers, **own))
        digits.set_epoch(1)
        seen[f"{workers} workers, epoch 1"] = digest(DataLoader(digits, BATCH, num_workers=workers, **own))
    staying = DataLoader(digits, BATCH, num_workers=2, persistent_workers=True, **context)  # type: ignore[arg-type]
    for epoch in (0, 1):
        digits.set_epoch(epoch)
        seen[f"staying, epoch {epoch}"] = digest(staying)
    digits.set_epoch(0)
    order = list(RandomSampler(range(COUNT)))
    ranks = [DistributedSampler(digits, 2, rank, seed=3) for rank in (0, 1)]  # type: ignore[arg-type, var-annotated]  # no Dataset by its class
    for name, indices in {"any order": order, **{f"rank {rank}": list(each) for rank, each in enumerate(ranks)}}.items():
        images = {index: (image, label) for index, (image, label) in zip(indices, digits.__getitems__(indices), strict=True)}
        one_by_one = {index: digits[index] for index in indices}
        seen[name] = all(
            (images[each][0] == one_by_one[each][0]).all() and images[each][1] == one_by_one[each][1] for each in indices
        )
    seen["ranks"] = sorted({*ranks[0], *ranks[1]}) == list(range(COUNT))
    print(json.dumps(seen))


if __name__ == "__main__":
    main()
