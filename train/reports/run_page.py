"""A run's ``report.html``: settings, losses, digits over time, quality and time on one page that opens without a server."""

from __future__ import annotations

import base64
import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jinja2

from train.checkpoint import RESULT_FILE, Run, number_of, write_atomically
from train.config import TrainConfig
from train.data.mnist import data_name
from train.evaluation.evaluate import COLUMNS, QUALITY_FILE, shown
from train.presets import PRESETS
from train.reports.overview import Quality, Training, read_as, state_of, training_of
from train.runs import make_variable

PAGE_FILE = "report.html"
TEMPLATE = Path(__file__).with_suffix(".html")
EXTREMES = ("worst", "best")  # as evaluation draws them
# What a figure of COLUMNS means, and which is better.
MEANINGS = {
    "label_accuracy": "share of digits that the judge reads as the label that they were asked for; higher is better",
    "confident_share": "share of digits whose class the judge holds to be likelier than 0.9; higher is better",
    "class_imbalance": "how far the classes' shares are from even, in nats (Kullback-Leibler); lower is better",
    "frechet_distance": "between the judge's features of these digits and of the test images; lower is better",
    "precision": "share of digits whose features lie among the test images'; higher is better",
    "recall": "share of test images whose features lie among these digits'; higher is better",
    "nearest_training_image": "mean distance to the nearest training image; much below the real digits': they are copies",
    "classification_accuracy_score": "accuracy on the test images of a classifier trained on these digits; higher is better",
}
GRIDS = 6  # over the whole run, the first and the last among them


def write_page(run: Run) -> Path:
    """Write the page of what the run has so far, finished or not, judged or not; pictures are inside it."""
    quality = read_as(run.folder / QUALITY_FILE, Quality)
    steps, trained_for = training_of(run)
    plot = run.folder / "losses.png"
    page = rendered(
        TEMPLATE,
        name=f"{run.config.preset}, {run.folder.name}",
        which=make_variable("RUN", run.folder),
        summary=f"{state_of(run)}: {steps} steps in {trained_for}",
        quality=_quality(quality),
        losses=embedded(plot) if plot.exists() else "",
        grids=[{"source": embedded(path), "step": number_of(path)} for path in _over_time(run)],
        extremes=[{"name": name, "source": embedded(path)} for name in EXTREMES if (path := run.folder / f"{name}.png").exists()],
        activations=[{"name": path.stem, "source": embedded(path)} for path in sorted(run.folder.glob("activations/*.png"))],
        time=_time(read_as(run.folder / RESULT_FILE, Training), quality),
        settings=_settings(run.config),
        machine=_machine(run.provenance),
    )
    path = run.folder / PAGE_FILE
    write_atomically(path, lambda stream: stream.write(page))
    return path


def _quality(report: Quality | None) -> Mapping[str, Any] | None:
    if report is None:
        return None
    rows = []
    for judge, of_judge in (("first", report), ("second", report.second_judge)):
        if of_judge is not None:
            for digits, values in (("generated", of_judge.model), ("real", of_judge.real)):
                rows.append({"judge": judge, "digits": digits, "figures": [shown(values, figure) for figure in COLUMNS]})
    columns = [{"title": title, "meaning": MEANINGS[figure]} for figure, (title, _) in COLUMNS.items()]
    return {"samples": f"{report.samples:,}", "step": f"{report.step:,}", "rows": rows, "columns": columns}


def _over_time(run: Run) -> list[Path]:
    pictures = run.grids()
    if len(pictures) <= GRIDS:
        return pictures
    return [pictures[round(place * (len(pictures) - 1) / (GRIDS - 1))] for place in range(GRIDS)]


def _time(result: Training | None, quality: Quality | None) -> list[tuple[str, str]]:
    rows = []
    if result and result.steps_since_last_start and result.seconds_since_last_start:
        rows.append(("milliseconds a step", f"{result.seconds_since_last_start / result.steps_since_last_start * 1e3:.1f}"))
    if result and result.seconds is not None:
        rows.append(("training, all starts together", f"{result.seconds / 60:.1f} min"))
    if quality and quality.seconds is not None:
        rows.append(("judging, a judge's own training not counted", f"{quality.seconds / 60:.1f} min"))
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
    rows = [(name.replace("_", " "), str(value)) for name, value in provenance.items() if name not in ("data", "resumed")]
    for start in provenance.get("resumed", []):
        shown = ", ".join(f"{name.replace('_', ' ')} {value}" for name, value in start.items() if name != "step")
        rows.append((f"resumed at step {start.get('step', '?')}", shown))
    return [*rows, ("data", data_name(data)), *((f"SHA-256 of {name}", digest) for name, digest in data.items())]


def rendered(template: Path, **values: Any) -> bytes:
    """A page by its template; what the template names and is not given raises jinja2.UndefinedError."""
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined)
    return environment.from_string(template.read_text(encoding="utf-8")).render(**values).encode(errors="backslashreplace")


def embedded(path: Path) -> str:
    """A PNG as an address that holds it."""
    return "data:image/png;base64," + base64.b64encode(path.read_bytes()).decode()
