"""``make gpu-check ARGS=--session``: what ten minutes on a GPU are to decide, in the order of its worth.

Each stage runs in a process of its own, under a limit of its own: one that hangs, or loses the device, costs no other. The
session ends when its time is spent. Figures are kept one by one, the JSON is written after each stage, and each stage prints what
it decides.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from serve.engine.cuda import load_libraries
from tests.bench.report import Target, print_targets, say, write
from tests.gpu import stages
from tests.gpu.checks import Plan
from tests.gpu.stages import Notes

TOTAL_S = 600.0
LEAST_S = 5.0  # of a stage: with less it is left out
STOP_S = 8.0  # what a stage's process has to end by itself after its limit


@dataclass(frozen=True)
class Stage:
    """``run`` measures until its notes' deadline, and returns what it decides in one line."""

    name: str
    limit_s: float
    run: Callable[[Plan, Notes], str]


# The first of them read CUDA's libraries from a cold disk: a day's first check took 25 s on a GPU, and 8 s later (docs/gpu).
STAGES = (
    Stage("latents", 40, stages.latents),
    Stage("profile", 50, stages.profile),
    Stage("forms", 180, stages.forms),
    Stage("tf32x3", 60, stages.tf32x3),
    Stage("yardstick", 25, stages.yardstick),
    Stage("served", 120, stages.served),
    Stage("chosen", 60, stages.chosen),
    Stage("rest", 600, stages.rest),
)


def run(plan: Plan, out: Path, total_s: float = TOTAL_S, stages: tuple[Stage, ...] = STAGES, device: str = "cpu") -> int:
    """Run the stages on ``device``, so called in the JSON; returns 1 when one raised, ran over its limit or found something that
    must not be."""
    begun = time.monotonic()
    decided: dict[str, str] = {}
    figures: dict[str, Any] = {}
    fixed: list[Target] = []
    aims: list[Target] = []
    bad = []
    for stage in stages:
        left = total_s - (time.monotonic() - begun)
        if left < LEAST_S:
            decided[stage.name] = "left out: the session's time is spent"
            say(f"{stage.name}: {decided[stage.name]}")
            continue
        limit = min(stage.limit_s, left)
        say(f"{stage.name}, {limit:.0f} s at most ...")
        part = _in_a_process(stage, plan, limit, out.with_name(f"{out.stem}-{stage.name}.json"))
        figures[stage.name] = part["figures"]
        decided[stage.name] = part["decided"]
        fixed += [_target(each) for each in part["fixed"]]
        aims += [_target(each) for each in part["aims"]]
        if part["failed"]:
            bad.append(stage.name)
        print(f"{stage.name}: {part['decided']}", flush=True)
        ran = {"device": device, "torch": torch.__version__, "spent_s": round(time.monotonic() - begun, 1), "failed": bad}
        write(out, ran | {"decided": decided, "figures": figures}, fixed + aims)
    print_targets(fixed + aims)
    return 1 if bad or not all(target.met for target in fixed) else 0


def _in_a_process(stage: Stage, plan: Plan, limit_s: float, path: Path) -> dict[str, Any]:
    """What a stage noted, and how it ended."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.unlink(missing_ok=True)
    # Forked: it has what is imported at once. Nothing has called CUDA in this process, and nothing may.
    process = multiprocessing.get_context("fork").Process(target=_run, args=(stage, plan, limit_s, path))
    process.start()
    try:
        process.join(limit_s + STOP_S)
        overdue = process.is_alive()
    finally:  # at Ctrl-C too, which its group does not get
        with suppress(ProcessLookupError):  # with the servers that it may have started
            os.killpg(process.pid or 0, signal.SIGKILL)
    process.join(STOP_S)  # no longer: one that waits for a broken driver does not even die
    part: dict[str, Any] = {"figures": {}, "decided": "", "fixed": [], "aims": [], "failed": False}
    if path.exists():
        part |= json.loads(path.read_text(encoding="utf-8"))
        path.unlink()
    measured = f"; measured: {', '.join(part['figures'])}" if part["figures"] else ""
    if overdue and limit_s < stage.limit_s:
        part["decided"] = f"cut off, the session's time is spent{measured}"
    elif overdue or process.exitcode:
        why = f"it hung for {limit_s + STOP_S:.0f} s" if overdue else f"its process ended with {process.exitcode}"
        part |= {"decided": f"nothing: {why}{measured}", "failed": True}
    return part


def _run(stage: Stage, plan: Plan, limit_s: float, path: Path) -> None:
    """In the stage's process, which is the first of a group of its own."""
    os.setpgrp()
    noted: dict[str, Any] = {"figures": {}, "decided": "", "fixed": [], "aims": [], "failed": False}

    def keep() -> None:
        beside = path.with_suffix(".new")
        beside.write_text(json.dumps(noted, default=asdict))
        beside.replace(path)

    def out(what: Mapping[str, Any]) -> None:
        for key, value in what.items():
            if isinstance(value, list):
                noted[key] += value
            else:
                noted[key] |= value
        keep()

    try:
        deadline = time.monotonic() + limit_s
        if plan.graphs:
            load_libraries()  # not all that ONNX Runtime is linked with comes with PyTorch
        noted["decided"] = stage.run(plan, Notes(out, deadline))
    except Exception as error:  # a stage that fails is a finding, and the others go on
        noted |= {"decided": f"nothing: {type(error).__name__}: {str(error).partition(chr(10))[0][:300]}", "failed": True}
    keep()


def _target(values: Mapping[str, Any]) -> Target:
    return Target(**values)
