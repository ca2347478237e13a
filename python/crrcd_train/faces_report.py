"""What the faces' study found: tables, pictures, a page for each person, one HTML file of all."""

from __future__ import annotations

import html
import math
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from . import checkpoint, faces, page, retrieval, runs
from . import config as settings
from .errors import UserError, writable_folder
from .report import Made, spread

Results = dict[tuple[int, int], dict[str, dict[int, dict[str, Any]]]]
"""Results by (size, enrolled pictures), then method, then split."""

NAMES = {
    "teacher": "teacher, scaled-up probes",
    "ridge": "ridge regression from pixels",
    "cosine": "cosine regression",
    "cosine+rkd": "cosine regression + RKD",
    "crd": "CRD",
    "crcd": "CRCD",
    "crrcd": "CRRCD, FRM",
    "crrcd-difference": "CRRCD, difference",
    "ce": "cross-entropy with labels",
}
HITS = 3
"""Gallery entries that a person's page shows of each method."""


def make(
    output: Path,
    overrides: list[str] | tuple[str, ...] = (),
    say: Callable[[str], None] = print,
) -> Made:
    """Reads the study in `output`, writes `output`/report and returns what was made.

    Raises:
        UserError: no study there, no result in it, or a folder that cannot be written.
    """
    record = runs.read_json(output / faces.SUMMARY)
    if record is None:
        raise UserError(f"{output} holds no study of faces ({faces.SUMMARY} is missing or damaged)")
    config = settings.override(
        settings.from_dict(record["config"], faces.FacesConfig), list(overrides)
    )
    results = read(config, output)
    if not results:
        raise UserError(f"{output}: no result of this study is there")
    report = writable_folder(output / "report")
    table, gains = tables(results, config)
    text = f"{table}\n\n{gains}"
    (report / "table.md").write_text(text + "\n", encoding="utf-8")
    say("report: drawing")
    pictures = _draw(config, output, report, results)
    pages = _people(config, output, writable_folder(report / "people"))
    path = report / "report.html"
    path.write_text(
        _page(output, record, config, _warnings(results), table, gains, pictures, pages),
        encoding="utf-8",
    )
    return Made(text, path, [picture for picture, _, _ in pictures] + [p for p, _ in pages])


def read(config: faces.FacesConfig, output: Path) -> Results:
    found: Results = {}
    wanted = config.faces
    for size in wanted.sizes:
        for enrolled in wanted.per_person:
            for method in wanted.methods:
                for number in range(wanted.first_split, wanted.first_split + wanted.splits):
                    path = faces.folder(output, size, enrolled, number) / f"{method}.json"
                    result = runs.read_json(path)
                    if result is not None:
                        found.setdefault((size, enrolled), {}).setdefault(method, {})[number] = (
                            result
                        )
    return found


def tables(results: Results, config: faces.FacesConfig) -> tuple[str, str]:
    """Markdown: every method's numbers, and paired differences to the baseline and to cosine."""
    sizes = sorted({size for size, _ in results})
    numbers = sorted({enrolled for _, enrolled in results}, reverse=True)
    head = [
        "pixels",
        "method",
        *(f"n = {n}: rank-1 / TAR, %" for n in numbers),
        "AUC, %",
        "s a run",
    ]
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    for size in sizes:
        for method in config.faces.methods:
            cells, last = [], []
            for n in numbers:
                mine = list(results.get((size, n), {}).get(method, {}).values())
                cells.append(
                    f"{spread([r['rank1'] for r in mine])} / {spread([r['tar'] for r in mine])}"
                    if mine
                    else ""
                )
                last = mine or last
            if not last:
                continue
            aucs = [
                f"{statistics.mean(r['auc'] for r in mine.values()):.2f}"
                for n in numbers
                if (mine := results.get((size, n), {}).get(method))
            ]
            seconds = statistics.mean(r["seconds"] for r in last)
            row = [f"{size} x {size}", NAMES.get(method, method), *cells, ", ".join(aucs)]
            lines.append("| " + " | ".join([*row, f"{seconds:.1f}"]) + " |")
    rivals = [name for name in config.faces.rivals if name in config.faces.methods]
    head = ["pixels", "difference", *(f"n = {n}: rank-1 / TAR, points" for n in numbers)]
    gains = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    for size in sizes:
        for method in config.faces.methods:
            for rival in rivals:
                # Rivals meet each other once.
                if method in faces.CLOSED or method in rivals[: rivals.index(rival) + 1]:
                    continue
                cells = [_paired(results.get((size, n), {}), method, rival) for n in numbers]
                if any(cells):
                    title = f"{NAMES.get(method, method)} - {NAMES.get(rival, rival)}"
                    gains.append("| " + " | ".join([f"{size} x {size}", title, *cells]) + " |")
    return "\n".join(lines), "\n".join(gains)


def _paired(found: dict[str, dict[int, dict[str, Any]]], method: str, rival: str) -> str:
    """ "+1.20 (0.30) / +2.00 (0.40)": mean difference over splits and its standard error."""
    mine, theirs = found.get(method, {}), found.get(rival, {})
    both = sorted(mine.keys() & theirs.keys())
    if not both:
        return ""
    cells = []
    for key in ("rank1", "tar"):
        if key == "tar" and "ce" in (method, rival):
            cells.append("not comparable")  # "ce" scores persons, the others pictures
            continue
        pairs = [mine[s][key] - theirs[s][key] for s in both]
        error = f" ({statistics.stdev(pairs) / math.sqrt(len(pairs)):.2f})" if pairs[1:] else ""
        cells.append(f"{statistics.mean(pairs):+.2f}{error}")
    return " / ".join(cells)


def _draw(
    config: faces.FacesConfig, output: Path, report: Path, results: Results
) -> list[tuple[Path, str, str]]:
    try:
        from . import figures
    except ModuleNotFoundError as error:
        raise UserError(f"report needs {error.name}: pip install 'crrcd_ext[train]'") from None
    labels = config.faces.methods
    small = min(size for size, _ in results)
    numbers = sorted(n for size, n in results if size == small)
    drawn: dict[str, tuple[Any, str, str]] = {}
    for size in sorted({size for size, _ in results}):
        for key, unit in (("rank1", "rank-1, %"), ("tar", "TAR at 1 % FAR, %")):
            panels = {
                f"{n} enrolled a person": {
                    method: [r[key] for r in mine.values()]
                    for method, mine in results[size, n].items()
                }
                for n in sorted(n for s, n in results if s == size)
            }
            drawn[f"{key}-{size}"] = (
                figures.by_method(
                    panels, labels, unit, f"Probes of {size} x {size} pixels: {unit}"
                ),
                f"{unit.removesuffix(', %')}, {size} x {size}",
                "Dots are splits of the pictures into enrolled ones and probes, the bar is their "
                "mean, the whisker one standard deviation.",
            )
    rocs = {
        f"{n} enrolled a person": {
            method: np.array([r["roc"] for r in mine.values()])
            for method, mine in results[small, n].items()
        }
        for n in numbers
    }
    drawn["roc"] = (
        figures.roc(
            rocs, retrieval.FAR_GRID, labels, f"Verification at {small} x {small}: mean over splits"
        ),
        "ROC",
        "Pairs of a probe and a gallery picture (for cross-entropy, of a probe and a person); the "
        "dotted line is the false accept rate of the tables.",
    )
    middle = numbers[len(numbers) // 2]
    histories = {
        method: [r["history"] for r in mine.values() if "history" in r]
        for method, mine in results[small, middle].items()
    }
    if any(
        key.endswith("_loss") for h in histories.values() for r in h for row in r for key in row
    ):
        drawn["diagnostics"] = (
            figures.diagnostics(
                histories, labels, f"{small} x {small}, {middle} enrolled a person", by="step"
            ),
            "Collapse diagnostics",
            "Mean over splits. Relations that collapse put the loss at its no-information value "
            "and the variance near zero.",
        )
    drawn.update(_spaces(config, output, small, middle))
    found = []
    for name, (figure, title, caption) in drawn.items():
        path = report / f"{name}.png"
        figure.savefig(path)
        figures.plt.close(figure)
        found.append((path, title, caption))
    return found


def _kept(
    config: faces.FacesConfig, output: Path, size: int, enrolled: int, method: str
) -> dict[str, Any] | None:
    """What the first split left for pictures."""
    path = faces.folder(output, size, enrolled, config.faces.first_split) / f"{method}.pt"
    return checkpoint.load(path) if checkpoint.exists(path) else None


def _spaces(
    config: faces.FacesConfig, output: Path, size: int, enrolled: int
) -> dict[str, tuple[Any, str, str]]:
    """t-SNE maps and histograms of cosines of the same probes under two methods."""
    from sklearn.manifold import TSNE

    from . import figures

    own = faces.material(config, output)
    maps, histograms = [], []
    for method in (config.faces.baseline, config.faces.highlight):
        kept = _kept(config, output, size, enrolled, method)
        if kept is None or "scores" not in kept:
            return {}
        embedded, probes, gallery = kept["embedded"], kept["probes"], kept["gallery"]
        labels = own.people.labels
        count = len(embedded)
        points = TSNE(
            init="pca", perplexity=min(30.0, (count - 1) / 3), random_state=0, max_iter=500
        ).fit_transform(embedded.numpy())
        title = f"{NAMES.get(method, method)}, {size} x {size}, n = {enrolled}"
        maps.append((title, points))
        same = labels[probes][:, None] == labels[gallery]
        scores = kept["scores"]
        histograms.append((title, scores[same].numpy(), scores[~same].numpy()))
    return {
        "tsne": (
            figures.embeddings(
                maps,
                labels[probes].numpy(),
                own.people.persons,
                f"t-SNE of {count} probes, a colour for each of {len(own.people.persons)} persons",
            ),
            "Probes, mapped to the plane",
            "Embeddings of the same small probes by two students; colours repeat nearly, what "
            "counts is how tight the groups of one colour are.",
        ),
        "cosines": (
            figures.cosines(histograms, "person", "embeddings"),
            "Similarity of same and different persons",
            "Every probe with every gallery picture: a small picture embedded by the student, a "
            "large one by the teacher. Further apart is easier to tell apart.",
        ),
    }


def _people(config: faces.FacesConfig, output: Path, folder: Path) -> list[tuple[Path, str]]:
    """A picture for each person: probes and the first hits by the teacher and by the student."""
    from . import figures

    size, enrolled = min(config.faces.sizes), max(config.faces.per_person)
    methods = [name for name in ("teacher", config.faces.highlight) if name in config.faces.methods]
    kept = {name: _kept(config, output, size, enrolled, name) for name in methods}
    kept = {name: found for name, found in kept.items() if found and "scores" in found}
    if not kept:
        return []
    own = faces.material(config, output)
    first = next(iter(kept.values()))
    gallery, probes, labels = first["gallery"], first["probes"], own.people.labels
    found = []
    for person, name in enumerate(own.people.persons):
        rows = (labels[probes] == person).nonzero().flatten().tolist()
        shown = [_small(own, int(probes[row]), size, config) for row in rows]
        columns = []
        wrong = []
        for method, what in kept.items():
            entries = []
            for row in rows:
                top = what["scores"][row].topk(min(HITS, len(gallery)))
                entries.append(
                    [
                        (
                            _image(own.canvases[gallery[at]]),
                            own.people.persons[int(labels[gallery[at]])],
                            int(labels[gallery[at]]) == person,
                            float(value),
                        )
                        for value, at in zip(top.values, top.indices.tolist(), strict=True)
                    ]
                )
            right = sum(entry[0][2] for entry in entries)
            wrong.append(f"{NAMES.get(method, method)} {right} of {len(rows)}")
            columns.append((f"{NAMES.get(method, method)}: first {HITS}", entries))
        title = f"{name}: {', '.join(wrong)} right"
        figure = figures.hits(shown, columns, title)
        path = folder / f"{name}.jpg"
        figure.savefig(path, dpi=80)
        figures.plt.close(figure)
        found.append((path, title))
    return found


def _image(canvas: torch.Tensor) -> np.ndarray:
    """[C, H, W] bytes as matplotlib wants them."""
    return (canvas[0] if len(canvas) == 1 else canvas.permute(1, 2, 0)).numpy()


def _small(own: faces.Material, row: int, size: int, config: faces.FacesConfig) -> np.ndarray:
    from .data import resize

    return _image(resize(own.canvases[row : row + 1], size, config.pixels.resize)[0])


def _warnings(results: Results) -> list[str]:
    """A line for each method whose loss complained, with the first complaint."""
    found: dict[str, list[str]] = {}
    for by_method in results.values():
        for method, mine in by_method.items():
            found.setdefault(method, []).extend(
                r["warnings"][0] for r in mine.values() if r.get("warnings")
            )
    return [
        f"Warning, {method}, in {len(texts)} runs: {texts[0]}"
        for method, texts in found.items()
        if texts
    ]


def _page(
    output: Path,
    record: dict[str, Any],
    config: faces.FacesConfig,
    warned: list[str],
    table: str,
    gains: str,
    pictures: list[tuple[Path, str, str]],
    pages: list[tuple[Path, str]],
) -> str:
    wanted = config.faces
    missing = len(record["undetected"])
    use = "used centred" if wanted.undetected == "centred" else "left out"
    damaged = record.get("damaged", 0)
    skipped = f" ({damaged} damaged ones left out)" if damaged else ""
    facts = [
        f"{record['pictures']} pictures of {record['persons']} persons{skipped}, "
        f"{record['date']}; "
        f"{wanted.splits} splits. Each person is enrolled with n pictures, embedded by the frozen "
        f"teacher ({record['teacher'].split()[0]}) at full size; probes are {wanted.probes} other "
        "pictures each, at the size of the first column. Students saw the enrolled pictures "
        "only, without labels (but for cross-entropy). The people are enrolled ones: nothing here "
        "says how strangers fare.",
        f"No face was detected on {missing} pictures, which were {use}"
        + (f": {', '.join(record['undetected'])}." if missing else "."),
        f"Whole study: {record['seconds'] / 60:.1f} min on "
        f"{record['versions'].get('processor', 'this machine')}.",
    ]
    facts += warned
    body = [f"<h1>{html.escape(output.resolve().name)}: small faces, large gallery</h1>"]
    body += [f"<p>{html.escape(fact)}</p>" for fact in facts]
    body.append(f"<h2>Recognition</h2><div class='wide'>{page.table(table)}</div>")
    body.append(
        "<p class='note'>± is the standard deviation over splits. TAR: true accept rate at 1 % "
        "false accept rate, over pairs of a probe and a gallery picture; for cross-entropy, which "
        "has no embedding in the gallery's space, over pairs of a probe and a person. AUC in the "
        "order of the columns.</p>"
    )
    body.append(f"<h2>Paired differences</h2><div class='wide'>{page.table(gains)}</div>")
    body.append(
        "<p class='note'>Mean over splits, in brackets its standard error. Splits share "
        "pictures, so errors are rough; less than two of them is no difference.</p>"
    )
    body += [page.figure(path, title, caption) for path, title, caption in pictures]
    if pages:
        body.append(
            "<h2>Every person</h2><p class='note'>Probes of the first split and the gallery "
            "pictures they came closest to, with the cosine. Solid frame: the right "
            "person; broken frame: somebody else.</p>"
        )
        body += [page.figure(path, path.stem, title, "h3") for path, title in pages]
    body.append(page.provenance(record["command"], record["config"], record["versions"]))
    return page.document(output.resolve().name, "".join(body))
