# SPDX-License-Identifier: BSD-3-Clause
# Copyright (c) the resnet_fused authors
"""A whole residual block as plain functions of tensors: its plan, what is kept, and forward.

A block is a chain of units (one: ConvBNAct, two: BasicBlock, three: Bottleneck) and a join. Kept for backward are the
block's input, the raw convolution outputs and the per-channel coefficients; the activations between the convolutions
are recomputed from them, and the ReLUs' masks too, in `block_backward`.

Each convolution is the library's, with one-pass kernels around it, or native: then the batch norm and ReLU in front of
it, and in backward the batch norm behind it, are applied while it reads its operands, and neither the activation nor
the gradient in between exists in memory. Both kinds mix within a block.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from torch import Tensor

from resnet_fused import ops
from resnet_fused.distributed import Exchange
from resnet_fused.opaque import LEARNT_PER_UNIT, TENSORS_PER_UNIT
from resnet_fused.planner import decide
from resnet_fused.planner.entry import Choices
from resnet_fused.units import NO_CONV, Join, Norm, Unit

# A tensor where the plan has one, else None: a type checker can't tell where that is.
_Planned = Any


class UnitPlan(NamedTuple):
    """A unit without its tensors."""

    convolves: bool
    stride: tuple[int, int]
    padding: tuple[int, int]
    dilation: tuple[int, int]
    groups: int
    batch_statistics: bool
    momentum: float | None
    eps: float
    native: bool  # dgrad and wgrad
    native_fprop: bool
    normalises: bool  # False: a convolution alone, the last of its chain
    exchange: Exchange | None

    @property
    def geometry(self) -> tuple[tuple[int, int], tuple[int, int], tuple[int, int]]:
        """Of a native convolution."""
        return self.stride, self.padding, self.dilation


class Plan(NamedTuple):
    """A block without its tensors. ``units`` ends with the projection's if the join has one."""

    units: tuple[UnitPlan, ...]
    join: Join
    relu: bool
    minimal: bool
    cast_weights: bool  # autocast: parameters follow the input's dtype
    reads_joined: bool  # see `reads_joined`

    @property
    def last(self) -> int:
        return len(self.units) - (2 if self.join is Join.PROJECTION else 1)

    @property
    def projection(self) -> int:
        return len(self.units) - 1

    def weight(self, i: int, x: Tensor, weight: Tensor | None) -> Tensor | None:
        """Unit i's weight as its convolution takes it: some native ones cast it while they read it."""
        if weight is None or not self.cast_weights:
            return weight
        if self.units[i].native_fprop and ops.casts_weight(x, weight):
            return weight
        return weight.to(x.dtype)

    @property
    def keeps_z(self) -> bool:
        return keeps_z(self.join, self.relu, self.minimal, self.reads_joined)

    @property
    def ends_in_convolution(self) -> bool:
        return ends_in_convolution(self.units[self.last].normalises, self.join, self.relu)

    def reads_input(self, i: int) -> bool:
        """Whether unit i reads the block's input rather than the unit before it."""
        return i == 0 or (self.join is Join.PROJECTION and i == self.projection)


def _split(u: Unit, native: bool, native_fprop: bool) -> tuple[UnitPlan, tuple[Tensor | None, ...]]:
    conv, norm = u
    c = conv if conv is not None else NO_CONV
    n = norm if norm is not None else _NO_NORM
    settings = (n.batch_statistics, n.momentum, n.eps)
    exchange = n.exchange if n.batch_statistics else None
    plan = UnitPlan(conv is not None, *c[2:6], *settings, native, native_fprop, norm is not None, exchange)
    return plan, (c.weight, c.bias, *n[:5])


_NO_NORM = Norm(None, None, batch_statistics=False)


# What a unit reads: a tensor, or with coefficients the activation relu(scale*tensor + shift).
Source = tuple[Tensor, Tensor | None]


def activation(source: Source) -> Tensor:
    tensor, coefficients = source
    return tensor if coefficients is None else ops.bn_apply(tensor, coefficients, relu=True)


def convolve(
    plan: UnitPlan, source: Source, weight: _Planned, bias: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """The convolution's output and, if it leaves them, the output's statistics."""
    if plan.native_fprop:
        return ops.conv_fprop(*source, weight, None if bias is None else bias.float(), *plan.geometry)
    x = activation(source)
    if not plan.convolves:
        return x, None
    bias = bias if bias is None or bias.dtype == x.dtype else bias.to(x.dtype)
    return ops.convolution(x, weight, bias, *plan[1:5]), None


def _normalise(plan: UnitPlan, y: Tensor, statistics: Tensor | None, norm: Sequence[_Planned]) -> Tensor:
    weight, bias, running_mean, running_var, num_batches_tracked = norm
    if not plan.normalises:
        table = y.new_zeros((4, y.shape[1]), dtype=ops.acc_dtype(y.dtype))
        table[1:3] = 1
        return table
    if not plan.batch_statistics:
        return ops.bn_coefficients(running_mean, running_var, weight, bias, plan.eps, y.dtype)
    if y.numel() == y.shape[1] and plan.exchange is None:
        raise ValueError(f"Expected more than 1 value per channel when training, got input size {y.size()}")
    statistics = statistics if statistics is not None else ops.bn_statistics(y)
    if plan.exchange is not None:
        statistics = plan.exchange.gather_statistics(statistics)
        # On a GPU the host would have to wait for the counts.
        if statistics.is_cpu and (total := int(statistics[:, 0, 0].sum())) <= 1:
            raise ValueError(
                f"Expected more than 1 value per channel when training, got {total} in all processes of the group"
            )
    return ops.bn_finalize(
        statistics, weight, bias, running_mean, running_var, num_batches_tracked, plan.momentum, plan.eps
    )


class Kept(NamedTuple):
    """What backward reads beside the input and the parameters; one entry per unit."""

    outputs: list[Tensor | None]  # of the convolutions; None: the block's input, or to be computed again
    coefficients: list[Tensor]
    weights: list[Tensor | None]  # that were cast


def per_unit(entries: Sequence) -> list[Sequence]:
    """What is learnt, or stands for it, by unit."""
    return [entries[i : i + LEARNT_PER_UNIT] for i in range(0, len(entries), LEARNT_PER_UNIT)]


def ends_in_convolution(normalises: bool, join: Join, relu: bool) -> bool:
    """Whether a block's output is a convolution's, plus perhaps a shortcut: backward does not need its value then.

    ``normalises``: whether the last unit has a batch norm.
    """
    return not (normalises or relu or join is Join.PROJECTION)


def reads_joined(chain: Sequence[Unit], join: Join, relu: bool) -> bool:
    """Whether backward needs the convolutions' outputs that meet in the join for more than the ReLU's mask.

    Batch statistics do. A frozen batch norm does where its gamma is learnt, unless the weight in front of it is learnt
    as well: gamma's gradient comes from the weight's then. ``chain``: the projection's unit last, if there is one.
    """
    joined = chain[-2:] if join is Join.PROJECTION else chain[-1:]
    if not relu:
        return not ends_in_convolution(joined[0].norm is not None, join, relu)
    return any(_reads_output(u) for u in joined)


def _reads_output(unit: Unit) -> bool:
    conv, norm = unit
    if norm is None or norm.batch_statistics:
        return norm is not None
    learns_weight = conv is not None and conv.weight.requires_grad
    return norm.weight is not None and norm.weight.requires_grad and not learns_weight


def keeps_z(join: Join, relu: bool, minimal: bool, reads_joined: bool) -> bool:
    """Whether backward takes the ReLU's mask from the block's output.

    A shortcut from elsewhere is not kept: it enters linearly. Without one, z, which a consumer keeps anyway, takes the
    place of tensors of its size that would be kept for the mask alone; minimal memory keeps neither.
    """
    return relu and (join is Join.TENSOR or not (reads_joined or minimal))


def keeps_output(i: int, convolves: bool, units: int, join: Join, minimal: bool, reads_joined: bool) -> bool:
    """Whether unit ``i`` of ``units``, the projection's included, has its convolution's output kept for backward."""
    # The join's inputs come back from one convolution each.
    joined = units - 2 if join is Join.PROJECTION else units - 1
    return convolves and not ((minimal or not reads_joined) and i >= joined)


def forward(
    plan: Plan, x: Tensor, shortcut: Tensor | None, tensors: Sequence[Tensor | None]
) -> tuple[Tensor, Kept]:
    """The block's output. ``tensors``: seven per unit in the order of :class:`Conv` and :class:`Norm`."""
    units = [tensors[i : i + TENSORS_PER_UNIT] for i in range(0, len(tensors), TENSORS_PER_UNIT)]
    weights = [plan.weight(i, x, u[0]) for i, u in enumerate(units)]
    outputs: list[Tensor] = []
    coefficients: list[Tensor] = []
    for i, (unit, tensor) in enumerate(zip(plan.units, units, strict=True)):
        source = (x, None) if plan.reads_input(i) else (outputs[-1], coefficients[-1])
        y, statistics = convolve(unit, source, weights[i], tensor[1])
        outputs.append(y)
        coefficients.append(_normalise(unit, y, statistics, tensor[2:]))

    last = plan.last
    if plan.join is Join.PROJECTION:
        join: tuple[Tensor | None, Tensor | None] = (outputs[plan.projection], coefficients[plan.projection])
    else:
        join = (x if plan.join is Join.IDENTITY else shortcut, None)
    if plan.ends_in_convolution and plan.join is Join.NONE:
        z = outputs[last]
    else:
        z = ops.bn_apply(outputs[last], coefficients[last], *join, plan.relu)

    kept = [
        y if keeps_output(i, u.convolves, len(units), plan.join, plan.minimal, plan.reads_joined) else None
        for i, (u, y) in enumerate(zip(plan.units, outputs, strict=True))
    ]
    # With minimal memory weights are cast again.
    cast = [None if plan.minimal or w is u[0] else w for w, u in zip(weights, units, strict=True)]
    return z, Kept(kept, coefficients, cast)


def choose(
    x: Tensor, chain: Sequence[Unit], join: Join, relu: bool, minimal: bool, cast_weights: bool, reads: bool
) -> tuple[Plan, list[Tensor | None]]:
    """The plan of ``chain``, units and projection, on ``x`` under the engine in force, and its tensors.

    ``reads``: :func:`reads_joined`.
    """
    chosen = decide.choices(True, x, chain, join, relu, minimal, cast_weights, reads)
    return assemble(chosen, chain, join, relu, minimal, cast_weights, reads)


def assemble(
    choices: Choices, chain: Sequence[Unit], join: Join, relu: bool, minimal: bool, cast_weights: bool, reads: bool
) -> tuple[Plan, list[Tensor | None]]:
    """:func:`choose` with ``choices``, what is native of each unit."""
    units: list[UnitPlan] = []
    tensors: list[Tensor | None] = []
    for u, (fprop, backward) in zip(chain, choices, strict=True):
        plan, own = _split(u, backward, fprop)
        units.append(plan)
        tensors += own
    return Plan(tuple(units), join, relu, minimal, cast_weights, reads), tensors
