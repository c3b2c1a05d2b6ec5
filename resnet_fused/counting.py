# SPDX-License-Identifier: BSD-3-Clause
# Copyright (c) the resnet_fused authors
"""What a call keeps for backward, and what its operators move."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


def bytes_kept(module: nn.Module, forward: Callable[[], object]) -> int:
    """Bytes of all distinct storages that ``forward``, a call of ``module``, saves for backward.

    Parameters, buffers and autocast's copies of weights (tensors of a weight's shape) are not counted: they do
    not grow with the batch.
    """
    own = {t.untyped_storage().data_ptr() for t in [*module.parameters(), *module.buffers()]}
    weights = {p.shape for p in module.parameters() if p.dim() > 1}
    storages = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own and tensor.shape not in weights:
            storages[storage.data_ptr()] = storage.nbytes()
        return tensor.detach()  # an output that its own node holds is never freed

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        # The result holds the graph, so no storage is freed and its address used again.
        result = forward()  # noqa: F841
    return sum(storages.values())


class Operators(TorchDispatchMode):
    """Inside, notes the operators that are called, without those that only look at memory or allocate it.

    ``names``: as ``"aten.convolution"``; ``bytes``: of their operands and results, each once per operator, but for
    PyTorch's batch norms: by the batch's statistics these read activations twice, forward and backward.
    """

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []
        self.bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        name = str(func.overloadpacket)
        is_view = any(r.alias_info is not None and not r.alias_info.is_write for r in func._schema.returns)
        if not is_view and "empty" not in name:
            tensors = {id(t): t for t in tree_leaves((args, kwargs, result)) if isinstance(t, Tensor)}
            self.names.append(name)
            self.bytes += sum(map(_bytes, tensors.values()))
            if "batch_norm" in name and _by_statistics(func, args, kwargs or {}):
                given = {id(t): t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor) and t.dim() > 1}
                self.bytes += sum(map(_bytes, given.values()))
        return result


def _bytes(t: Tensor) -> int:
    return t.numel() * t.element_size()


def _by_statistics(func: Any, args: Any, kwargs: dict[str, Any]) -> bool:
    """Whether a batch norm's operator, forward or backward, is that of training."""
    if str(func.overloadpacket).endswith(("no_training", "no_update")):
        return False
    bound = dict(zip((a.name for a in func._schema.arguments), args, strict=False)) | kwargs
    return all(bound.get(flag, True) for flag in ("training", "train", "update"))
