# SPDX-License-Identifier: BSD-3-Clause
# Copyright (c) the resnet_fused authors
"""Batch norms over the batches of several processes, as ``nn.SyncBatchNorm``: what is exchanged, and with whom.

A batch norm's statistics are tiles of count, mean and M2 that are merged: those of other processes are more tiles. Per
channel a process sends one tile in forward, and in backward the gradients of gamma and beta over its own values with
their count: one gather of fixed size in each direction, whatever the sizes of the batches; an empty one sends zeros.
Every process merges what it got in the order of ranks, so that all have the same bits. The host waits for no GPU.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator
from contextvars import ContextVar
from typing import Any, NamedTuple, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from resnet_fused import ops

_alone: ContextVar[bool] = ContextVar("resnet_fused_alone", default=False)

M = TypeVar("M", bound=nn.Module)


class Exchange(NamedTuple):
    """Among the processes of a group; by name, so that an operator's schema can carry it."""

    group: str

    def _resolved(self) -> Any:
        try:
            return dist.distributed_c10d._resolve_process_group(self.group)  # type: ignore[arg-type]
        except Exception as error:  # of which type differs between versions
            raise RuntimeError(
                f"process_group: expected a group of this process for a synchronised batch norm, "
                f"got {self.group!r}, which is gone"
            ) from error

    def gather(self, table: Tensor) -> Tensor:
        """``table`` ``[1, rows, C]`` of every process, in the order of ranks: ``[processes, rows, C]``."""
        if _alone.get():
            return table
        return ops.all_gather(table, self._resolved().size(), self.group)

    def gather_statistics(self, statistics: Tensor) -> Tensor:
        """Of this process's tiles ``[tiles, 3, C]`` one, gathered: ``[processes, 3, C]``, for `ops.bn_finalize`."""
        return self.gather(ops.bn_merge_statistics(statistics))

    def gather_differentiably(self, table: Tensor) -> Tensor:
        """:meth:`gather` with gradients, those of every process's results, of any order."""
        gathered: Tensor = _Gather.apply(self, table, False)
        return gathered

    def sum_of_own(self, tables: Tensor) -> Tensor:
        """``tables`` ``[processes, rows, C]`` hold something for each process: the sum of this one's, ``[1, ...]``."""
        return self.gather(tables.unsqueeze(0))[:, self._resolved().rank()].sum(0, keepdim=True)

    def complete_backward(self, tables: list[Tensor], coefficients: list[Tensor], count: int) -> None:
        """Make ``backward_coefficients`` over ``count`` values of this process those over all processes' values.

        ``tables``: of one or two batch norms of as many channels, changed in place. The gradients of gamma and beta in
        them stay this process's own.
        """
        counts = tables[0].new_full((1, tables[0].shape[1]), count)
        own = torch.cat((*(table[:2] for table in tables), counts))
        gathered = self.gather(own.unsqueeze(0))
        for branch, (table, forward) in enumerate(zip(tables, coefficients, strict=True)):
            ops.bn_backward_merge_(table, gathered, forward, branch)


class _Gather(torch.autograd.Function):
    """:meth:`Exchange.gather`, or its transpose :meth:`Exchange.sum_of_own`: each is the other one's derivative."""

    @staticmethod
    def forward(ctx: Any, exchange: Exchange, table: Tensor, transposed: bool) -> Tensor:
        ctx.exchange, ctx.transposed = exchange, transposed
        return exchange.sum_of_own(table) if transposed else exchange.gather(table)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[None, Tensor, None]:
        return None, _Gather.apply(ctx.exchange, grad, not ctx.transposed), None


def exchange_of(module: Any) -> Exchange | None:
    """With whom ``module``, an ``nn.SyncBatchNorm`` in training, exchanges statistics now; None: with nobody."""
    if not (dist.is_available() and dist.is_initialized()):
        return None
    group: Any = module.process_group or dist.group.WORLD
    # A process outside of the group is by itself, as in eager.
    return Exchange(group.group_name) if dist.get_world_size(group) > 1 else None


@contextlib.contextmanager
def alone() -> Iterator[None]:
    """Within the ``with`` block forward exchanges nothing, so that one process may run it by itself.

    Asked where a gather would be rather than in :func:`exchange_of`, whose answer torch.compile keeps.
    """
    token = _alone.set(True)
    try:
        yield
    finally:
        _alone.reset(token)


def copy_of(model: M) -> M:
    """A deep copy that shares the process groups of synchronised batch norms, which are handles and can't be copied."""
    groups = [m.process_group for m in model.modules() if isinstance(m, nn.SyncBatchNorm)]
    return copy.deepcopy(model, {id(group): group for group in groups if group is not None})
