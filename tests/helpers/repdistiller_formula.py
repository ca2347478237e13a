"""The public training code's two losses as their description has them: eager, all materialised.

Shares no code with the package. ``relational=False`` is RepDistiller's CRD, True the public CRCD.
The probabilities are formed and put into logarithms as written, in the dtype of the module.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn


def head(dim_in: int, dim_out: int, kind: str) -> nn.ModuleDict:
    if kind == "linear":
        layer = nn.Linear(dim_in, dim_out)
    elif kind == "nonlinear":
        first, second = nn.Linear(dim_in, dim_in), nn.Linear(dim_in, dim_out)
        layer = nn.Sequential(first, nn.ReLU(), second, nn.ReLU(), nn.Linear(dim_out, dim_out))
    else:
        layer = nn.Identity()
    return nn.ModuleDict({"linear": layer})


def unit(x: Tensor) -> Tensor:
    return x / (x * x).sum(-1, keepdim=True).sqrt()


class PublicLoss(nn.Module):
    def __init__(self, opt, relational: bool) -> None:
        super().__init__()
        self.relational = relational
        kind = opt.embed_type if relational else "linear"
        width = opt.s_dim if kind == "nofc" else opt.feat_dim
        self.embed_s = head(opt.s_dim, width, kind)
        self.embed_t = head(opt.t_dim, width, kind)
        self.contrast = nn.Module()
        params = torch.tensor([opt.nce_k, opt.nce_t, -1, -1, opt.nce_m])
        self.contrast.register_buffer("params", params)
        half = (3 / width) ** 0.5
        for name in ("memory_v1", "memory_v2"):
            rows = torch.rand(opt.n_data, width) * (2 * half) - half
            self.contrast.register_buffer(name, unit(rows) if relational else rows)

    def similarities(self, query: Tensor, memory: Tensor, idx: Tensor, candidates: Tensor):
        """One row per query, for the relational loss per pair, one column per candidate."""
        rows = memory[candidates]
        if not self.relational:
            return (rows * query[:, None]).sum(2)
        tables = []
        for anchor in memory[idx]:
            seen_query = unit(query - anchor + 1e-6)
            seen_rows = unit(rows - anchor + 1e-6)
            tables.append((seen_rows * seen_query[:, None]).sum(2))
        return torch.cat(tables)

    def side(self, slot: int, query: Tensor, memory: Tensor, idx: Tensor, candidates: Tensor):
        params = self.contrast.params
        x = torch.exp(self.similarities(query, memory, idx, candidates) / params[1].item())
        if params[slot] < 0:
            params[slot] = x.detach().mean() * len(memory)
        p = x / params[slot].item()
        noise = (candidates.shape[1] - 1) / len(memory)
        own = torch.log(p[:, 0] / (p[:, 0] + noise + 1e-7))
        others = torch.log(noise / (p[:, 1:] + noise + 1e-7))
        return -(own.sum() + others.sum()) / len(p)

    def updated(self, memory: Tensor, idx: Tensor, value: Tensor) -> Tensor:
        momentum = self.contrast.params[4].item()
        after = memory.clone()
        for i, v in zip(idx.tolist(), value.detach(), strict=True):
            after[i] = unit(momentum * memory[i] + (1 - momentum) * v)
        return after

    def forward(self, f_s: Tensor, f_t: Tensor, idx: Tensor, candidates: Tensor) -> Tensor:
        v1 = unit(self.embed_s["linear"](f_s.flatten(1)))
        v2 = unit(self.embed_t["linear"](f_t.flatten(1)))
        c = self.contrast
        loss = self.side(2, v1, c.memory_v2.clone(), idx, candidates)
        loss = loss + self.side(3, v2, c.memory_v1.clone(), idx, candidates)
        c.memory_v1, c.memory_v2 = (
            self.updated(c.memory_v1, idx, v1),
            self.updated(c.memory_v2, idx, v2),
        )
        return loss if self.relational else loss.reshape(1)
