"""The three losses in one small size, for what they share."""

from __future__ import annotations

import torch

from crrcd_ext import CRCDLoss, CRDLoss, CRRCDLoss

KINDS = ["crrcd", "crcd", "crd"]
DS, DT, N, K, B = 6, 10, 40, 17, 8


def make(seed=0, kind="crrcd", num_samples=N, **options):
    torch.manual_seed(seed)
    sizes = {"negatives": K, "embedding_dim": 8}
    if kind == "crd":
        return CRDLoss(DS, DT, num_samples, **{**sizes, **options})
    sizes["anchors"] = 4
    if kind == "crcd":
        return CRCDLoss(DS, DT, num_samples, **{**sizes, **options})
    sizes |= {"hidden_dim": 8, "relation_dim": 8}
    return CRRCDLoss(DS, DT, num_samples, **{**sizes, **options})


def batch(step, dtype=torch.float32, size=B):
    g = torch.Generator().manual_seed(100 + step)
    student, teacher = torch.randn(size, DS, generator=g), torch.randn(size, DT, generator=g)
    return student.to(dtype), teacher.to(dtype), torch.randint(N, (size,), generator=g)


def same_state(a, b):
    a, b = a.state_dict(), b.state_dict()
    return list(a) == list(b) and all(torch.equal(a[k], b[k]) for k in a)
