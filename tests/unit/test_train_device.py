"""How many threads training uses, and what a device can do."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from train.device import has_bf16, prepare_machine
from train.errors import ConfigError

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def _threads_as_before() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize(
    ("flag", "of_pytorch", "cores", "threads"),
    [
        (0, 16, 2, 2),  # a container's quota
        (0, 1, 32, 1),  # OMP_NUM_THREADS, as torchrun sets it
        (3, 16, 2, 3),  # the user has said so
    ],
)
def test_threads_are_as_many_as_there_are_cores_to_use(
    flag: int, of_pytorch: int, cores: int, threads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Issue: in a container with a quota of 2 on 32 cores PyTorch had 32 threads, which waited for each other."""
    monkeypatch.setattr("train.device.usable_cores", lambda: cores)
    torch.set_num_threads(of_pytorch)
    prepare_machine("cpu", flag)
    assert torch.get_num_threads() == threads


def test_a_negative_number_of_threads_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"--threads .* 0 .*-1"):
        prepare_machine("cpu", -1)


@pytest.mark.parametrize(
    ("capabilities", "held"),
    [
        ({"architecture": "x86_64", "avx2": True, "avx512_bf16": False, "amx_bf16": False}, False),
        ({"architecture": "x86_64", "avx512_f": True, "avx512_bf16": True}, True),
        ({"architecture": "x86_64", "avx512_bf16": False, "amx_bf16": True}, True),
        ({"architecture": "arm64", "neon": True, "bf16": True}, True),
        ({"architecture": "arm64", "neon": True}, False),
    ],
)
def test_a_processor_has_bf16_if_its_instructions_do(
    capabilities: dict[str, object], held: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities)
    assert has_bf16(CPU) is held


def test_a_processor_whose_instructions_are_not_known_does_not_have_bf16(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(torch.cpu, "get_capabilities")
    assert has_bf16(CPU) is False


def test_a_gpu_that_imitates_bf16_does_not_have_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: including_emulation)
    assert has_bf16(torch.device("cuda")) is False
