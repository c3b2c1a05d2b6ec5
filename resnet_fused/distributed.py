# SPDX-License-Identifier: BSD-3-Clause
# Copyright (c) the resnet_fused authors
"""Batch norms over the batches of several processes, as ``nn.SyncBatchNorm``: what is exchanged, and with whom.

A batch norm's statistics are tiles of count, mean and M2 that are merged: those of other processes are more tiles. Per
channel a process sends one tile in forward, and in backward the gradients of gamma and beta over its own values with
their count: one gather of fixed size in each direction, whatever the sizes of the batches; an empty one sends zeros.
Every process merges what it got in the order of ranks, so that all have the same bits. The host waits for no GPU.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor


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
        functional = torch.ops._c10d_functional
        processes = self._resolved().size()
        return functional.wait_tensor(functional.all_gather_into_tensor(table.contiguous(), processes, self.group))

    def gather_statistics(self, statistics: Tensor) -> Tensor:
        """From this process's tiles ``[tiles, 3, C]`` one of each process, for :func:`resnet_fused.ops.bn_finalize`."""
        return self.gather(merge_tiles(statistics))

    def gather_differentiably(self, table: Tensor) -> Tensor:
        """:meth:`gather` with gradients, those of every process's results, of any order."""
        gathered: Tensor = _Gather.apply(self, table)
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
        *sums, total = self.gather(own.unsqueeze(0)).double().sum(0)
        for i, (table, forward) in enumerate(zip(tables, coefficients, strict=True)):
            mean, invstd, scale, _ = forward.double()
            # As in csrc: b = -scale*invstd*d_gamma/M, c = scale*(mean*invstd*d_gamma - d_beta)/M.
            b = -scale * invstd * sums[2 * i] / total
            table[3] = b
            table[4] = -(mean * b + scale * sums[2 * i + 1] / total)


def merge_tiles(statistics: Tensor) -> Tensor:
    """Tiles ``[tiles, 3, C]`` as one, ``[1, 3, C]`` (Chan, Golub & LeVeque 1979); of no values, zeros."""
    if len(statistics) == 1:
        return statistics
    counts, means, m2s = statistics.double().unbind(1)
    count = counts.sum(0)
    mean = (counts * means).sum(0) / count.clamp(min=1)
    m2 = (m2s + counts * (means - mean).square()).sum(0)
    return torch.stack((count, mean, m2)).unsqueeze(0).to(statistics.dtype)


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, exchange: Exchange, table: Tensor) -> Tensor:
        ctx.exchange = exchange
        return exchange.gather(table)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[None, Tensor]:
        return None, _SumOfOwn.apply(ctx.exchange, grad)


class _SumOfOwn(torch.autograd.Function):
    """The transpose of :class:`_Gather`."""

    @staticmethod
    def forward(ctx: Any, exchange: Exchange, tables: Tensor) -> Tensor:
        ctx.exchange = exchange
        return exchange.sum_of_own(tables)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[None, Tensor]:
        return None, _Gather.apply(ctx.exchange, grad)


def exchange_of(module: Any) -> Exchange | None:
    """With whom ``module``, an ``nn.SyncBatchNorm`` in training, exchanges statistics now; None: with nobody."""
    if not (dist.is_available() and dist.is_initialized()):
        return None
    group: Any = module.process_group or dist.group.WORLD
    # A process outside of the group is by itself, as in eager.
    return Exchange(group.group_name) if dist.get_world_size(group) > 1 else None
