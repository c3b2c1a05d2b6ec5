# SPDX-License-Identifier: BSD-3-Clause
# Copyright (c) the resnet_fused authors
"""A whole residual block as two plain functions of tensors: what is kept, what is recomputed, the order of kernels.

A block is a chain of units (one: ConvBNAct, two: BasicBlock, three: Bottleneck) and a join. Kept for backward are the
block's input, the raw convolution outputs and the per-channel coefficients; the activations between the convolutions
are recomputed from them, and the ReLUs' masks too.

Each convolution is the library's, with one-pass kernels around it, or native: then the batch norm and ReLU in front of
it, and in backward the batch norm behind it, are applied while it reads its operands, and neither the activation nor
the gradient in between exists in memory. Both kinds mix within a block.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
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
_Source = tuple[Tensor, Tensor | None]


def _activation(source: _Source) -> Tensor:
    tensor, coefficients = source
    return tensor if coefficients is None else ops.bn_apply(tensor, coefficients, relu=True)


def _convolve(
    plan: UnitPlan, source: _Source, weight: _Planned, bias: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """The convolution's output and, if it leaves them, the output's statistics."""
    if plan.native_fprop:
        return ops.conv_fprop(*source, weight, None if bias is None else bias.float(), *plan.geometry)
    x = _activation(source)
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


class _Gradient(NamedTuple):
    """The gradient of a convolution's output y: ``a*g + b*y + c`` with ``g``, ``grad`` behind the mask of a ReLU.

    The ReLU is of ``y`` joined with ``shortcut``, or told by ``z``; without ``relu``, ``grad`` is g itself. ``own``:
    the memory of ``grad`` is ours to write over. ``scaled``: a = 1, b = c = 0, the scale is in the weight.
    """

    grad: Tensor
    y: Tensor
    coefficients: Tensor
    backward_coefficients: Tensor
    batch_statistics: bool
    relu: bool = False
    shortcut: Tensor | None = None
    z: Tensor | None = None
    own: bool = False
    scaled: bool = False

    def parts(self) -> tuple[Tensor, Tensor, Tensor]:
        """For a native convolution, which puts the parts together itself."""
        assert not self.relu
        return self.grad, self.y, self.backward_coefficients

    def tensor(self) -> Tensor:
        """For the library's convolution."""
        if self.scaled and not self.relu:
            return self.grad
        arguments = (self.y, self.coefficients, self.backward_coefficients, self.shortcut, self.z)
        # Written over where it may be, so that no memory is touched for the first time.
        apply = ops.bn_backward_apply_ if self.own else ops.bn_backward_apply
        return apply(self.grad, *arguments, self.relu, self.batch_statistics)


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
        y, statistics = _convolve(unit, source, weights[i], tensor[1])
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


def backward(
    plan: Plan,
    needs: Sequence[Any],
    grad: Tensor,
    x: Tensor,
    z: Tensor | None,
    kept: Kept,
    parameters: Sequence[Sequence[_Planned]],
) -> tuple[Tensor | None, Tensor | None, list[list[Tensor | None]]]:
    """The gradients with respect to the input, the shortcut and each unit's parameters.

    Args:
        needs: booleans, which of them: the input's, the shortcut's, four per unit.
        z: the block's output if the plan keeps it.
        parameters: four per unit: the convolution's weight and bias, the batch norm's weight and bias.
    """
    count = len(plan.units)
    outputs: list[_Planned] = list(kept.outputs)
    coefficients = kept.coefficients
    if not plan.units[0].convolves:
        outputs[0] = x  # only the first unit may come without a convolution
    need_x, need_shortcut, *needed = needs
    needs = per_unit(needed)
    weights: list[_Planned] = [
        w if w is not None else plan.weight(i, x, p[0])
        for i, (w, p) in enumerate(zip(kept.weights, parameters, strict=True))
    ]
    grads: list[list[Tensor | None]] = [[None] * LEARNT_PER_UNIT for _ in range(count)]
    sums_of_g: dict[int, Tensor] = {}
    last, projection = plan.last, plan.projection

    def source(i: int) -> _Source:
        return (x, None) if plan.reads_input(i) else (outputs[i - 1], coefficients[i - 1])

    def needs_sums(i: int) -> bool:
        return plan.units[i].batch_statistics or any(needs[i][1:])

    def is_scaled(i: int) -> bool:
        """Whether the scale of frozen batch norm i goes into the weight in front of it, to learn gamma without y."""
        return i >= last and needs[i][2] and not plan.reads_joined

    def scale_weight(i: int, b: Tensor) -> None:
        """Changes unit i's weight, and its batch norm's backward coefficients ``b``, so that dy = g."""
        b[2] = 1
        weight, scale = parameters[i][0], coefficients[i][2]
        scaled = weight.to(scale.dtype) * scale.view(-1, 1, 1, 1)
        weights[i] = plan.weight(i, x, scaled.to(weight.dtype))

    def set_weight_gradient(i: int, found: Tensor) -> None:
        """``found``: with respect to the weight as the passes took it."""
        weight, bias = parameters[i][:2]
        if is_scaled(i):
            # With u = conv(x, w) and y = u + bias, sum(g*u) is the product of w and the gradient of a weight for which
            # dy = g, and gamma's gradient is sum(g*(y - mean))*invstd.
            mean, invstd, scale = coefficients[i][:3]
            found = found.to(scale.dtype)
            used = weight.to(x.dtype) if plan.cast_weights else weight
            centre = mean if bias is None else mean - bias
            own = (found * used).sum((1, 2, 3)) - centre * sums_of_g[i]
            grads[i][2] = (own * invstd).to(parameters[i][2].dtype)
            found = found * scale.view(-1, 1, 1, 1)
        grads[i][0] = found.to(weight.dtype)

    def exchange_sums(tables: dict[int, Tensor], y: Tensor) -> None:
        """Makes backward coefficients, by unit, those of all processes' values; ``y`` is shaped as the units' inputs.

        Gradients of gamma and beta stay this process's own, as all others are.
        """
        exchanges: Any = dict.fromkeys(plan.units[i].exchange for i in tables)
        exchanges.pop(None, None)
        for exchange in exchanges:
            own = [i for i in tables if plan.units[i].exchange == exchange]
            exchange.complete_backward(
                [tables[i] for i in own], [coefficients[i] for i in own], y.numel() // y.shape[1]
            )

    def norm_backward(i: int, sums: Tensor | None, branch: int, y: Tensor) -> Tensor:
        """Batch norm i's own gradients; returns its backward coefficients. ``y``: its input."""
        statistics = plan.units[i].batch_statistics
        if sums is None:  # a frozen one that nothing of is to be learnt: dy = scale*g
            b = coefficients[i].new_zeros((5, coefficients[i].shape[1]))
            b[2] = coefficients[i][2]
            return b
        count = max(y.numel() // y.shape[1], 1)  # the sums over no values are 0
        b = ops.bn_backward_finalize(sums, coefficients[i], branch, count, statistics)
        _, bias, gamma, beta = parameters[i]
        if needs[i][2] and not is_scaled(i):
            grads[i][2] = b[0].to(gamma.dtype)
        if needs[i][3]:
            grads[i][3] = b[1].to(beta.dtype)
        if needs[i][1]:
            # Under batch statistics a bias shifts the mean and nothing else.
            grads[i][1] = torch.zeros_like(bias) if statistics else (b[2] * b[1]).to(bias.dtype)
        if is_scaled(i):
            sums_of_g[i] = b[1]
            scale_weight(i, b)
        return b

    def library_backward(
        i: int, grad_y: Tensor, a: Tensor | None, need_input: bool, need_weight: bool
    ) -> Tensor | None:
        """``a``: what the convolution read, if it is there already."""
        unit = plan.units[i]
        if not unit.convolves:
            return grad_y
        if a is None:  # dgrad reads but its shape
            a = _activation(source(i)) if need_weight else source(i)[0]
        grad_a, grad_weight = ops.convolution_backward(
            grad_y, a, weights[i], *unit[1:5], need_input, need_weight
        )
        if grad_weight is not None:
            set_weight_gradient(i, grad_weight)
        return grad_a

    def native_backward(
        i: int, gradient: _Gradient, need_input: bool, addend: Tensor | None
    ) -> tuple[Tensor | None, Tensor | None]:
        """The gradient of what the unit reads, behind the ReLU in front of it, and its sums if there is one."""
        unit, weight = plan.units[i], weights[i]
        tensor, table = source(i)
        if needs[i][0]:
            dtype = torch.float32 if parameters[i][0].dtype == torch.float32 else weight.dtype
            found = ops.conv_wgrad(
                *gradient.parts(), tensor, table, tuple(weight.shape[2:]), *unit.geometry, dtype
            )
            set_weight_gradient(i, found)
        if not need_input:
            return None, None
        masked_by = (None, None) if table is None else (tensor, table)
        dx, sums = ops.conv_dgrad(
            *gradient.parts(), weight, tuple(tensor.shape[2:]), *unit.geometry, addend, *masked_by
        )
        return dx, None if table is None else sums

    # The join.
    a: Tensor | None = None
    masked: _Planned
    gradient: Any  # of a convolution's output: in parts, or a tensor
    # Where only the mask matters, z stands for the tensors that were joined: their values are not read.
    only_mask = plan.keeps_z and not plan.reads_joined
    if only_mask:
        y = z
    else:
        y = grad if plan.ends_in_convolution else outputs[last]
    if y is None:
        read = source(last)
        if needs[last][0] and not plan.units[last].native:
            a = _activation(read)
            read = (a, None)
        y, _ = _convolve(plan.units[last], read, weights[last], parameters[last][1])
    grad_shortcut: Tensor | None = None
    grad_x: _Planned = None
    if plan.join is Join.PROJECTION:
        s = z if only_mask else outputs[projection]
        if s is None:
            s, _ = _convolve(plan.units[projection], (x, None), weights[projection], parameters[projection][1])
        some_native = plan.units[last].native or plan.units[projection].native
        # Of two convolutions whose weights are scaled the outputs' gradients are the same.
        write = some_native or (is_scaled(last) and is_scaled(projection))
        masked = sums = None
        if write or needs_sums(last) or needs_sums(projection):
            masked, sums, _ = ops.bn_backward_reduce(
                grad, y, coefficients[last], s, coefficients[projection], z, plan.relu, write and plan.relu
            )
        g = masked if plan.relu else grad
        b, b_shortcut = norm_backward(last, sums, 0, y), norm_backward(projection, sums, 1, s)
        exchange_sums({last: b, projection: b_shortcut}, y)
        if write:
            gradient, of_shortcut = (
                _Gradient(g, t, coefficients[i], table, plan.units[i].batch_statistics, scaled=is_scaled(i))
                for i, t, table in ((last, y, b), (projection, s, b_shortcut))
            )
            if plan.units[projection].native:
                grad_x, _ = native_backward(projection, of_shortcut, need_x, None)
            else:
                grad_x = library_backward(projection, of_shortcut.tensor(), x, need_x, needs[projection][0])
        else:
            gradient, grad_s = ops.bn_backward_apply_pair(
                grad,
                y,
                coefficients[last],
                b,
                s,
                coefficients[projection],
                b_shortcut,
                plan.relu,
                plan.units[last].batch_statistics,
                plan.units[projection].batch_statistics,
                z,
            )
            grad_x = library_backward(projection, grad_s, x, need_x, needs[projection][0])
            del grad_s
        del s
    else:
        identity = plan.join is Join.IDENTITY
        s = x if identity and plan.relu and z is None else None
        # Written once, the masked gradient serves the last convolution and the identity: of the block's widest tensor
        # 10 passes instead of 12. It takes a tensor's memory until the identity's share is added, which minimal memory
        # spares; frozen batch norms that nothing of is learnt have no pass that could write it.
        write = plan.relu and (
            need_shortcut
            or plan.units[last].native
            or (identity and need_x and (plan.units[0].native or (needs_sums(last) and not plan.minimal)))
        )
        masked = sums = None
        if write or needs_sums(last):
            masked, sums, _ = ops.bn_backward_reduce(
                grad, y, coefficients[last], s, None, z, plan.relu, write_grad=write
            )
        g = masked if plan.relu else grad
        grad_shortcut = g if need_shortcut else None
        if identity and need_x and (write or not plan.relu):
            grad_x = g
        b = norm_backward(last, sums, 0, y)
        exchange_sums({last: b}, y)
        statistics = plan.units[last].batch_statistics
        if plan.ends_in_convolution:
            gradient = grad
        elif write:
            gradient = _Gradient(g, y, coefficients[last], b, statistics, scaled=is_scaled(last))
        else:
            gradient = _Gradient(grad, y, coefficients[last], b, statistics, plan.relu, s, z)

    # The chain. `gradient` is that of unit i's output.
    grad_a: _Planned = None
    for i in range(last, -1, -1):
        need_input = need_x or any(any(n) for n in needs[:i])
        # A pass over the values in front of a ReLU writes the activation, too: wgrad, which reads it, comes after that.
        delayed = (
            i > 0
            and need_input
            and needs[i][0]
            and a is None
            and not (plan.units[i].native or plan.units[i - 1].native)
            and needs_sums(i - 1)
        )
        sums = None
        if plan.units[i].native:
            addend = None
            if i == 0 and need_x:
                addend, grad_x = grad_x, None
            grad_a, sums = native_backward(i, gradient, need_input, addend)
        else:
            if isinstance(gradient, _Gradient):
                gradient = gradient.tensor()
            grad_a = library_backward(i, gradient, a, need_input, needs[i][0] and not delayed)
        a = None  # freed before the next allocation
        if not delayed:
            gradient = None
        if i == 0 or not need_input:
            break
        unit, below = plan.units[i - 1], outputs[i - 1]
        stopped = sums is not None  # a native dgrad stops the gradient at the ReLU and sums it
        if not stopped:
            if not unit.native:
                grad_a = ops.dense(grad_a)
            # A native convolution takes the masked gradient; else the mask is applied with the coefficients.
            written = None
            if unit.native or needs_sums(i - 1):
                written, sums, a = ops.bn_backward_reduce(
                    grad_a, below, coefficients[i - 1], relu=True, write_grad=unit.native, write_activation=delayed
                )
                if delayed:
                    library_backward(i, gradient, a, False, True)
                gradient = a = None
            stopped = unit.native
            grad_a = written if stopped else grad_a
        b = norm_backward(i - 1, sums, 0, below)
        exchange_sums({i - 1: b}, below)
        gradient = _Gradient(
            grad_a, below, coefficients[i - 1], b, unit.batch_statistics, relu=not stopped, own=True
        )
    if not need_x:
        grad_a = None
    elif plan.units[0].native:
        pass  # the shortcut's gradient was added
    elif plan.join is Join.PROJECTION:
        grad_a = grad_x.add_(grad_a)
    elif plan.join is Join.IDENTITY:
        grad_a = ops.dense(grad_a)
        if grad_x is not None:
            grad_a.add_(grad_x)
        else:
            ops.relu_backward_add_(grad_a, grad, y, coefficients[last], s, z)
    return grad_a, grad_shortcut, grads


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
