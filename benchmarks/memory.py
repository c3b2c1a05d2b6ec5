# SPDX-License-Identifier: BSD-3-Clause
# Copyright (c) the resnet_fused authors
"""Bytes that a forward pass keeps for the backward pass."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn


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
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        # The result holds the graph, so no storage is freed and its address used again.
        result = forward()  # noqa: F841
    return sum(storages.values())
