"""What the benchmarks have in common: cases, turns in one process, agreement, limits, the run."""

from __future__ import annotations

import argparse
import math
import sys
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any, ClassVar

import torch

from bench import machine
from bench.measure import Copy, Limit, Meter, interleave, time_once
from bench.memory import peak_extra_memory
from bench.steps import CHUNKS, EXCLUDING, OPERATOR, Problem, Step


class Absent(RuntimeError):
    """A variant that this installation cannot run; the message says what would help."""


@dataclass(frozen=True)
class Case(ABC):
    """One problem to be solved by all variants: a shape and options named by strings.

    That is all a fresh process needs to make it again.
    """

    shape: Any

    command: ClassVar[str]  # bench.COMMAND holds the class, under the name Case
    shape_type: ClassVar[type]
    # name -> (how the negatives are gone through, compiled), see bench/steps.py
    baselines: ClassVar[Mapping[str, tuple[str, bool]]]

    @classmethod
    def option_names(cls) -> list[str]:
        return [field.name for field in fields(cls) if field.name != "shape"]

    @property
    def options(self) -> dict[str, str]:
        return {name: getattr(self, name) for name in self.option_names()}

    def as_dict(self) -> dict[str, object]:
        return {"shape": asdict(self.shape), **self.options}

    @classmethod
    def from_dict(cls, stored: Mapping[str, Any]) -> Case:
        options = {name: stored[name] for name in cls.option_names()}
        return cls(cls.shape_type(**stored["shape"]), **options)

    def with_keys(self, keys: int) -> Case:
        return replace(self, shape=replace(self.shape, keys=keys))

    def style(self, name: str) -> str:
        return self.baselines[name][0] if name in self.baselines else "operator"

    def compiled(self, name: str) -> bool:
        return name in self.baselines and self.baselines[name][1]

    @property
    @abstractmethod
    def label(self) -> str:
        """The options in words."""

    def __str__(self) -> str:
        return f"{self.label}, {self.shape}"

    @property
    @abstractmethod
    def stem(self) -> str:
        """What the picture's file is called, without number and ending."""

    @property
    @abstractmethod
    def heading(self) -> str:
        """Title of the picture over K, two lines."""

    @property
    @abstractmethod
    def tolerance(self) -> float:
        """How far gradients may differ (relative L2) before comparing times means nothing."""

    @abstractmethod
    def tiny(self) -> Case:
        """The same at a small size, to load libraries with."""

    @abstractmethod
    def make_problem(self) -> Problem: ...

    @abstractmethod
    def make_step(self, problem: Problem, name: str, backend: str, chunk: int) -> Step:
        """One forward and backward pass of the variant `name`; Absent where it cannot be had."""

    @abstractmethod
    def needed_bytes(self, name: str) -> int:
        """About what the variant materialises, to leave out what won't fit."""

    @abstractmethod
    def limits(self, problem: Problem) -> dict[Limit, tuple[Meter, float]]:
        """What bounds the time: a meter, and how much of what it measures the case needs."""

    def comparable(self, name: str) -> bool:
        """Whether the variant's gradients are to be those of the others."""
        return name != EXCLUDING

    def truth(self, problem: Problem, name: str) -> dict[str, torch.Tensor] | None:
        """The gradients that `name` must leave, where they are not those of the first variant."""
        return None


class ChunkChoice:
    """The fastest chunk length of each chunked baseline, tried once for cases that share it."""

    def __init__(self, candidates: Iterable[int] = CHUNKS, keys: int = 4096) -> None:
        self.candidates = tuple(candidates)
        self.keys = keys
        self.known: dict[tuple[Case, str], int] = {}

    def __call__(self, case: Case, name: str, backend: str = "cpu", device: str = "cpu") -> int:
        sample = case.with_keys(min(case.shape.keys, self.keys))
        key = (sample, name)
        if key not in self.known:
            with torch.device(device):
                problem = sample.make_problem()
            candidates = self.candidates
            if sample.compiled(name) and len(candidates) > 2:
                candidates = candidates[1:4:2]  # each is compiled anew, which takes its time
            candidates = [c for c in candidates if c <= sample.shape.keys] or [sample.shape.keys]
            if len(candidates) == 1:
                return candidates[0]
            seconds = {}
            for chunk in candidates:
                with torch.device(device):
                    step = sample.make_step(problem, name, backend, chunk)
                step()
                seconds[chunk] = min(time_once(step, device) for _ in range(2))
            self.known[key] = min(seconds, key=seconds.__getitem__)
        return self.known[key]


class Patience:
    """Leaves out a baseline whose step is expected, from fewer negatives, to take too long."""

    def __init__(self, seconds: float = float("inf")) -> None:
        self.seconds = seconds
        self.known: dict[tuple[Case, str], float] = {}

    def learn(self, case: Case, name: str, seconds: float) -> None:
        self.known[case.with_keys(0), name] = seconds / case.shape.keys

    def expected(self, case: Case, name: str) -> float:
        return self.known.get((case.with_keys(0), name), 0.0) * case.shape.keys


def difference(gradients: dict[str, torch.Tensor], truth: dict[str, torch.Tensor]) -> float:
    """Largest relative L2 distance of a gradient; infinite where one is not finite."""
    distances = [
        float((gradients[name] - truth[name]).norm() / truth[name].norm().clamp_min(1e-30))
        for name in truth
    ]
    return max(distances) if all(map(math.isfinite, distances)) else math.inf


def _warm(case: Case, problem: Problem, steps: dict[str, Step]) -> dict[str, dict[str, Any]]:
    """Run each step once: how far its gradients lie from the first step's, or what is wrong with
    it, which is a result like others and does not keep the rest from being timed."""
    found: dict[str, dict[str, Any]] = {}
    first: dict[str, torch.Tensor] | None = None
    for name, step in steps.items():
        try:
            truth = case.truth(problem, name)
            step()
            gradients = problem.gradients()
        except torch.OutOfMemoryError:
            found[name] = {"skipped": "out of memory"}
            continue
        except RuntimeError as error:
            found[name] = {"skipped": f"FAILED: {(str(error).splitlines() or [''])[0]}"}
            found[name]["wrong"] = True
            continue
        if not case.comparable(name):
            found[name] = {"difference": 0.0}
            if not all(gradient.isfinite().all() for gradient in gradients.values()):
                found[name] = {"skipped": "WRONG: gradients are not finite", "wrong": True}
            continue
        first = first or gradients
        differs = difference(gradients, truth or first)
        found[name] = {"difference": differs}
        if not differs <= case.tolerance:
            other = "its formula" if truth else next(iter(steps))
            words = f"WRONG: gradients differ by {differs:.1e} from those of {other}, allowed"
            found[name] |= {"skipped": f"{words} {case.tolerance:.0e}", "wrong": True}
    return found


def run_case(
    case: Case,
    variants: Iterable[str],
    *,
    backend: str = "cpu",
    device: str = "cpu",
    repeats: int = 7,
    budget: float = 60.0,
    memory: bool = True,
    choose_chunk: ChunkChoice | None = None,
    patience: Patience | None = None,
) -> dict[str, Any]:
    """Times, memory and agreement of the variants of one case, as a dictionary for JSON.

    A variant that cannot run, or whose gradients are not those of the first, says so under
    "skipped"; the latter has "wrong" too.

    What is measured is made within `torch.device(device)` and run outside of it, where that costs
    no time.
    """
    choose_chunk = choose_chunk or ChunkChoice()
    patience = patience or Patience()
    torch._dynamo.reset()  # each shape is compiled for itself, as in a training run of that shape
    with torch.device(device):
        problem = case.make_problem()
    results: dict[str, dict[str, Any]] = {name: {} for name in variants}
    steps: dict[str, Step] = {}
    for name in variants:
        if case.needed_bytes(name) > 0.7 * machine.available_bytes(device):
            results[name]["skipped"] = f"needs about {case.needed_bytes(name) / 1e9:.0f} GB"
            continue
        if not name.startswith(OPERATOR) and patience.expected(case, name) > patience.seconds:
            results[name]["skipped"] = f"takes about {patience.expected(case, name):.0f} s"
            continue
        chunk = 512
        if case.style(name) in ("checkpoint", "backward"):
            chunk = results[name]["chunk"] = choose_chunk(case, name, backend, device)
        try:
            with torch.device(device):
                steps[name] = case.make_step(problem, name, backend, chunk)
        except Absent as absent:
            results[name]["skipped"] = str(absent)
    for name, found in _warm(case, problem, steps).items():
        results[name] |= found
        if "skipped" in found:
            del steps[name]

    with torch.device(device):
        limits = case.limits(problem)
    for meter, _ in limits.values():
        meter()
    meters = {limit.label: meter for limit, (meter, _) in limits.items()}
    timings = interleave({**steps, **meters}, repeats, budget, device)
    with torch.device(device):
        copy = Copy()
    copy()
    bandwidth = copy.amount / min(time_once(copy, device) for _ in range(3))
    for name in steps:
        timing = timings[name]
        patience.learn(case, name, timing.median)
        results[name] |= {
            "seconds": timing.seconds,
            "median_s": timing.median,
            "min_s": timing.minimum,
        }
        for limit, (meter, needed) in limits.items():
            # Rate over rate, round by round: (needed/time) / (meter's amount/meter's time).
            fraction = needed / meter.amount / timing.ratio_to(timings[limit.label])
            results[name][f"{limit.key}_fraction"] = fraction
        if OPERATOR in steps:
            results[name]["times_operator"] = timing.ratio_to(timings[OPERATOR])
    rates = {
        limit.rate_field: meter.amount / timings[limit.label].median / 1e9
        for limit, (meter, _) in limits.items()
    }
    rounds = len(next(iter(timings.values())).seconds)
    needs = {limit.needed_field: needed for limit, (_, needed) in limits.items()}
    names = list(steps)
    del problem, steps, limits, meters, meter
    if memory:
        for name in names:
            results[name]["peak_bytes"] = peak_extra_memory(
                case, name, backend, results[name].get("chunk", 512), device
            )
    return {
        **case.as_dict(),
        **needs,
        **rates,
        "copy_gb_s": bandwidth / 1e9,
        "rounds": rounds,
        "variants": results,
    }


def best_baseline(result: dict, among: Iterable[str] | None = None) -> tuple[str, float] | None:
    """The fastest baseline of a case, and how many times longer than the operator it took."""
    times = {
        name: variant["times_operator"]
        for name, variant in result["variants"].items()
        if not name.startswith(OPERATOR)
        and "times_operator" in variant
        and (among is None or name in among)
    }
    return min(times.items(), key=lambda item: item[1]) if times else None


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def add_run_arguments(
    parser: argparse.ArgumentParser, *, repeats: int = 7, unit: str = "a case"
) -> None:
    """What every command takes."""
    parser.add_argument("--device", default="cpu", help="where the tensors are")
    parser.add_argument(
        "--backend", help="backend of the operator (default: cpu; on another device its own)"
    )
    parser.add_argument(
        "--repeats", type=int, default=repeats, help="rounds, in each of which all run"
    )
    parser.add_argument(
        "--budget",
        type=float,
        default=60.0,
        help=f"seconds of {unit} after which no new round is begun (after three)",
    )
    parser.add_argument("--threads", type=int, help="threads, for all of them (default: torch's)")
    parser.add_argument(
        "--output", type=Path, default=Path("runs/bench"), help="folder of the results"
    )


def add_variant_arguments(
    parser: argparse.ArgumentParser, variants: Iterable[str], *, operator: bool = True
) -> None:
    """What the commands take that compare variants; `operator`: chunked ones and one's memory."""
    variants = list(variants)
    parser.add_argument(
        "--variants",
        nargs="+",
        choices=variants,
        default=variants,
        metavar="NAME",
        help="which to run, of: " + ", ".join(variants),
    )
    parser.add_argument("--no-memory", action="store_true", help="leave out peak memory")
    parser.set_defaults(chunks=list(CHUNKS))
    if not operator:
        return
    parser.add_argument(
        "--chunks",
        type=int,
        nargs="+",
        default=list(CHUNKS),
        help="chunk lengths that are tried for the chunked baselines; one is not tried but taken",
    )
    parser.add_argument(
        "--memory-keys",
        type=int,
        nargs="*",
        default=[16384, 1_000_000],
        help="numbers of keys at which the operator's memory alone is measured",
    )


def add_patience_argument(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--patience",
        type=float,
        default=30.0,
        help="seconds of one step above which a baseline is left out, judged from fewer keys",
    )


def backend_of(options: argparse.Namespace) -> str | None:
    """The backend that was asked for; None, as for any call, on another device than the CPU."""
    return options.backend or ("cpu" if torch.device(options.device).type == "cpu" else None)


def begin(options: argparse.Namespace) -> dict[str, object]:
    """Threads, output folder and headline of a run; what machine.describe says."""
    device = getattr(options, "device", "cpu")
    if torch.device(device).type == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"--device {device}: torch sees no CUDA device")
    if options.threads:
        torch.set_num_threads(options.threads)
    options.output.mkdir(parents=True, exist_ok=True)
    about = machine.describe(device)
    print("\n".join(machine.headline(about)))
    return about


def run(
    benchmark,
    cases: list[Case],
    memory_cases: list[Case],
    options: argparse.Namespace,
    patience: Patience | None = None,
) -> int:
    """All cases one after the other, with tables as they come, files and pictures at the end; 1
    where a variant was wrong."""
    from bench import report

    about = begin(options)
    choose_chunk = ChunkChoice(options.chunks)
    results: list[dict] = []
    memory_only: list[dict] = []
    for number, case in enumerate(cases, 1):
        say(f"[{number}/{len(cases)}] {case}")
        result = run_case(
            case,
            [n for n in options.variants if n.startswith(OPERATOR) or n in case.baselines],
            backend=backend_of(options),
            device=options.device,
            repeats=options.repeats,
            budget=options.budget,
            memory=not options.no_memory,
            choose_chunk=choose_chunk,
            patience=patience,
        )
        results.append(result)
        report.print_case(benchmark, result)
        report.write(benchmark, options.output, about, results, memory_only)
    if not options.no_memory and OPERATOR in options.variants:
        for case in memory_cases:
            say(f"memory of the operator alone: {case}")
            peak = peak_extra_memory(case, OPERATOR, backend_of(options), device=options.device)
            memory_only.append({**case.as_dict(), "peak_bytes": peak})
    report.finish(benchmark, options.output, about, results, memory_only)
    variants = [variant for result in results for variant in result["variants"].values()]
    return int(any(variant.get("wrong") for variant in variants))
