"""The feature relation module (FRM)."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from crrcd_ext import functional
from crrcd_ext.modules import _checks


class FeatureRelation(nn.Module):
    """Relation vectors of all pairs (anchor, sample), two linear layers around a ReLU:

        F(a, b) = unit(W relu(Wa a - Wb b + c1) + c2)                     in R^R

    Parameters: ``anchor_weight`` Wa [H, Da], ``sample_weight`` Wb [H, Ds], ``hidden_bias`` c1 [H],
    ``weight`` W [R, H], ``bias`` c2 [R]. Wa and Wb start as N(0, 1), W as N(0, 2/H) (variance), the
    biases as zero: with the usual initialisation of linear layers the output bias dominates and
    training drives the relation to a constant.

    Args:
        anchor_dim: Da, width of the anchors.
        sample_dim: Ds, width of the samples (default: Da).
        hidden_dim: H.
        relation_dim: R.
        bias: with c1 and c2; False leaves both out.
        backend: as for :func:`crrcd_ext.functional.relation`.
    """

    def __init__(
        self,
        anchor_dim: int,
        sample_dim: int | None = None,
        hidden_dim: int = 128,
        relation_dim: int = 128,
        bias: bool = True,
        *,
        backend: str | None = None,
    ) -> None:
        super().__init__()
        sample_dim = anchor_dim if sample_dim is None else sample_dim
        for name, value in (
            ("anchor_dim", anchor_dim),
            ("sample_dim", sample_dim),
            ("hidden_dim", hidden_dim),
            ("relation_dim", relation_dim),
        ):
            _checks.positive_int("FeatureRelation", name, value)
        self.backend = backend
        self.anchor_weight = nn.Parameter(torch.empty(hidden_dim, anchor_dim))
        self.sample_weight = nn.Parameter(torch.empty(hidden_dim, sample_dim))
        self.weight = nn.Parameter(torch.empty(relation_dim, hidden_dim))
        self.hidden_bias = nn.Parameter(torch.empty(hidden_dim)) if bias else None
        self.bias = nn.Parameter(torch.empty(relation_dim)) if bias else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw the initial parameters from PyTorch's global generator."""
        nn.init.normal_(self.anchor_weight)
        nn.init.normal_(self.sample_weight)
        nn.init.normal_(self.weight, std=math.sqrt(2 / self.weight.shape[1]))
        if self.bias is not None:
            nn.init.zeros_(self.hidden_bias)
            nn.init.zeros_(self.bias)

    def project_anchor(self, anchor: Tensor) -> Tensor:
        """P = Wa a + c1: [A, Da] -> [A, H]; ValueError, TypeError for another width or no float."""
        weight = self.anchor_weight
        _checks.features("FeatureRelation", "anchor", anchor, weight.shape[1], weight.device)
        return linear(anchor, weight, self.hidden_bias)

    def project_sample(self, sample: Tensor) -> Tensor:
        """X = Wb b: [M, Ds] -> [M, H]; ValueError, TypeError for another width or no float."""
        weight = self.sample_weight
        _checks.features("FeatureRelation", "sample", sample, weight.shape[1], weight.device)
        return linear(sample, weight)

    def relate(self, anchor: Tensor, sample: Tensor) -> Tensor:
        """Relation vectors [A, M, R] of projected anchors [A, H] and samples [M, H]."""
        return functional.relation(anchor, sample, self.weight, self.bias, backend=self.backend)

    def forward(self, anchor: Tensor, sample: Tensor) -> Tensor:
        """[A, Da], [M, Ds] -> [A, M, R], unit vectors (zero where they vanish)."""
        return self.relate(self.project_anchor(anchor), self.project_sample(sample))

    def extra_repr(self) -> str:
        return (
            f"anchor_dim={self.anchor_weight.shape[1]}, sample_dim={self.sample_weight.shape[1]}, "
            f"hidden_dim={self.weight.shape[1]}, relation_dim={self.weight.shape[0]}, "
            f"bias={self.bias is not None}"
        )
