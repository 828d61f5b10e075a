"""A run's ``report.html``: settings, losses, digits over time, quality and time on one page that opens without a server."""

from __future__ import annotations

import base64
import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jinja2

from train.checkpoint import RESULT_FILE, Run, write_atomically
from train.config import PRESETS, TrainConfig
from train.evaluation.evaluate import COLUMNS, QUALITY_FILE, shown
from train.reports.overview import read_json, state_of, training_of

PAGE_FILE = "report.html"
TEMPLATE = Path(__file__).with_suffix(".html")
GRIDS = 6  # over the whole run, the first and the last among them


def write_page(run: Run) -> Path:
    """Write the page of what the run has so far, finished or not, judged or not; pictures are inside it."""
    result = read_json(run.folder / RESULT_FILE)
    steps, trained_for = training_of(run)
    plot = run.folder / "losses.png"
    page = rendered(
        TEMPLATE,
        name=f"{run.config.preset}, {run.folder.name}",
        folder=run.folder,
        summary=f"{state_of(run)}: {steps} steps in {trained_for}",
        quality=_quality(read_json(run.folder / QUALITY_FILE)),
        losses=embedded(plot) if plot.exists() else "",
        grids=[{"source": embedded(path), "step": int(path.stem.removeprefix("fake-"))} for path in _over_time(run)],
        time=_time(result, read_json(run.folder / QUALITY_FILE)),
        settings=_settings(run.config),
        machine=_machine(run.provenance),
    )
    path = run.folder / PAGE_FILE
    write_atomically(path, lambda stream: stream.write(page))
    return path


def _quality(report: Mapping[str, Any]) -> Mapping[str, Any] | None:
    if not report:
        return None
    rows = []
    for judge, of_judge in (("first", report), ("second", report.get("second_judge"))):
        for digits, side in (("generated", "model"), ("real", "real")):
            if of_judge:
                values = of_judge[side]
                rows.append({"judge": judge, "digits": digits, "figures": [shown(values, figure) for figure in COLUMNS]})
    return {"samples": f"{report['samples']:,}", "step": f"{report['step']:,}", "rows": rows,
            "titles": [title for title, _ in COLUMNS.values()]}  # fmt: skip


def _over_time(run: Run) -> list[Path]:
    pictures = sorted(run.pictures.glob("fake-*.png"))
    if len(pictures) <= GRIDS:
        return pictures
    return [pictures[round(place * (len(pictures) - 1) / (GRIDS - 1))] for place in range(GRIDS)]


def _time(result: Mapping[str, Any], quality: Mapping[str, Any]) -> list[tuple[str, str]]:
    rows = []
    if (steps := result.get("steps_since_last_start")) and (seconds := result.get("seconds_since_last_start")):
        rows.append(("milliseconds a step", f"{seconds / steps * 1e3:.1f}"))
    if (seconds := result.get("seconds")) is not None:
        rows.append(("training, all starts together", f"{seconds / 60:.1f} min"))
    if (seconds := quality.get("seconds")) is not None:
        rows.append(("judging, a judge's own training not counted", f"{seconds / 60:.1f} min"))
    return rows


def _settings(config: TrainConfig) -> list[dict[str, Any]]:
    defaults = PRESETS.get(config.preset, config)
    rows = []
    for spec in dataclasses.fields(config):
        value = getattr(config, spec.name)
        shown = ", ".join(map(str, value)) if isinstance(value, tuple) else str(value)
        changed = value != getattr(defaults, spec.name)
        rows.append({"name": spec.name, "value": shown, "meaning": spec.metadata["help"], "changed": changed})
    return rows


def _machine(provenance: Mapping[str, Any]) -> list[tuple[str, str]]:
    data = provenance.get("data", {})
    return [(name.replace("_", " "), str(value)) for name, value in provenance.items() if name != "data"] + [
        (f"SHA-256 of {name}", digest) for name, digest in data.items()
    ]


def rendered(template: Path, **values: Any) -> bytes:
    """A page by its template; what the template names and is not given raises jinja2.UndefinedError."""
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined)
    return environment.from_string(template.read_text()).render(**values).encode()


def embedded(path: Path) -> str:
    """A PNG as an address that holds it."""
    return "data:image/png;base64," + base64.b64encode(path.read_bytes()).decode()
