"""The feature relation module (FRM)."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from crrcd_ext import functional
from crrcd_ext.modules import _checks

STARTS = ("mirrored", "gaussian")


class FeatureRelation(nn.Module):
    """Relation vectors of all pairs (anchor, sample), two linear layers around a ReLU:

        F(a, b) = unit(W relu(Wa a - Wb b + c1) + c2)                     in R^R

    Parameters: ``anchor_weight`` Wa [H, Da], ``sample_weight`` Wb [H, Ds], ``hidden_bias`` c1 [H],
    ``weight`` W [R, H], ``bias`` c2 [R].

    Args:
        anchor_dim: Da, width of the anchors.
        sample_dim: Ds, width of the samples (default: Da).
        hidden_dim: H (default: twice the larger width).
        relation_dim: R (default: the larger width).
        bias: with c1 and c2; False leaves both out.
        init: how the parameters start; biases are zero.
            "mirrored": hidden units come in pairs of opposite sign, so that the rectifier loses
            nothing: with Wa = Wb = [Q; -Q] and W = [P, -P] is relu(x) - relu(-x) = x, and ::

                F(a, b) = unit(P Q (a - b))

            is the difference relation, turned. P and Q are random and orthogonal where Da = Ds = R
            = H / 2. For other sizes P Q is a random partial isometry of the largest rank that they
            allow, min(R, H // 2, max(Da, Ds)): what it keeps of a difference it keeps at its
            length. The narrower of anchors and samples counts as padded with zeros. Needs H of 2
            or more; a hidden unit left over without a partner starts without influence.
            "gaussian": Wa and Wb as N(0, 1), W as N(0, 2/H) (variance), the default up to version
            0.1. Independent Gaussian weights are ill-conditioned and train slowly, and two modules
            that start so see different things.
            (With the usual initialisation of linear layers the output bias dominates, and training
            drives the relation to a constant.)
        backend: as for :func:`crrcd_ext.functional.relation`.

    Raises:
        TypeError, ValueError: for sizes or a start out of their range.

    Example::

        relation = FeatureRelation(128)
        vectors = relation(teacher_anchors, student_samples)  # [A, 128], [M, 128] -> [A, M, 128]
    """

    NAME = "FeatureRelation"

    def __init__(
        self,
        anchor_dim: int,
        sample_dim: int | None = None,
        hidden_dim: int | None = None,
        relation_dim: int | None = None,
        bias: bool = True,
        *,
        init: str = "mirrored",
        backend: str | None = None,
    ) -> None:
        super().__init__()
        _checks.positive_int(self.NAME, "anchor_dim", anchor_dim)
        sample_dim = anchor_dim if sample_dim is None else sample_dim
        _checks.positive_int(self.NAME, "sample_dim", sample_dim)
        width = max(anchor_dim, sample_dim)
        hidden_dim = 2 * width if hidden_dim is None else hidden_dim
        relation_dim = width if relation_dim is None else relation_dim
        _checks.positive_int(self.NAME, "hidden_dim", hidden_dim)
        _checks.positive_int(self.NAME, "relation_dim", relation_dim)
        check_start(self.NAME, init, hidden_dim)
        self.init = init
        self.backend = backend
        self.anchor_weight = nn.Parameter(torch.empty(hidden_dim, anchor_dim))
        self.sample_weight = nn.Parameter(torch.empty(hidden_dim, sample_dim))
        self.weight = nn.Parameter(torch.empty(relation_dim, hidden_dim))
        self.hidden_bias = nn.Parameter(torch.empty(hidden_dim)) if bias else None
        self.bias = nn.Parameter(torch.empty(relation_dim)) if bias else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw the initial parameters from PyTorch's global generator."""
        if self.init == "mirrored":
            self._start_mirrored()
        else:
            nn.init.normal_(self.anchor_weight)
            nn.init.normal_(self.sample_weight)
            nn.init.normal_(self.weight, std=math.sqrt(2 / self.weight.shape[1]))
        if self.bias is not None:
            nn.init.zeros_(self.hidden_bias)
            nn.init.zeros_(self.bias)

    @torch.no_grad()
    def _start_mirrored(self) -> None:
        relation_dim, hidden_dim = self.weight.shape
        pairs = hidden_dim // 2
        layers = (self.anchor_weight, self.sample_weight)
        width = max(layer.shape[1] for layer in layers)
        first = _partial_isometry(self.weight, pairs, width)  # Q
        # More pairs than dimensions leave directions that Q never reaches: P has to look past them.
        inner = min(pairs, width)
        second = _partial_isometry(self.weight, relation_dim, inner)  # P
        if pairs > width:
            second = second @ first.T
        mirrored = torch.cat([first, -first])
        if hidden_dim % 2:
            alone = nn.functional.normalize(torch.randn_like(first[:1]), dim=1)
            mirrored = torch.cat([mirrored, alone])
        for layer in layers:
            layer.copy_(mirrored[:, : layer.shape[1]])
        self.weight.zero_()
        self.weight[:, : 2 * pairs] = torch.cat([second, -second], 1)

    def project_anchor(self, anchor: Tensor) -> Tensor:
        """P = Wa a + c1: [A, Da] -> [A, H]; ValueError, TypeError for another width or no float."""
        weight = self.anchor_weight
        _checks.features(self.NAME, "anchor", anchor, weight.shape[1], weight.device)
        return linear(anchor, weight, self.hidden_bias)

    def project_sample(self, sample: Tensor) -> Tensor:
        """X = Wb b: [M, Ds] -> [M, H]; ValueError, TypeError for another width or no float."""
        weight = self.sample_weight
        _checks.features(self.NAME, "sample", sample, weight.shape[1], weight.device)
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
            f"bias={self.bias is not None}, init={self.init!r}"
        )


def check_start(where: str, init: object, hidden_dim: int) -> None:
    """ValueError or TypeError where no relation of ``hidden_dim`` units can start as ``init``."""
    _checks.choice(where, "init", init, STARTS)
    if init == "mirrored" and hidden_dim < 2:
        expected = "2 or more for init='mirrored', which pairs hidden units (or init='gaussian')"
        _checks.fail(ValueError, where, "hidden_dim", expected, hidden_dim)


def _partial_isometry(like: Tensor, rows: int, columns: int) -> Tensor:
    """A random [rows, columns], like ``like``: orthonormal rows or, of a tall one, columns."""
    wide = torch.promote_types(like.dtype, torch.float32)
    return nn.init.orthogonal_(like.new_empty(rows, columns, dtype=wide)).to(like.dtype)
