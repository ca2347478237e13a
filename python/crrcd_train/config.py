"""The settings of a study: one TOML file, overrides by dotted key, every value checked.

A field's type and default are its documentation for the machine, the comment beside it the one for
the reader. `load` never guesses: an unknown key, a wrong type or a value outside its choices is an
error that names the key and the nearest thing that exists.
"""

from __future__ import annotations

import dataclasses
import difflib
import json
import sys
import types
import typing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Union

from .errors import UserError

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

WeightSchedule = Literal["constant", "ramp-up", "ramp-down"]


@dataclass
class Data:
    # fashion-mnist, cifar10, cifar100, svhn, stl10, tiny-imagenet or folder
    name: str = "fashion-mnist"
    # Downloads are kept here; for "folder" the image folder itself, for "tiny-imagenet" its
    # unpacked archive or the folder around that.
    root: str = "data"
    source: str = "auto"  # fashion-mnist only: auto, torchvision, debian, or a folder of idx files
    system_folder: str = "/usr/share/datasets/fashion-mnist"  # where the Debian package installs
    download_seconds: int = 300  # a download that takes longer is given up
    image_size: int = 0  # edge of the teacher's images; 0 keeps the data set's own
    student_size: int = 7  # edge of the student's images
    resize: Literal["area", "bicubic"] = "area"  # how the student's images are made
    # Pictures of "folder" that cannot be read: an error, or left out and counted.
    damaged: Literal["error", "skip"] = "error"
    validation: int = 5000  # training images set aside to choose settings on
    labels: int = 1000  # labelled images that a student may use, equally many a class; 0: all
    subset: Literal["by-seed", "fixed"] = "by-seed"  # by-seed: each seed draws its own images
    flip: bool = True  # horizontal flips
    shift: int = 4  # largest shift, in pixels of the teacher's images
    shift_step: int = 2  # distance between neighbouring shifts
    cache: Literal["auto", "table", "live"] = "auto"  # table: teacher outputs computed beforehand
    cache_megabytes: int = 1024  # largest table that "auto" makes


@dataclass
class Optim:
    lr: float = 0.1  # the largest of the schedule
    momentum: float = 0.9
    nesterov: bool = True
    weight_decay: float = 5e-4
    batch_size: int = 128
    epochs: int = 120
    schedule: Literal["onecycle", "cosine", "step", "constant"] = "onecycle"
    warm_up: float = 0.25  # onecycle: share of the steps until the largest rate
    milestones: list[float] = field(default_factory=lambda: [0.5, 0.75])  # step: shares of the run
    gamma: float = 0.1  # step: factor at each milestone
    label_smoothing: float = 0.0
    clip_norm: float = 0.0  # largest gradient norm; 0: no limit


@dataclass
class Teacher:
    model: str = "resnet8"  # see models.build
    width: int = 32
    stem_stride: int = 2
    checkpoint: str = ""  # distill: the teacher's checkpoint; a study trains its own when empty
    optim: Optim = field(
        default_factory=lambda: Optim(lr=0.2, epochs=4, weight_decay=5e-4, batch_size=128)
    )


@dataclass
class Student:
    model: str = "cnn3"
    width: int = 24
    stem_stride: int = 1


@dataclass
class KD:
    weight: float = 3.0
    temperature: float = 4.0
    schedule: WeightSchedule = "constant"


@dataclass
class Contrastive:
    """What the tables [crrcd], [crd] and [crcd] share."""

    weight: float = 1.0
    schedule: WeightSchedule = "constant"
    lr_factor: float = 0.1  # heads and relation modules learn at this share of the student's rate
    # What follows goes to the loss of crrcd_ext as it is; anchors = 0 stands for all.
    negatives: int | str = 512
    embedding_dim: int = 128
    temperature: float = 0.1
    momentum: float = 0.5
    direction: Literal["student", "teacher", "both"] = "student"
    keys: Literal["stop_gradient", "live", "bank"] = "stop_gradient"
    normalizer: float | str = "first_batch"
    normalizer_momentum: float = 0.99  # of "moving_average"
    objective: Literal["nce", "infonce"] = "nce"
    head: Literal["linear", "identity"] = "linear"
    standardize: bool = True
    exclude_same_label: bool = False
    exclude_similar: float = 0.0  # a cosine of teacher embeddings; 0: no negative is left out by it
    learnable_temperature: bool = False
    max_scale: float = 100.0  # bound of a learned 1/temperature; 0: none
    learnable_offset: bool = False
    bank_dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    nonfinite: Literal["error", "skip"] = "error"
    backend: str = ""  # empty: chosen by crrcd_ext


@dataclass
class CRRCD(Contrastive):
    hidden_dim: int = 0  # 0: twice the width of the embeddings
    relation_dim: int = 0  # 0: the width of the embeddings
    init: Literal["mirrored", "gaussian"] = "mirrored"
    anchors: int = 8
    self_pairs: bool = False


@dataclass
class CRD(Contrastive):
    negative_sampling: Literal["shared", "per_sample"] = "shared"
    exclusion: Literal["mask", "draw"] = "mask"
    distinct: bool = False


@dataclass
class CRCD(CRD):
    anchors: int = 8
    self_pairs: bool = False


@dataclass
class Distill:
    """How the networks meet in the loss of crrcd_ext."""

    layers: int = 1  # of both networks the last stages, each pair of them with a loss of its own
    hard_negatives: bool = False  # of each other class the rows nearest to a sample, by the teacher


@dataclass
class Run:
    method: str = "crrcd"  # one of METHODS below
    seed: int = 0
    device: str = "auto"
    threads: int = 0  # intra-op threads of PyTorch; 0 leaves its default
    amp: Literal["off", "bfloat16", "float16"] = "off"
    validate_every: int = 10  # epochs
    test: bool = True  # false while settings are chosen: the test images stay unseen
    checkpoint_seconds: float = 20.0  # at most this much work is lost; 0: after every epoch
    tensorboard: bool = True
    progress: bool = True


@dataclass
class Variant:
    method: str = "crrcd"
    set: dict[str, Any] = field(default_factory=dict)  # dotted keys, as with --set
    sizes: list[int] = field(default_factory=list)  # only at these sizes; empty: at all


@dataclass
class Study:
    methods: list[str] = field(
        default_factory=lambda: ["ce", "kd", "crrcd", "kd+crrcd", "crrcd-shuffled"]
    )  # built-in methods and names of [study.variants]
    seeds: list[int] = field(default_factory=lambda: [0, 1, 2])
    sizes: list[int] = field(default_factory=lambda: [7, 14])
    workers: int = 2  # runs at a time, each with one thread
    baseline: str = "ce"  # gains are counted from here
    highlight: str = "crrcd"  # pictured beside the baseline
    variants: dict[str, Variant] = field(default_factory=dict)
    size_overrides: dict[str, dict[str, Any]] = field(default_factory=dict)  # by size, dotted keys


class Settings:
    """The root of a tree of dataclasses that a TOML file fills."""

    def check(self) -> None:
        """Ranges and names that types alone do not express.

        Raises:
            UserError: names the key, what was expected and what it is.
        """
        for key, value in flatten(to_dict(self)).items():
            if isinstance(value, int | float) and not isinstance(value, bool) and value < 0:
                raise UserError(f"config key {key}: expected 0 or more, got {value!r}")
            if key.endswith(".negatives") and isinstance(value, str) and value != "all":
                raise UserError(f'config key {key}: expected a number or "all", got {value!r}')

    def more_than_zero(self, keys: typing.Iterable[str]) -> None:
        flat = flatten(to_dict(self))
        for key in keys:
            if not flat[key] > 0:
                raise UserError(f"config key {key}: expected more than 0, got {flat[key]!r}")

    def one_of(self, key: str, value: str, values: typing.Sequence[str]) -> None:
        if value not in values:
            raise UserError(_unknown_value(key, value, values))


AnySettings = typing.TypeVar("AnySettings", bound=Settings)


@dataclass
class Config(Settings):
    data: Data = field(default_factory=Data)
    teacher: Teacher = field(default_factory=Teacher)
    student: Student = field(default_factory=Student)
    optim: Optim = field(default_factory=Optim)
    kd: KD = field(default_factory=KD)
    crrcd: CRRCD = field(default_factory=CRRCD)
    crd: CRD = field(default_factory=CRD)
    crcd: CRCD = field(default_factory=CRCD)
    distill: Distill = field(default_factory=Distill)
    run: Run = field(default_factory=Run)
    study: Study = field(default_factory=Study)

    def check(self) -> None:
        self.more_than_zero(_POSITIVE)
        super().check()
        self.one_of("run.method", self.run.method, METHODS)
        for name, variant in self.study.variants.items():
            self.one_of(f"study.variants.{name}.method", variant.method, METHODS)
        for name in self.study.methods:
            self.one_of("study.methods", name, [*METHODS, *self.study.variants])
        if not (self.study.methods and self.study.seeds and self.study.sizes):
            raise UserError(
                "config key study: methods, seeds and sizes each need one entry or more"
            )


CONTRASTIVE = {"crrcd": "CRRCDLoss", "crd": "CRDLoss", "crcd": "CRCDLoss"}
"""Losses of crrcd_ext by the name of their method and table."""

METHODS = (
    "ce",
    "kd",
    *(method for name in CONTRASTIVE for method in (name, f"kd+{name}", f"{name}-shuffled")),
    "kd-shuffled",
)
"""Cross-entropy alone, and what is added to it; "-shuffled" are controls."""


def terms(method: str) -> set[str]:
    """What a method adds to cross-entropy: "kd" and names of CONTRASTIVE."""
    return set(method.removesuffix("-shuffled").split("+")) - {"ce"}


_POSITIVE = {
    "data.student_size",
    "data.shift_step",
    "data.download_seconds",
    "optim.batch_size",
    "optim.epochs",
    "optim.lr",
    "teacher.width",
    "teacher.stem_stride",
    "teacher.optim.batch_size",
    "teacher.optim.epochs",
    "teacher.optim.lr",
    "student.width",
    "student.stem_stride",
    "kd.temperature",
    *(f"{name}.{key}" for name in CONTRASTIVE for key in ("temperature", "embedding_dim")),
    "distill.layers",
    "run.validate_every",
    "study.workers",
}


def load(
    path: str | Path | None,
    overrides: list[str] | tuple[str, ...] = (),
    kind: type[AnySettings] = Config,
) -> AnySettings:
    """Reads a TOML file (None: the defaults), applies `key.path=value` overrides and checks all.

    Raises:
        UserError: unreadable file, TOML syntax, unknown key, wrong type, value out of range.
    """
    table: dict[str, Any] = {}
    if path is not None:
        try:
            table = tomllib.loads(Path(path).read_text(encoding="utf-8"))
        except OSError as error:
            raise UserError(f"config file {path}: {error.strerror}") from None
        except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
            raise UserError(f"config file {path}: not valid TOML: {error}") from None
    return override(from_dict(table, kind), overrides)


def override(config: AnySettings, overrides: list[str] | tuple[str, ...] = ()) -> AnySettings:
    """Applies `key.path=value` texts to `config` and checks all of it."""
    for text in overrides:
        key, equals, value = text.partition("=")
        if not equals:
            raise UserError(f"--set {text}: expected key=value, for example --set optim.lr=0.1")
        assign(config, key.strip(), _parse_value(value.strip()))
    config.check()
    return config


def assign(config: Settings, key: str, value: Any) -> None:
    """Sets one dotted key, with the same checks as a file's."""
    *parents, leaf = key.split(".")
    node: Any = config
    walked: list[str] = []
    for name in parents:
        if isinstance(node, dict):
            if name not in node:
                raise UserError(_unknown(".".join([*walked, name]), name, list(node)))
            node = node[name]
        else:
            _known(node, name, walked)
            node = getattr(node, name)
        walked.append(name)
    if isinstance(node, dict):
        node[leaf] = value
        return
    if not dataclasses.is_dataclass(node):
        raise UserError(f"config key {key}: {'.'.join(walked)} has no keys of its own")
    _known(node, leaf, walked)
    setattr(node, leaf, _convert(_hints(type(node))[leaf], value, key))


def with_values(config: AnySettings, values: dict[str, Any]) -> AnySettings:
    """A checked copy of `config` with dotted keys replaced."""
    copy = from_dict(to_dict(config), type(config))
    for key, value in values.items():
        assign(copy, key, value)
    copy.check()
    return copy


def to_dict(config: Settings) -> dict[str, Any]:
    return dataclasses.asdict(typing.cast(Any, config))


def from_dict(table: dict[str, Any], kind: type[AnySettings] = Config) -> AnySettings:
    return _build(kind, table, "")


def flatten(table: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested tables as one table with dotted keys."""
    flat: dict[str, Any] = {}
    for key, value in table.items():
        if isinstance(value, dict):
            flat.update(flatten(value, f"{prefix}{key}."))
        else:
            flat[prefix + key] = value
    return flat


def differences(old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    """`key: old -> new` for each dotted key in which two configurations differ."""
    before, after = flatten(old), flatten(new)
    return [
        f"{key}: {before.get(key, 'absent')!r} -> {after.get(key, 'absent')!r}"
        for key in sorted(before.keys() | after.keys())
        if before.get(key) != after.get(key)
    ]


def _build(kind: type, table: dict[str, Any], prefix: str) -> Any:
    if not isinstance(table, dict):
        raise UserError(f"config key {prefix.rstrip('.')}: expected a table, got {table!r}")
    result = kind()
    hints = _hints(kind)
    for key, value in table.items():
        _known(result, key, prefix.rstrip(".").split(".") if prefix else [])
        hint = hints[key]
        if dataclasses.is_dataclass(hint):
            # Values that a file leaves out keep the parent's default, not the nested class's.
            merged = {**dataclasses.asdict(getattr(result, key)), **_table(value, prefix + key)}
            setattr(result, key, _build(hint, merged, f"{prefix}{key}."))
        else:
            setattr(result, key, _convert(hint, value, prefix + key))
    return result


def _table(value: Any, key: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise UserError(f"config key {key}: expected a table, got {value!r}")
    return value


def _hints(kind: type) -> dict[str, Any]:
    return typing.get_type_hints(kind)


def _known(node: Any, name: str, walked: list[str]) -> None:
    names = [f.name for f in dataclasses.fields(node)] if dataclasses.is_dataclass(node) else []
    if name not in names:
        raise UserError(_unknown(".".join([*walked, name]), name, names))


def _unknown(key: str, name: str, names: list[str]) -> str:
    near = difflib.get_close_matches(name, names, n=1, cutoff=0.5)
    parent = key.rpartition(".")[0]
    hint = f"did you mean {parent + '.' if parent else ''}{near[0]}?" if near else ""
    return f"unknown config key {key}; " + (hint or f"known here: {', '.join(names)}")


def _unknown_value(key: str, value: str, values: typing.Sequence[str]) -> str:
    near = difflib.get_close_matches(value, values, n=1, cutoff=0.5)
    hint = f"; did you mean {near[0]!r}?" if near else ""
    return f"config key {key}: expected one of {', '.join(values)}, got {value!r}{hint}"


def _convert(hint: Any, value: Any, key: str) -> Any:
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if hint is Any:
        return value
    if origin is Literal:
        if value not in arguments:
            raise UserError(_unknown_value(key, str(value), [str(a) for a in arguments]))
        return value
    if origin is list:
        if not isinstance(value, list):
            raise UserError(f"config key {key}: expected a list, got {value!r}")
        return [_convert(arguments[0], item, key) for item in value]
    if origin is dict:
        return {
            name: _convert(arguments[1], item, f"{key}.{name}")
            for name, item in _table(value, key).items()
        }
    if dataclasses.is_dataclass(hint):
        return _build(hint, _table(value, key), f"{key}.")
    kinds = arguments if origin in (Union, types.UnionType) else (hint,)
    if isinstance(value, bool) and bool not in kinds:
        kinds = ()
    for kind in kinds:
        if isinstance(value, kind):
            return value
    if float in kinds and isinstance(value, int):
        return float(value)
    names = " or ".join(k.__name__ for k in (arguments if origin else (hint,)))
    raise UserError(f"config key {key}: expected {names}, got {json.dumps(value, default=str)}")


def _parse_value(text: str) -> Any:
    """A TOML value, or the bare text when it is none, so that strings need no quotes."""
    try:
        return tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        return text
