"""A step changes its module once, and for good: where it cannot, it is refused before it begins."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel


def check(where: str, module: nn.Module, buffer: Tensor, index: Tensor) -> Tensor:
    """``index``, the ids of a step that changes ``module``, of whose state ``buffer`` is a part.

    RuntimeError within a backward pass, where checkpointing runs a forward again; within a
    DistributedDataParallel that overwrites the buffer; in a replica of DataParallel. In a compiled
    graph an operator asks, whenever the graph is run.
    """
    if torch.compiler.is_compiling():
        return torch.ops.crrcd_step.once(index, buffer, where)
    if getattr(module, "_is_replica", False):
        raise RuntimeError(
            f"crrcd_ext.{where}: expected a module of its own, got a replica of DataParallel, "
            "whose banks and statistics are thrown away after the step; call the criterion outside "
            "of DataParallel"
        )
    _refuse(where, buffer)
    return index


def _refuse(where: str, buffer: Tensor) -> None:
    if torch._C._current_graph_task_id() != -1:
        raise RuntimeError(
            f"crrcd_ext.{where}: update: expected a step outside of a backward pass, got one "
            "within: run again by torch.utils.checkpoint, it would meet other negatives and change "
            "banks and statistics twice; call the criterion outside of the function that is "
            "checkpointed (or with update=False)"
        )
    wrapper = DistributedDataParallel._get_active_ddp_module()
    if wrapper is None or not wrapper.will_sync_module_buffers():
        return
    place = buffer.data_ptr()
    overwritten = any(b.data_ptr() == place for b in wrapper.modules_buffers)
    if overwritten and wrapper.process_group.size() > 1:
        raise RuntimeError(
            f"crrcd_ext.{where}: expected buffers that are a process's own, got a module inside of "
            "a DistributedDataParallel that overwrites them with those of rank 0 before every "
            "step; wrap with DistributedDataParallel(model, broadcast_buffers=False), or the "
            "criterion on its own like this, beside the model"
        )


def _once(index: Tensor, buffer: Tensor, where: str) -> Tensor:
    _refuse(where, buffer)
    return index.clone()


_library = torch.library.Library("crrcd_step", "DEF")
_library.define(
    "once(Tensor index, Tensor buffer, str where) -> Tensor",
    tags=(torch.Tag.pt2_compliant_tag,),
)
_library.impl("once", _once, "CompositeExplicitAutograd")
torch.library.register_fake(
    "crrcd_step::once", lambda index, buffer, where: torch.empty_like(index), lib=_library
)
