"""The Triton kernels compiled ahead of time, for GPUs that need not be here: what they take."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from bench import sass, static

if importlib.util.find_spec("triton") is None:
    pytest.skip("Triton is not installed", allow_module_level=True)
try:
    sass.cuobjdump()
except sass.ToolMissing as missing:
    pytest.skip(str(missing), allow_module_level=True)

ROOT = Path(__file__).resolve().parent.parent

# Calls that are compiled here; `python -m bench static --backend triton` has more of them.
CALLS = {
    "sm_80": "relation_nce (bf16|float)|bf16 all( own)? nce",
    "sm_90": "bf16|_nce float|(relation|bank_update_) float",
    "sm_100": "relation_nce (bf16|float .* nce)|(difference|instance)_nce bf16 all nce",
    "sm_120": "relation_nce bf16 .* nce",
    "gfx942": "relation_nce bf16 .* nce|instance_nce bf16 query nce",
}
TENSOR_CORES = {"sm_80": "mma.sync", "sm_90": "wgmma", "sm_100": "tcgen05", "sm_120": "mma.sync"}
TENSOR_CORES["gfx942"] = "mfma"
WITHOUT_SPILLS = ("sm_80", "sm_90", "sm_100")
"""By the release of Triton that the table of configurations is for; others allocate otherwise."""
SHARED = {"gfx942": 64 * 1024}
"""Bytes that a block may have; of NVIDIA's GPUs all of a multiprocessor's but the system's."""


MOST_TRAFFIC = {"query": 40e6, "all": 150e6}
"""Bytes of a call of relation_nce with NCE, by the model of ahead_of_time.traffic."""


def compiled(arch: str, folder: Path) -> dict:
    """The static tables, from a process of its own: here Triton's interpreter is on."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment |= {"TRITON_CACHE_DIR": str(folder / "cache"), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "bench", "static", "--backend", "triton", "--arch", arch]
    command += ["--call", CALLS[arch], "--output", str(folder)]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]
    document = json.loads((folder / "static_triton.json").read_text())
    assert f"| {document['kernels'][0]['call']} |" in (folder / "static_triton.md").read_text()
    return document


@pytest.mark.parametrize("arch", CALLS)
def test_kernels_compile_and_fit(arch, tmp_path):
    document = compiled(arch, tmp_path)
    found = document["kernels"]
    relation = [row for row in found if row["call"].startswith("relation_nce bf16")]
    names = {"project", "mask", "logits", "norms", "keys", "gram"}
    assert {row["kernel"].split()[0] for row in relation} == names

    nvidia = arch.startswith("sm_")
    if nvidia:
        most = static.LIMITS[sass.generation(arch)].shared - sass.SYSTEM_SHARED
    else:
        most = SHARED[arch]
    assert not [row for row in found if row["shared"] > most]

    multiply = [row for row in relation if row["kernel"] != "mask"]
    assert not [row for row in multiply if row["tensor_core"] == 0]
    main = [row for row in relation if row["kernel"] == "logits"]
    assert main and {row["instructions_of"] for row in main} == {TENSOR_CORES[arch]}

    moved = document["traffic"][arch]
    for gradients, most in MOST_TRAFFIC.items():
        assert 10e6 < moved[f"relation_nce bf16 {gradients} nce"] < most

    if nvidia:  # issue of the pass that all gradients need
        weighted = [row for row in main if "weighted" in row["call"]]
        assert max(row["clocks_a_pair"] for row in main if row not in weighted) < 20
        assert all(row["clocks_a_pair"] < 25 for row in weighted)
    if importlib.metadata.version("triton").startswith("3.8.") and arch in WITHOUT_SPILLS:
        spilling = [row for row in found if row["spills"] or row["stack"]]
        # Weights take registers that some kernels do not have left: up to 205 such instructions.
        assert not [row for row in spilling if "weighted" not in row["call"]]
        assert all(row["spills"] <= 205 for row in spilling)
