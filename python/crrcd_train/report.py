"""What a study found: a Markdown table, pictures, and one HTML file that holds everything."""

from __future__ import annotations

import csv
import html
import io
import json
import math
import statistics
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from . import config as settings
from . import page, runs
from .errors import UserError, writable_folder
from .loop import METRICS
from .study import SUMMARY, TEACHER

EMBEDDED = 1500  # test images in the t-SNE maps and the pairs of the histograms


@dataclass
class Made:
    table: str
    html: Path
    pictures: list[Path]


@dataclass
class Record:
    label: str
    size: int
    seed: int
    folder: Path
    result: dict[str, Any]
    history: list[dict[str, float]]


def make(
    study: Path,
    overrides: list[str] | tuple[str, ...] = (),
    say: Callable[[str], None] = print,
) -> Made:
    """Reads the study in `study`, writes `study`/report and returns what was made.

    Raises:
        UserError: no study there, none of its runs finished, or a folder that cannot be written.
    """
    try:
        record = json.loads((study / SUMMARY).read_text(encoding="utf-8"))
    except OSError:
        raise UserError(f"{study} holds no study ({SUMMARY} is missing)") from None
    except ValueError:
        raise UserError(f"{study / SUMMARY} is damaged; run the study again") from None
    config = settings.override(settings.from_dict(record["config"]), overrides)
    records = [found for run in record["runs"] if (found := _read(study, run)) is not None]
    if not records:
        raise UserError(f"{study}: no run of this study is finished")
    output = writable_folder(study / "report")
    labels = [label for label in config.study.methods if any(r.label == label for r in records)]
    part = "test" if all("test" in r.result for r in records) else "validation"
    teacher = runs.read_result(study / TEACHER)
    text = table(records, labels, config.study.baseline, part, teacher)
    (output / "table.md").write_text(text + "\n", encoding="utf-8")
    say("report: drawing")
    pictures = _draw(study, output, records, labels, config, part, say)
    path = output / "report.html"
    path.write_text(_page(study, record, records, text, pictures, part, teacher), encoding="utf-8")
    return Made(text, path, [picture for picture, _ in pictures])


def table(
    records: list[Record],
    labels: list[str],
    baseline: str,
    part: str,
    teacher: dict[str, Any] | None = None,
) -> str:
    """Markdown: accuracy (mean, standard deviation) and paired gain over the baseline by size.

    Args:
        part: "test" or "validation".
        teacher: the teacher's result, for a row of its own.
    """
    gain = f"gain over {baseline}"
    head = ["size", "method", "seeds", f"{part}, %", f"{gain} (standard error)"]
    if part == "test":
        head += ["validation, %", f"{gain} (validation)"]
    head.append("s a run")
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    if teacher is not None and part in teacher:
        row = ["full", "teacher", "1"]
        for name in dict.fromkeys((part, "validation")):
            row += [f"{teacher[name]:.2f}", ""]
        lines.append("| " + " | ".join([*row, f"{teacher['seconds']:.0f}"]) + " |")
    for size in sorted({r.size for r in records}):
        base = {r.seed: r.result for r in records if r.size == size and r.label == baseline}
        for label in labels:
            mine = {r.seed: r.result for r in records if r.size == size and r.label == label}
            if not mine:
                continue
            row = [f"{size} x {size}", label, str(len(mine))]
            for name in dict.fromkeys((part, "validation")):
                row.append(spread([result[name] for result in mine.values()]))
                pairs = [mine[s][name] - base[s][name] for s in mine if s in base]
                row.append("" if label == baseline or not pairs else _gain(pairs))
            row.append(f"{statistics.mean(r['seconds'] for r in mine.values()):.0f}")
            lines.append("| " + " | ".join(row) + " |")
    return "\n".join(lines)


def spread(values: list[float]) -> str:
    """Mean and sample standard deviation, as in "81.21 ± 0.58"."""
    if len(values) < 2:
        return f"{values[0]:.2f}"
    return f"{statistics.mean(values):.2f} ± {statistics.stdev(values):.2f}"


def _gain(pairs: list[float]) -> str:
    mean = statistics.mean(pairs)
    if len(pairs) < 2:
        return f"{mean:+.2f}"
    return f"{mean:+.2f} ({statistics.stdev(pairs) / math.sqrt(len(pairs)):.2f})"


def _read(study: Path, run: dict[str, Any]) -> Record | None:
    folder = study / run["folder"]
    result = runs.read_result(folder)
    if result is None:
        return None
    try:
        with (folder / METRICS).open(newline="") as file:
            history = [{k: float(v) for k, v in row.items() if v} for row in csv.DictReader(file)]
    except (OSError, ValueError):
        history = []
    return Record(run["label"], run["size"], run["seed"], folder, result, history)


def _draw(
    study: Path,
    output: Path,
    records: list[Record],
    labels: list[str],
    config: settings.Config,
    part: str,
    say: Callable[[str], None],
) -> list[tuple[Path, str]]:
    try:
        from . import figures
    except ModuleNotFoundError as error:
        raise UserError(f"report needs {error.name}: pip install 'crrcd_ext[train]'") from None
    scores: dict[int, dict[str, list[float]]] = {}
    histories: figures.Histories = {}
    for r in records:
        scores.setdefault(r.size, {}).setdefault(r.label, []).append(r.result[part])
        histories.setdefault(r.size, {}).setdefault(r.label, []).append(r.history)
    panels_by_size = {f"{size} x {size} pixels": scores[size] for size in sorted(scores)}
    smallest = min(scores)
    drawn = {
        "accuracy": (
            figures.by_method(
                panels_by_size,
                labels,
                f"{part} accuracy, %",
                "Accuracy by method: seeds, mean and standard deviation",
            ),
            f"Accuracy on the {part} images. Dots are seeds, each with its own labelled images.",
        ),
        "curves": (
            figures.curves(histories, labels),
            "Cross-entropy on the training images and accuracy on the validation images.",
        ),
    }
    if any(f"{n}_loss" in row for n in settings.CONTRASTIVE for r in records for row in r.history):
        drawn["diagnostics"] = (
            figures.diagnostics(
                histories[smallest], labels, f"Collapse diagnostics at {smallest} x {smallest}"
            ),
            "Relations that collapse put the loss at its no-information value and the variance "
            "near zero.",
        )
    panels = [
        next((r for r in records if r.size == records[0].size and r.label == label), None)
        for label in (config.study.baseline, config.study.highlight)
    ]
    if None not in panels:
        drawn.update(_feature_figures(panels, config, part, say))
    found = []
    for name, (figure, caption) in drawn.items():
        path = output / f"{name}.png"
        figure.savefig(path)
        figures.plt.close(figure)
        found.append((path, caption))
    return found


def _feature_figures(
    panels: list[Record], config: settings.Config, part: str, say: Callable[[str], None]
) -> dict[str, tuple[Any, str]]:
    """t-SNE maps and cosine histograms of the same images' features under two methods."""
    import torch
    import torch.nn.functional as F
    from sklearn.manifold import TSNE

    from . import data, figures, methods

    images = data.load(config.data, lambda text: None, config.run.progress)
    device = torch.device("cpu")
    maps, histograms = [], []
    for record in panels:
        model, stored, kind = runs.load_model(record.folder, images, device, say)
        pixels, labels = runs.evaluation_images(stored, images, kind, part)
        generator = torch.Generator().manual_seed(0)
        chosen = torch.randperm(len(labels), generator=generator)[:EMBEDDED]
        labels = labels[chosen]
        logits, features = methods.predict(model, pixels[chosen])
        features = F.normalize(features - features.mean(0))
        title = f"{record.label}, {record.size} x {record.size}, seed {record.seed}"
        accuracy = methods.accuracy(logits, labels)
        perplexity = min(30.0, (len(labels) - 1) / 3)
        points = TSNE(
            init="pca", perplexity=perplexity, random_state=0, max_iter=500
        ).fit_transform(features.numpy())
        maps.append((f"{title}\n{accuracy:.1f}% of these images correct", points))
        upper = torch.triu_indices(len(labels), len(labels), 1)
        cosine = (features @ features.T)[upper[0], upper[1]]
        same = labels[upper[0]] == labels[upper[1]]
        histograms.append((title, cosine[same].numpy(), cosine[~same].numpy()))
    count = len(labels)
    return {
        "tsne": (
            figures.embeddings(
                maps, labels.numpy(), images.classes, "t-SNE of student features, test images"
            ),
            f"Features before the classifier of {count} {part} images, centred and normalised.",
        ),
        "cosines": (
            figures.cosines(histograms),
            f"All pairs of {count} {part} images: further apart is easier to tell apart.",
        ),
    }


def _page(
    study: Path,
    record: dict[str, Any],
    records: list[Record],
    text: str,
    pictures: list[tuple[Path, str]],
    part: str,
    teacher: dict[str, Any] | None,
) -> str:
    config = record["config"]
    images = config["data"]
    labelled = f"{images['labels']} labelled images" if images["labels"] else "all labelled images"
    facts = [
        f"{images['name']}, {labelled}, {record['date']}; "
        f"{len(records)} of {len(record['runs'])} student runs are finished.",
    ]
    if teacher is not None:
        shown = f"{teacher[part]:.2f} %" if part in teacher else f"{teacher['validation']:.2f} %"
        facts.append(
            f"Teacher: {config['teacher']['model']}, {teacher['parameters']:,} parameters, {shown} "
            f"({part}), trained in {teacher['seconds']:.0f} s."
        )
    minutes = record["seconds"] / 60
    facts.append(
        f"Whole study: {minutes:.1f} min on {record['versions'].get('processor', 'this machine')}."
    )
    body = io.StringIO()
    body.write(f"<h1>{html.escape(study.resolve().name)}: distillation to low resolution</h1>")
    body.write("".join(f"<p>{html.escape(fact)}</p>" for fact in facts))
    body.write(f"<h2>Accuracy</h2><div class='wide'>{page.table(text)}</div>")
    body.write(
        "<p class='note'>± is the standard deviation over seeds. Gains are paired by seed, with "
        "the standard error of their mean; of few seeds it is a rough guide. Settings are chosen "
        "on the validation images.</p>"
    )
    for path, caption in pictures:
        body.write(page.figure(path, _TITLES[path.stem], caption))
    body.write(page.provenance(record["command"], config, record["versions"]))
    return page.document(study.resolve().name, body.getvalue())


_TITLES = {
    "accuracy": "Accuracy by method",
    "curves": "Training curves",
    "diagnostics": "Collapse diagnostics",
    "tsne": "Features, mapped to the plane",
    "cosines": "Similarity of same-class and different-class pairs",
}
