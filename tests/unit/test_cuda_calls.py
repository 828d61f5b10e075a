"""How CUDA is called, with names of its bindings that record in place of NVIDIA's: which thread, which libraries, which error."""

from __future__ import annotations

import threading
from types import SimpleNamespace
from typing import Any

import pytest

from serve.engine import cuda, provider
from serve.errors import EngineError, ProviderError

EXCHANGE = "cudaThreadExchangeStreamCaptureMode"


class Recorded:
    """Bindings that note each call with its thread and succeed, but for those in ``failing``."""

    cudaStreamCaptureMode = SimpleNamespace(cudaStreamCaptureModeThreadLocal="thread-local")  # noqa: N815

    def __init__(self) -> None:
        self.calls: list[tuple[str, str, tuple[Any, ...]]] = []
        self.failing: set[str] = set()

    def __getattr__(self, name: str) -> Any:
        def call(*arguments: Any) -> tuple[Any, ...]:
            self.calls.append((threading.current_thread().name, name, arguments))
            code = _Code(name in self.failing)
            return (code, 1, 5) if name == "cudaMemGetInfo" else (code,)

        return call


class _Code(int):
    name = "cudaErrorUnknown"


@pytest.fixture
def bindings(monkeypatch: pytest.MonkeyPatch) -> Recorded:
    recorded = Recorded()
    monkeypatch.setattr(cuda, "_bindings", lambda name: recorded)
    monkeypatch.setattr(cuda, "_this_thread", threading.local())
    return recorded


def test_every_thread_that_calls_cuda_minds_its_own_captures_alone(bindings: Recorded) -> None:
    """What it allocates or releases would break a capture in another thread."""

    def use() -> None:
        cuda.Device().wait(7)
        cuda.memory_total_bytes()

    for name in ("one", "two"):
        thread = threading.Thread(target=use, name=name)
        thread.start()
        thread.join(30)
    own = [(EXCHANGE, ("thread-local",)), ("cudaStreamSynchronize", (7,)), ("cudaMemGetInfo", ())]
    assert bindings.calls == [(name, *call) for name in ("one", "two") for call in own]


def test_a_thread_whose_mode_could_not_be_set_tries_again(bindings: Recorded) -> None:
    bindings.failing = {EXCHANGE}
    with pytest.raises(EngineError, match=f"{EXCHANGE} failed: cudaErrorUnknown"):
        cuda.memory_total_bytes()
    bindings.failing = set()
    assert cuda.memory_total_bytes() == 5
    assert [name for _, name, _ in bindings.calls] == [EXCHANGE, EXCHANGE, "cudaMemGetInfo"]


def test_cudas_libraries_are_loaded_from_wherever_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    """Beside PyTorch, say, when onnxruntime is installed apart from it: its own search looks there only."""
    loaded: list[str] = []
    missing = ""

    class NotFoundError(Exception):
        pass

    def load(name: str) -> None:
        if name == missing:
            raise NotFoundError
        loaded.append(name)

    finder = SimpleNamespace(load_nvidia_dynamic_lib=load, DynamicLibNotFoundError=NotFoundError)
    monkeypatch.setattr(cuda, "_imported", lambda module: {"cuda.pathfinder": finder}[module])
    cuda.load_libraries()
    assert loaded == list(cuda.LIBRARIES)
    assert loaded.index("cublasLt") < loaded.index("cublas")
    missing = "curand"
    with pytest.raises(ProviderError, match="curand"):
        cuda.load_libraries()


def test_cuda_without_its_libraries_is_refused_or_left_alone(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def missing() -> None:
        raise ProviderError("CUDA's library cudnn is not found here")

    monkeypatch.setattr(provider.driver, "why_unusable", lambda: None)
    monkeypatch.setattr(provider, "memory_total_bytes", lambda: 1 << 30)
    monkeypatch.setattr(provider, "load_libraries", missing)
    with pytest.raises(ProviderError, match=r"--provider cuda: .*cudnn.*--provider cpu"):
        provider.choose_provider("cuda")
    with caplog.at_level("INFO"):
        assert provider.choose_provider("auto") == "cpu"
    assert "provider auto: on the CPU" in caplog.text
    assert "cudnn" in caplog.text
    monkeypatch.setattr(provider, "load_libraries", lambda: None)
    assert provider.choose_provider("auto") == "cuda"
