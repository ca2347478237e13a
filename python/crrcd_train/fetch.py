"""Gets data sets onto the disk: time limits on every source, checksums on every file.

Fashion-MNIST has three sources, tried in this order: torchvision's download; the files of the
Debian package dataset-fashion-mnist where it is installed; the same package fetched with
`apt-get download` and unpacked with `dpkg-deb -x`, neither of which needs root.
"""

from __future__ import annotations

import gzip
import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import zlib
from collections.abc import Callable
from pathlib import Path

from .config import Data
from .errors import UserError, writable_folder

# SHA-256 of the four files' uncompressed contents (the archives differ between distributors).
FASHION_MNIST = {
    "train-images-idx3-ubyte": "c59f468a2f672dc815687fe0f83887768d799fd8a3f3276145d20f83aa44d888",
    "train-labels-idx1-ubyte": "bad3541b69d912435c50bb6ba87bec294ff4f6a2e1246121d8633921760443d9",
    "t10k-images-idx3-ubyte": "5b4141f0afbad91edebe8549f8fcffe087ea10ca49f1dbef5c9a5cd8815ce37b",
    "t10k-labels-idx1-ubyte": "0402a96d92fd2663957122ceb108a494c5af83dab82d92729df917d7dec38c34",
}
PACKAGE = "dataset-fashion-mnist"
SUMS = "SHA256SUMS"

# In a process of its own: urllib takes no overall time limit, and a host name that cannot be
# resolved may hang longer than any socket time-out.
_TORCHVISION = """
import socket, sys
socket.setdefaulttimeout(15)
import torchvision.datasets as datasets
name, root, options = sys.argv[1], sys.argv[2], sys.argv[3:]
for option in options or [""]:
    keywords = {"split": option} if option else {}
    getattr(datasets, name)(root, download=True, **keywords)
"""

Say = Callable[[str], None]


class _Unavailable(Exception):
    """One source cannot deliver; the text says why."""


def torchvision_download(name: str, root: Path, seconds: int, splits: tuple[str, ...] = ()) -> None:
    """Runs `torchvision.datasets.<name>(root, download=True)` under a time limit.

    Raises:
        UserError: no connection, time limit, or a file that fails torchvision's checksum.
    """
    try:
        _torchvision(name, root, seconds, splits)
    except _Unavailable as error:
        raise UserError(
            f"data set {name} could not be downloaded to {root}: {error}; "
            "check the network connection or put torchvision's files there"
        ) from None


def fashion_mnist(data: Data, say: Say = print) -> Path:
    """The folder to give `torchvision.datasets.FashionMNIST` as `root`, its files checked.

    Raises:
        UserError: a damaged file, an unwritable folder, or no source within reach.
    """
    root = Path(data.root)
    if data.source not in ("auto", "torchvision", "debian"):
        return _local(root, Path(data.source))
    raw = root / "FashionMNIST" / "raw"
    if all((raw / name).exists() for name in FASHION_MNIST):
        _verify(raw)
        return root
    writable_folder(root)
    sources: list[tuple[str, Callable[[Path], dict[str, Path]]]] = []
    if data.source in ("auto", "torchvision"):
        sources.append(("torchvision", lambda folder: _from_torchvision(data, folder)))
    if data.source in ("auto", "debian"):
        installed = Path(data.system_folder)
        sources.append((str(installed), lambda folder: _from_folder(installed, folder)))
        sources.append(("apt-get download", lambda folder: _from_apt(data, folder)))
    reasons = []
    for label, source in sources:
        say(f"Fashion-MNIST: trying {label}")
        with tempfile.TemporaryDirectory(prefix=".fetch-", dir=root) as folder:
            try:
                # torchvision has compared its archives with its own checksums by then.
                _install(source(Path(folder)), raw, check=label != "torchvision")
            except (_Unavailable, OSError) as error:
                reasons.append(f"{label}: {error}")
                continue
        say(f"Fashion-MNIST: ready in {raw}")
        return root
    raise UserError(
        f"Fashion-MNIST is out of reach ({'; '.join(reasons)}): connect to a network, install "
        f"the Debian package {PACKAGE}, or name a folder of its files with --set data.source="
    )


def _torchvision(name: str, root: Path, seconds: int, splits: tuple[str, ...]) -> None:
    command = [sys.executable, "-c", _TORCHVISION, name, str(root), *splits]
    _call(command, seconds)


def _call(command: list[str], seconds: int, folder: Path | None = None) -> None:
    """Runs a command; its last line of output is the reason when it fails."""
    try:
        done = subprocess.run(
            command,
            cwd=folder,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            timeout=seconds,
        )
    except subprocess.TimeoutExpired:
        raise _Unavailable(f"no end after {seconds} s") from None
    if done.returncode != 0:
        lines = [line.strip() for line in done.stdout.splitlines() if line.strip()]
        raise _Unavailable(lines[-1] if lines else f"exit code {done.returncode}")


def _from_torchvision(data: Data, folder: Path) -> dict[str, Path]:
    _torchvision("FashionMNIST", folder, data.download_seconds, ())
    raw = folder / "FashionMNIST" / "raw"
    return {name: raw / name for name in FASHION_MNIST}


def _from_folder(source: Path, folder: Path) -> dict[str, Path]:
    """Uncompressed copies in `folder` of the files in `source`, compressed or not."""
    if not source.is_dir():
        raise _Unavailable("no such folder")
    found = {}
    for name in FASHION_MNIST:
        plain, packed = source / name, source / f"{name}.gz"
        target = folder / name
        if plain.exists():
            shutil.copyfile(plain, target)
        elif packed.exists():
            try:
                with gzip.open(packed) as reader, target.open("wb") as writer:
                    shutil.copyfileobj(reader, writer)
            except (EOFError, zlib.error, gzip.BadGzipFile) as error:
                raise _Unavailable(f"{packed} is damaged ({error})") from None
        else:
            raise _Unavailable(f"{packed} is missing")
        found[name] = target
    return found


def _from_apt(data: Data, folder: Path) -> dict[str, Path]:
    for tool in ("apt-get", "dpkg-deb"):
        if shutil.which(tool) is None:
            raise _Unavailable(f"no {tool} here")
    patience = ["-o", "Acquire::http::Timeout=15", "-o", "Acquire::Retries=1"]
    download = ["apt-get", *patience, "download", PACKAGE]
    try:
        _call(download, data.download_seconds, folder)
    except _Unavailable:
        # A fresh machine has no package lists, and only root may fetch them to the system's
        # folder: fetch them to one of our own.
        state = folder / "apt"
        for name in ("lists/partial", "cache/archives/partial"):
            (state / name).mkdir(parents=True)
        own = ["-o", f"Dir::State::lists={state}/lists", "-o", f"Dir::Cache={state}/cache"]
        _call(["apt-get", *patience, *own, "update"], data.download_seconds, folder)
        _call(["apt-get", *patience, *own, "download", PACKAGE], data.download_seconds, folder)
    packages = sorted(folder.glob(f"{PACKAGE}*.deb"))
    if not packages:
        raise _Unavailable("apt-get left no package behind")
    _call(["dpkg-deb", "-x", str(packages[0]), str(folder / "x")], data.download_seconds)
    return _from_folder(folder / "x" / "usr/share/datasets/fashion-mnist", folder)


def _install(files: dict[str, Path], raw: Path, check: bool) -> None:
    """Checks the files against the known sums and moves them to `raw` with a record of the sums."""
    for name, path in files.items():
        if check and _sha256(path) != FASHION_MNIST[name]:
            raise _Unavailable(f"{name} does not have the published contents")
    raw.mkdir(parents=True, exist_ok=True)
    for name, path in files.items():
        os.replace(path, raw / name)
    _record(raw)


def _local(root: Path, source: Path) -> Path:
    """Files of the same format from a folder the user names: any contents, copied at each call."""
    mine = hashlib.sha256(str(source.resolve()).encode()).hexdigest()[:8]
    target = writable_folder(root / f"local-{mine}")
    raw = target / "FashionMNIST" / "raw"
    with tempfile.TemporaryDirectory(prefix=".fetch-", dir=root) as folder:
        try:
            files = _from_folder(source, Path(folder))
        except _Unavailable as error:
            raise UserError(f"data.source {source}: {error}") from None
        raw.mkdir(parents=True, exist_ok=True)
        for name, path in files.items():
            os.replace(path, raw / name)
    _record(raw)
    return target


def _record(raw: Path) -> None:
    lines = [f"{_sha256(raw / name)}  {name}\n" for name in FASHION_MNIST]
    temporary = raw / f"{SUMS}.{os.getpid()}"
    temporary.write_text("".join(lines))
    os.replace(temporary, raw / SUMS)


def _verify(raw: Path) -> None:
    """Compares with the recorded sums, or with the published ones where none were recorded."""
    expected = dict(FASHION_MNIST)
    if (raw / SUMS).exists():
        for line in (raw / SUMS).read_text(errors="replace").splitlines():
            digest, _, name = line.partition("  ")
            if name in expected:
                expected[name] = digest
    for name, digest in expected.items():
        if _sha256(raw / name) != digest:
            raise UserError(
                f"data file {raw / name} is damaged (wrong checksum); delete it and run again"
            )


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
