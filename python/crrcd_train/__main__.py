"""The command line, crrcd-train: studies, single runs, and students for one's own pictures."""

from __future__ import annotations

import argparse
import functools
import shlex
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from . import config as settings
from .errors import Interrupted, UserError

EPILOG = """examples:
  crrcd-train faces --output runs/faces
  crrcd-train study python/studies/demo.toml --output runs/demo
  crrcd-train embed photos --teacher mynet.py:embed --output runs/mine
  crrcd-train match runs/mine small.png
  crrcd-train teacher --output runs/teacher
  crrcd-train distill --method kd --set teacher.checkpoint=runs/teacher --output runs/kd
  crrcd-train evaluate runs/kd
  crrcd-train report runs/demo
"""

_GRIDS = ("study", "faces", "sweep")  # go on by themselves where they stopped


def parser() -> argparse.ArgumentParser:
    main = argparse.ArgumentParser(
        prog="crrcd-train",
        description="Trains low-resolution students with CRRCD and its baselines.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = main.add_subparsers(dest="command", required=True, metavar="COMMAND")
    texts = {
        "faces": "small faces against a gallery of large ones, then the report",
        "sweep": "negatives and temperature of the losses: 'faces' or 'classification'",
        "teacher": "train the teacher on full-resolution images",
        "distill": "train one student with run.method",
        "study": "run a whole grid of methods, seeds and sizes, then the report",
    }
    for name, text in texts.items():
        command = commands.add_parser(name, help=text, description=text)
        if name == "sweep":
            command.add_argument("task", choices=("faces", "classification"))
        told = "settings as a TOML file"
        if name == "study":
            told += "; 'unseen': the study of held-out classes, its settings with --config"
        command.add_argument("file", nargs="?", metavar="CONFIG", help=told)
        command.add_argument("--config", metavar="FILE", help="the same, as an option")
        if name == "distill":
            command.add_argument(
                "--method",
                metavar="NAME",
                help="the same as --set run.method=NAME: " + ", ".join(settings.METHODS),
            )
        _add_set(command)
        command.add_argument("--output", required=True, metavar="DIR", help="folder for results")
        command.add_argument(
            "--resume",
            action="store_true",
            help="go on from the checkpoint in the output folder"
            + (" (always done here)" if name in _GRIDS else ""),
        )
        command.add_argument(
            "--fresh", action="store_true", help="discard what the output folder holds of this run"
        )
    text = "train a student for your pictures and your teacher"
    command = commands.add_parser("embed", help=text, description=text)
    command.add_argument("pictures", metavar="PICTURES", help="a folder, with or without classes")
    command.add_argument(
        "--teacher",
        required=True,
        metavar="MODULE:FUNCTION",
        help="takes a list of PIL images, returns an array [N, D]; FILE.py:FUNCTION or dlib",
    )
    command.add_argument("--size", type=int, metavar="PIXELS", help="of the student's pictures (8)")
    command.add_argument("--config", metavar="FILE", help="settings as a TOML file")
    _add_set(command)
    command.add_argument("--output", required=True, metavar="DIR", help="folder for results")
    command.add_argument("--fresh", action="store_true", help="replace what the folder holds")
    text = "find small pictures in the gallery of an 'embed' folder"
    command = commands.add_parser("match", help=text, description=text)
    command.add_argument("folder", metavar="DIR", help="what 'embed' wrote")
    command.add_argument("pictures", nargs="+", metavar="PICTURE", help="image files")
    command.add_argument("--gallery", metavar="FILE", help="another gallery of the same teacher")
    command.add_argument("--count", type=int, default=3, metavar="K", help="hits to show (3)")
    for name, text in {
        "evaluate": "accuracy of a trained network on validation and test images",
        "report": "tables, figures and one HTML file from a study's folder",
    }.items():
        command = commands.add_parser(name, help=text, description=text)
        command.add_argument("folder", nargs="?", metavar="DIR", help="the folder to read")
        command.add_argument("--output", metavar="DIR", help="the same, as an option")
        _add_set(command)
    return main


def _add_set(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--set",
        nargs="+",
        action="extend",
        default=[],
        metavar="KEY=VALUE",
        help="override settings, for example --set optim.lr=0.1 data.labels=500",
    )


def main(arguments: list[str] | None = None) -> int:
    """Runs one command. Exit codes: 0 done, 2 a mistake told in one line, 130 interrupted."""
    arguments = sys.argv[1:] if arguments is None else arguments
    options = parser().parse_args(arguments)
    try:
        if options.command in ("evaluate", "report"):
            return _read_back(options)
        command = shlex.join(["crrcd-train", *arguments])
        if options.command == "study" and options.file == "unseen":
            return _unseen(options, command)
        if options.command in _OTHERS:
            return _OTHERS[options.command](options, command)
        return _train(options, command)
    except UserError as error:
        print(f"crrcd-train: error: {error}", file=sys.stderr)
        return 2
    except Interrupted as stop:
        hint = "" if options.command in _GRIDS else " with --resume"
        print(f"\ncrrcd-train: {stop}; run the same command again{hint} to go on", file=sys.stderr)
        return 130
    except KeyboardInterrupt:
        print("\ncrrcd-train: interrupted", file=sys.stderr)
        return 130


def _train(options: argparse.Namespace, command: str) -> int:
    if options.file and options.config:
        raise UserError("the config file was given twice: once bare, once with --config")
    method = getattr(options, "method", None)
    overrides = [*options.set, *([f"run.method={method}"] if method else [])]
    config = settings.load(options.config or options.file, overrides)
    output = Path(options.output)
    # Imported late: what is wrong with the settings is said before PyTorch is loaded.
    from . import data, interrupt, methods, runs, study
    from .errors import writable_folder
    from .progress import Bar, say

    writable_folder(output)
    started = time.monotonic()
    if options.command == "study":
        from . import report

        study.run(config, output, fresh=options.fresh, command=command)
        made = report.make(output, say=say)
        print(f"\n{made.table}\nreport: {made.html}")
        print(f"time of this call: {_duration(time.monotonic() - started)}")
        return 0
    if config.run.threads:
        import torch

        torch.set_num_threads(config.run.threads)
    if options.fresh:
        runs.clear(output)
    if options.command == "distill" and methods.uses_teacher(config.run.method):
        runs.teacher_checkpoint(config)  # said before a data set is downloaded
    images = data.load(config.data, say, config.run.progress)
    train = runs.train_teacher if options.command == "teacher" else runs.train_student
    label = "teacher" if options.command == "teacher" else config.run.method
    with interrupt.on_signals():
        result = train(
            config,
            images,
            output,
            resume=options.resume,
            watcher=Bar(label, config.run.progress),
            say=say,
        )
    accuracies = [
        f"{part} {result[part]:.2f} %" for part in ("validation", "test") if part in result
    ]
    print(f"{label}: {', '.join(accuracies)}; {_duration(result['seconds'])}; in {output}")
    return 0


def _faces(options: argparse.Namespace, command: str) -> int:
    from . import faces, faces_report

    return _grid(options, command, faces.FacesConfig, faces.run, faces_report.make)


def _sweep(options: argparse.Namespace, command: str) -> int:
    from . import sweep

    kind = sweep.KINDS[options.task]
    report = functools.partial(sweep.report, command=command)
    return _grid(options, command, kind, sweep.run, report, with_config=True)


def _unseen(options: argparse.Namespace, command: str) -> int:
    from . import unseen

    options.file = None  # the word that chose this study
    return _grid(options, command, unseen.UnseenConfig, unseen.run, unseen.report)


def _grid(
    options: argparse.Namespace,
    command: str,
    kind: type,
    run: Callable[..., None],
    report: Callable[..., Any],
    with_config: bool = False,
) -> int:
    """Runs a study that goes on by itself where it stopped, then its report."""
    from .progress import say

    config = settings.load(options.config or options.file, options.set, kind)
    output = Path(options.output)
    started = time.monotonic()
    run(config, output, fresh=options.fresh, command=command)
    made = report(*([config] if with_config else []), output, say=say)
    print(f"\n{made.table}\nreport: {made.html}")
    print(f"time of this call: {_duration(time.monotonic() - started)}")
    return 0


def _embed(options: argparse.Namespace, command: str) -> int:
    from . import embed, interrupt
    from .progress import Bar, say

    values = {
        "embed.pictures": options.pictures,
        "embed.teacher": options.teacher,
        **({"embed.size": options.size} if options.size is not None else {}),
    }
    overrides = [*(f"{key}={value}" for key, value in values.items()), *options.set]
    config = settings.load(options.config, overrides, embed.EmbedConfig)
    output = Path(options.output)
    with interrupt.on_signals():
        result = embed.fit(
            config,
            output,
            fresh=options.fresh,
            command=command,
            watcher=Bar("student", config.embed.progress),
            say=say,
        )
    print(f"\n{embed.table(result)}\nreport: {embed.report(output, result)}")
    print(f"student and gallery: {output}; time of this call: {_duration(result['seconds'])}")
    return 0


def _match(options: argparse.Namespace, command: str) -> int:
    from . import embed, pictures

    if options.count < 1:
        raise UserError(f"match: --count: expected 1 or more, got {options.count}")
    matcher = embed.Matcher(options.folder, options.gallery)
    images = [pictures.open_image(Path(path)) for path in options.pictures]
    for path, found in zip(options.pictures, matcher(images, options.count), strict=True):
        print(path)
        for match in found:
            print(f"  {match.cosine:6.3f}  {match.name}")
    return 0


_OTHERS = {"faces": _faces, "sweep": _sweep, "embed": _embed, "match": _match}


def _read_back(options: argparse.Namespace) -> int:
    if bool(options.folder) == bool(options.output):
        raise UserError(f"{options.command}: name the folder to read, once")
    folder = Path(options.folder or options.output)
    if not folder.exists():
        raise UserError(f"{options.command}: no folder {folder}")
    from .progress import say

    if options.command == "report":
        from . import faces, faces_report, report, unseen

        if (folder / unseen.SUMMARY).exists():
            made = unseen.report(folder, say=say)
        else:
            maker = faces_report if (folder / faces.SUMMARY).exists() else report
            made = maker.make(folder, options.set, say=say)
        print(f"\n{made.table}\nreport: {made.html}")
        return 0
    from . import checkpoint, data, evaluate, methods, runs

    path = folder / checkpoint.FILE if folder.is_dir() else folder
    stored = settings.from_dict(checkpoint.load(path, say)["config"])
    config = settings.override(stored, options.set)
    images = data.load(config.data, say, config.run.progress)
    result = evaluate.evaluate(folder, images, config, methods.pick_device(config.run.device))
    if folder.is_dir():
        runs.write_json(folder / "evaluation.json", result)
    print(f"{result['kind']}: validation {result['validation']:.2f} %, test {result['test']:.2f} %")
    for name, share in result["test_by_class"].items():
        print(f"  {name:<20} {share:6.2f} %")
    return 0


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest} s" if minutes else f"{rest} s"


if __name__ == "__main__":
    sys.exit(main())
