"""A DigitSet by an engine in this process: addresses, epochs, labels, pickles, and what is refused."""

from __future__ import annotations

import builtins
import pickle
import shutil
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from serve.client import DigitError, DigitSet
from serve.client.training.digit_set import EXTRA, About, Server
from serve.engine.session import Engine
from serve.latents import Span, draw_span
from serve.manifest import BUNDLED_DIR

MLP, RPGAN = BUNDLED_DIR / "mlp" / "1", BUNDLED_DIR / "rpgan" / "1"
SEED = 2**64 - 1


def drawn(first: int, count: int, truncation: float = 0.0) -> np.ndarray[Any, Any]:
    return draw_span(Span(SEED, first, count, truncation=truncation), 100, 10)[0]


@pytest.fixture
def runs(monkeypatch: pytest.MonkeyPatch) -> list[tuple[np.ndarray[Any, Any], np.ndarray[Any, Any] | None]]:
    """What the engine is asked for."""
    asked: list[tuple[np.ndarray[Any, Any], np.ndarray[Any, Any] | None]] = []
    honest = Engine.compute

    def compute(self: Engine, latents: Any, labels: Any = None, outputs: Any = ("pixels",)) -> Any:
        asked.append((latents, labels))
        return honest(self, latents, labels, outputs)

    monkeypatch.setattr(Engine, "compute", compute)
    return asked


def test_items_are_the_addresses_in_any_order_and_a_batch_is_one_request(runs: list[Any]) -> None:
    digits = DigitSet(RPGAN, seed=SEED, count=100, start=50)
    assert len(digits) == 100
    digits[0]
    runs.clear()
    items = digits.__getitems__([7, 8, 9, 3, 99, 0, np.int64(3), -1])
    [(latents, labels)] = runs
    indices = [57, 58, 59, 53, 149, 50, 53, 149]
    assert np.array_equal(latents, np.concatenate([drawn(index, 1) for index in indices]))
    own = [int(draw_span(Span(SEED, index, 1), 100, 10)[1][0]) for index in indices]  # type: ignore[index]
    assert [label for _, label in items] == own == labels.tolist()
    assert all((image.shape, image.dtype) == ((1, 28, 28), np.uint8) for image, _ in items)
    assert digits.__getitems__([]) == []


def test_an_epoch_begins_where_the_one_before_ended(runs: list[Any]) -> None:
    digits = DigitSet(RPGAN, seed=SEED, count=10, start=5)
    digits.set_epoch(np.int64(3))
    digits[2]
    assert np.array_equal(runs[-1][0], drawn(5 + 3 * 10 + 2, 1))
    last = DigitSet(RPGAN, seed=1, count=10, start=2**63 - 20)
    last.set_epoch(1)
    last[9]
    with pytest.raises(DigitError, match="epoch 2 ends beyond the last index"):
        last.set_epoch(2)
    with pytest.raises(DigitError, match="epoch 0 ends beyond"):
        DigitSet(RPGAN, seed=1, count=10, start=2**63 - 5)


def test_labels_are_in_turn_of_the_stream_and_truncation_is_drawn(runs: list[Any]) -> None:
    digits = DigitSet(RPGAN, seed=SEED, count=100, start=4, labels=[3, 1, 4], truncation=0.5)
    items = digits.__getitems__([0, 1, 2, 50])
    assert [label for _, label in items] == [1, 4, 3, 3], "index 4 has labels[4 % 3]"
    assert np.array_equal(runs[-1][0], np.concatenate([drawn(4, 3, 0.5), drawn(54, 1, 0.5)]))
    assert {label for _, label in DigitSet(RPGAN, seed=1, count=5, labels=7)} == {7}
    assert {label for _, label in DigitSet(MLP, seed=1, count=5)} == {-1}, "none, and no class"


def test_a_pickled_set_goes_on_where_it_was() -> None:
    digits = DigitSet(RPGAN, seed=SEED, count=100)
    digits.set_epoch(2)
    (image, label), again = digits[5], pickle.loads(pickle.dumps(digits))
    other, other_label = again[5]
    assert (np.array_equal(image, other), label) == (True, other_label)
    again.set_epoch(3)
    assert not np.array_equal(again[5][0], digits[5][0]), "it is a set of its own"


def test_a_forked_process_opens_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    digits = DigitSet(MLP, seed=1, count=10)
    image, _ = digits[0]
    opened: list[int] = []
    honest = DigitSet._open
    monkeypatch.setattr(DigitSet, "_open", lambda self, *named: (opened.append(1), honest(self, *named))[1])
    digits[0]
    assert not opened
    monkeypatch.setattr("serve.client.training.digit_set.getpid", lambda: 1)
    assert np.array_equal(digits[0][0], image)
    digits[1]
    assert len(opened) == 1


@pytest.mark.parametrize("index", [100, -101, 2**70])
def test_an_index_beyond_the_end_is_an_index_error(index: int) -> None:
    digits = DigitSet(MLP, seed=1, count=100)
    with pytest.raises(IndexError, match=f"index {index} of 100"):
        digits[index]
    with pytest.raises(TypeError):
        digits[0.5]  # type: ignore[index]


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"seed": -1}, "seed must be from 0"),
        ({"count": 0}, "count must be 1 or more"),
        ({"labels": [1, 10]}, "labels: 10 cannot be asked for, rpgan has labels 0 to 9"),
        ({"labels": -1}, "labels must be from 0"),
        ({"source": MLP, "labels": [1]}, "labels: 1 cannot be asked for, mlp is unconditional"),
        ({"model": "mlp"}, "holds rpgan/1, not mlp"),
        ({"version": 2}, "holds rpgan/1, not rpgan/2"),
        ({"truncation": 0.001}, "truncation must be 0.01 or more"),
        ({"truncation": float("nan")}, "truncation must be 0.01 or more"),
        ({"source": BUNDLED_DIR}, "manifest.json cannot be read"),
        ({"source": "none:of/these"}, "names no port"),
        ({"source": "models/rpgan/9"}, "models/rpgan/9 is neither a bundle's folder nor a server's host:port"),
        ({"source": Path("no:1")}, "no:1 is neither a bundle's folder"),
    ],
)
def test_what_cannot_be_had_is_refused_in_one_line(options: dict[str, Any], text: str) -> None:
    given = {"source": RPGAN, "seed": 1, "count": 10} | options
    with pytest.raises(DigitError, match=text) as raised:
        DigitSet(given.pop("source"), **given)
    assert "\n" not in str(raised.value)


def test_a_process_that_meets_another_file_raises(bundles: Path) -> None:
    digits = DigitSet(bundles / "rpgan" / "1", seed=1, count=10)
    shutil.rmtree(bundles / "rpgan")
    shutil.copytree(bundles / "cdcgan", bundles / "rpgan")
    manifest = bundles / "rpgan" / "1" / "manifest.json"
    manifest.write_text(manifest.read_text().replace('"name": "cdcgan"', '"name": "rpgan"'))
    with pytest.raises(DigitError, match="has another rpgan/1 now than when the set was made"):
        digits[0]


def test_a_folder_without_the_servers_packages_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    honest = builtins.__import__

    def import_(name: str, *rest: Any) -> Any:
        if name.startswith("serve.engine"):
            raise ImportError(name)
        return honest(name, *rest)

    monkeypatch.delitem(sys.modules, "serve.client.training.in_process", raising=False)
    monkeypatch.setattr(builtins, "__import__", import_)
    with pytest.raises(DigitError, match="needs more than the client") as raised:
        DigitSet(RPGAN, seed=1, count=10)
    assert EXTRA in str(raised.value)


def test_a_server_is_asked_for_no_more_than_it_takes(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes: list[int] = []

    class Fake(Server):
        def __init__(self, *_: Any) -> None:
            self.about = About("rpgan", 1, "digest", 100, 10, most=16)

        def make(self, latents: Any, labels: Any) -> Any:
            sizes.append(len(latents))
            return np.zeros((len(latents), 28, 28), np.uint8)

        def close(self) -> None:
            pass

    monkeypatch.setattr("serve.client.training.digit_set.Server", Fake)
    digits = DigitSet("localhost:1", seed=1, count=100)
    assert len(digits.__getitems__(range(40))) == 40
    assert sizes == [16, 16, 8]
