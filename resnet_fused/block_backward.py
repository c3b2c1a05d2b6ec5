# SPDX-License-Identifier: BSD-3-Clause
# Copyright (c) the resnet_fused authors
"""Backward of a whole residual block as a plain function of tensors: :func:`backward`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from resnet_fused import ops
from resnet_fused.block import Kept, Plan, Source, activation, convolve, per_unit
from resnet_fused.opaque import LEARNT_PER_UNIT
from resnet_fused.units import Join

# A tensor where the plan has one, else None: a type checker can't tell where that is.
_Planned = Any


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
    run = _Backward(plan, needs, x, z, kept, parameters)
    grad_x = run.through_block(grad)
    return grad_x, run.grad_shortcut, run.grads


class _Backward:
    """One backward, from the join down the chain.

    Attributes:
        gradient: of the output of the unit at hand: in parts, or a tensor.
        activation: what that unit read, if it is there already.
        grad_x: the shortcut's share of the input's gradient, until it is added.
        grad_shortcut, grads: results.

    Tensors are let go as soon as they are used: they are the network's largest.
    """

    def __init__(
        self,
        plan: Plan,
        needs: Sequence[Any],
        x: Tensor,
        z: Tensor | None,
        kept: Kept,
        parameters: Sequence[Sequence[_Planned]],
    ) -> None:
        self.plan, self.x, self.z, self.parameters = plan, x, z, parameters
        self.need_x, self.need_shortcut, *needed = needs
        self.needs = per_unit(needed)
        self.outputs: list[_Planned] = list(kept.outputs)
        self.coefficients = kept.coefficients
        if not plan.units[0].convolves:
            self.outputs[0] = x  # only the first unit may come without a convolution
        self.weights: list[_Planned] = [
            w if w is not None else plan.weight(i, x, p[0])
            for i, (w, p) in enumerate(zip(kept.weights, parameters, strict=True))
        ]
        # Where only the mask matters, z stands for the tensors that were joined: their values are not read.
        self.only_mask = plan.keeps_z and not plan.reads_joined
        self.gradient: Any = None
        self.activation: Tensor | None = None
        self.grad_x: _Planned = None
        self.grad_shortcut: Tensor | None = None
        self.grads: list[list[Tensor | None]] = [[None] * LEARNT_PER_UNIT for _ in plan.units]
        self.sums_of_g: dict[int, Tensor] = {}

    # What a unit is given.

    def source(self, i: int) -> Source:
        return (self.x, None) if self.plan.reads_input(i) else (self.outputs[i - 1], self.coefficients[i - 1])

    def output(self, i: int) -> Tensor:
        """What unit i's convolution gave, a unit in front of the join; computed again if it was not kept."""
        if self.only_mask:
            return self.z  # type: ignore[return-value]
        if self.outputs[i] is not None:
            return self.outputs[i]
        read, unit = self.source(i), self.plan.units[i]
        if i == self.plan.last and self.needs[i][0] and not unit.native:
            self.activation = activation(read)
            read = (self.activation, None)
        y, _ = convolve(unit, read, self.weights[i], self.parameters[i][1])
        return y

    def needs_sums(self, i: int) -> bool:
        return self.plan.units[i].batch_statistics or any(self.needs[i][1:])

    # Frozen batch norms in front of the join, whose gamma is learnt without y.

    def is_scaled(self, i: int) -> bool:
        """Whether the scale of frozen batch norm i goes into the weight in front of it."""
        return i >= self.plan.last and self.needs[i][2] and not self.plan.reads_joined

    def scale_weight(self, i: int, b: Tensor) -> None:
        """Changes unit i's weight, and its batch norm's backward coefficients ``b``, so that dy = g."""
        b[2] = 1
        weight, scale = self.parameters[i][0], self.coefficients[i][2]
        scaled = weight.to(scale.dtype) * scale.view(-1, 1, 1, 1)
        self.weights[i] = self.plan.weight(i, self.x, scaled.to(weight.dtype))

    def set_weight_gradient(self, i: int, found: Tensor) -> None:
        """``found``: with respect to the weight as the passes took it."""
        weight, bias, gamma, _ = self.parameters[i]
        if self.is_scaled(i):
            # With u = conv(x, w) and y = u + bias, sum(g*u) is the product of w and the gradient of a weight for which
            # dy = g, and gamma's gradient is sum(g*(y - mean))*invstd.
            mean, invstd, scale = self.coefficients[i][:3]
            found = found.to(scale.dtype)
            used = weight.to(self.x.dtype) if self.plan.cast_weights else weight
            centre = mean if bias is None else mean - bias
            own = (found * used).sum((1, 2, 3)) - centre * self.sums_of_g[i]
            self.grads[i][2] = (own * invstd).to(gamma.dtype)
            found = found * scale.view(-1, 1, 1, 1)
        self.grads[i][0] = found.to(weight.dtype)

    # One layer.

    def through_norms(self, indices: Sequence[int], sums: Tensor | None, y: Tensor) -> list[Tensor]:
        """The own gradients of the batch norms of a pass; returns their backward coefficients.

        Args:
            indices: their units.
            sums: of that pass, the first unit's and, if there are two, the second one's.
            y: shaped as their inputs.
        """
        tables = {i: self.through_norm(i, sums, branch, y) for branch, i in enumerate(indices)}
        # Coefficients are those of all processes' values; gradients of gamma and beta stay this one's own, as all are.
        exchanges: Any = dict.fromkeys(self.plan.units[i].exchange for i in indices)
        exchanges.pop(None, None)
        for exchange in exchanges:
            own = [i for i in indices if self.plan.units[i].exchange == exchange]
            exchange.complete_backward(
                [tables[i] for i in own], [self.coefficients[i] for i in own], y.numel() // y.shape[1]
            )
        return list(tables.values())

    def through_norm(self, i: int, sums: Tensor | None, branch: int, y: Tensor) -> Tensor:
        """One of :meth:`through_norms`, as this process's values have it."""
        statistics, needs = self.plan.units[i].batch_statistics, self.needs[i]
        if sums is None:  # a frozen one that nothing of is to be learnt: dy = scale*g
            b = self.coefficients[i].new_zeros((5, self.coefficients[i].shape[1]))
            b[2] = self.coefficients[i][2]
            return b
        count = max(y.numel() // y.shape[1], 1)  # the sums over no values are 0
        b = ops.bn_backward_finalize(sums, self.coefficients[i], branch, count, statistics)
        _, bias, gamma, beta = self.parameters[i]
        if needs[2] and not self.is_scaled(i):
            self.grads[i][2] = b[0].to(gamma.dtype)
        if needs[3]:
            self.grads[i][3] = b[1].to(beta.dtype)
        if needs[1]:
            # Under batch statistics a bias shifts the mean and nothing else.
            self.grads[i][1] = torch.zeros_like(bias) if statistics else (b[2] * b[1]).to(bias.dtype)
        if self.is_scaled(i):
            self.sums_of_g[i] = b[1]
            self.scale_weight(i, b)
        return b

    def through_library(
        self, i: int, grad_y: Tensor, a: Tensor | None, need_input: bool, need_weight: bool
    ) -> Tensor | None:
        """``a``: what the convolution read, if it is there already."""
        unit = self.plan.units[i]
        if not unit.convolves:
            return grad_y
        if a is None:  # dgrad reads but its shape
            a = activation(self.source(i)) if need_weight else self.source(i)[0]
        grad_a, grad_weight = ops.convolution_backward(
            grad_y, a, self.weights[i], *unit[1:5], need_input, need_weight
        )
        if grad_weight is not None:
            self.set_weight_gradient(i, grad_weight)
        return grad_a

    def through_native(
        self, i: int, gradient: _Gradient, need_input: bool, addend: Tensor | None
    ) -> tuple[Tensor | None, Tensor | None]:
        """The gradient of what the unit reads, behind the ReLU in front of it, and its sums if there is one."""
        unit, weight = self.plan.units[i], self.weights[i]
        tensor, table = self.source(i)
        if self.needs[i][0]:
            dtype = torch.float32 if self.parameters[i][0].dtype == torch.float32 else weight.dtype
            if need_input and ops.reads_once(tensor, weight, *unit.geometry):
                dx, sums, found = ops.conv_backward(
                    *gradient.parts(), weight, tensor, table, *unit.geometry, addend, dtype
                )
                self.set_weight_gradient(i, found)
                return dx, None if table is None else sums
            found = ops.conv_wgrad(
                *gradient.parts(), tensor, table, tuple(weight.shape[2:]), *unit.geometry, dtype
            )
            self.set_weight_gradient(i, found)
        if not need_input:
            return None, None
        masked_by = (None, None) if table is None else (tensor, table)
        dx, sums = ops.conv_dgrad(
            *gradient.parts(), weight, tuple(tensor.shape[2:]), *unit.geometry, addend, *masked_by
        )
        return dx, None if table is None else sums

    # The block.

    def through_block(self, grad: Tensor) -> Tensor | None:
        """The input's gradient. ``grad``: the output's."""
        plan = self.plan
        if plan.join is Join.PROJECTION:
            self.through_projection(grad)
            return self.with_share(self.through_chain())
        y = grad if plan.ends_in_convolution else self.output(plan.last)
        s = self.x if plan.join is Join.IDENTITY and plan.relu and self.z is None else None
        self.through_join(grad, y, s)
        masks_late = plan.join is Join.IDENTITY and self.need_x and self.grad_x is None
        if not masks_late:
            del y, s
            return self.with_share(self.through_chain())
        grad_a = ops.dense(self.through_chain())
        ops.relu_backward_add_(grad_a, grad, y, self.coefficients[plan.last], s, self.z)
        return grad_a

    def with_share(self, grad_a: _Planned) -> Tensor | None:
        """The input's gradient with the shortcut's share of it; a first native dgrad has added that already."""
        if not self.need_x:
            return None
        if self.grad_x is None:
            return grad_a
        if self.plan.join is Join.PROJECTION:
            return self.grad_x.add_(grad_a)
        return ops.dense(grad_a).add_(self.grad_x)

    def through_projection(self, grad: Tensor) -> None:
        """The join with a projection, and that."""
        plan, last, projection = self.plan, self.plan.last, self.plan.projection
        y, s = self.output(last), self.output(projection)
        some_native = plan.units[last].native or plan.units[projection].native
        # Of two convolutions whose weights are scaled the outputs' gradients are the same.
        write = some_native or (self.is_scaled(last) and self.is_scaled(projection))
        masked = sums = None
        if write or self.needs_sums(last) or self.needs_sums(projection):
            tables = self.coefficients[last], self.coefficients[projection]
            masked, sums, _ = ops.bn_backward_reduce(
                grad, y, tables[0], s, tables[1], self.z, plan.relu, write and plan.relu
            )
        b, b_shortcut = self.through_norms((last, projection), sums, y)
        if not write:
            self.gradient, grad_s = ops.bn_backward_apply_pair(
                grad,
                y,
                self.coefficients[last],
                b,
                s,
                self.coefficients[projection],
                b_shortcut,
                plan.relu,
                plan.units[last].batch_statistics,
                plan.units[projection].batch_statistics,
                self.z,
            )
            del y, s
            self.grad_x = self.through_library(projection, grad_s, self.x, self.need_x, self.needs[projection][0])
            return
        g: _Planned = masked if plan.relu else grad
        self.gradient, of_shortcut = (
            _Gradient(g, t, self.coefficients[i], table, plan.units[i].batch_statistics, scaled=self.is_scaled(i))
            for i, t, table in ((last, y, b), (projection, s, b_shortcut))
        )
        if plan.units[projection].native:
            self.grad_x, _ = self.through_native(projection, of_shortcut, self.need_x, None)
        else:
            grad_s = of_shortcut.tensor()
            self.grad_x = self.through_library(projection, grad_s, self.x, self.need_x, self.needs[projection][0])

    def through_join(self, grad: Tensor, y: Tensor, s: Tensor | None) -> None:
        """The join with a tensor, or with none. ``s``: the shortcut, if the mask is told by it."""
        plan, last = self.plan, self.plan.last
        identity = plan.join is Join.IDENTITY and self.need_x
        # Written once, the masked gradient serves the last convolution and the identity: of the block's widest tensor
        # 10 passes instead of 12. It takes a tensor's memory until the identity's share is added, which minimal memory
        # spares; frozen batch norms that nothing of is learnt have no pass that could write it.
        write = plan.relu and (
            self.need_shortcut
            or plan.units[last].native
            or (identity and (plan.units[0].native or (self.needs_sums(last) and not plan.minimal)))
        )
        masked: _Planned = None
        sums = None
        if write or self.needs_sums(last):
            masked, sums, _ = ops.bn_backward_reduce(
                grad, y, self.coefficients[last], s, None, self.z, plan.relu, write_grad=write
            )
        g = masked if plan.relu else grad
        if self.need_shortcut:
            self.grad_shortcut = g
        if identity and (write or not plan.relu):
            self.grad_x = g
        (b,) = self.through_norms((last,), sums, y)
        statistics = plan.units[last].batch_statistics
        if plan.ends_in_convolution:
            self.gradient = grad
        elif write:
            scaled = self.is_scaled(last)
            self.gradient = _Gradient(g, y, self.coefficients[last], b, statistics, scaled=scaled)
        else:
            self.gradient = _Gradient(grad, y, self.coefficients[last], b, statistics, plan.relu, s, self.z)

    def through_chain(self) -> _Planned:
        """The gradient of what the first unit read, if that is needed."""
        for i in range(self.plan.last, -1, -1):
            need_input = self.need_x or any(any(n) for n in self.needs[:i])
            delayed = need_input and self.delays_wgrad(i)
            grad_a, sums = self.through_convolution(i, need_input, delayed)
            if i == 0 or not need_input:
                return grad_a
            self.through_activation(i - 1, grad_a, sums, delayed)
            del grad_a
        raise AssertionError("a chain has a unit")

    def delays_wgrad(self, i: int) -> bool:
        """Whether unit i's wgrad waits for a pass over the values in front of a ReLU, which writes what it reads."""
        units = self.plan.units
        return (
            i > 0
            and self.needs[i][0]
            and self.activation is None
            and not (units[i].native or units[i - 1].native)
            and self.needs_sums(i - 1)
        )

    def through_convolution(
        self, i: int, need_input: bool, delayed: bool
    ) -> tuple[_Planned, Tensor | None]:
        """The gradient of what unit i read; sums if that is the gradient behind the ReLU in front, as native ones'."""
        a, self.activation = self.activation, None
        if self.plan.units[i].native:
            gradient, self.gradient = self.gradient, None
            addend = None
            if i == 0 and self.need_x:
                addend, self.grad_x = self.grad_x, None
            return self.through_native(i, gradient, need_input, addend)
        if isinstance(self.gradient, _Gradient):
            self.gradient = self.gradient.tensor()
        grad_a = self.through_library(i, self.gradient, a, need_input, self.needs[i][0] and not delayed)
        if not delayed:
            self.gradient = None
        return grad_a, None

    def through_activation(self, i: int, grad_a: _Planned, sums: Tensor | None, delayed: bool) -> None:
        """The batch norm and ReLU of unit i. ``delayed``: the wgrad of the unit behind it is still to be had."""
        unit, below = self.plan.units[i], self.outputs[i]
        stopped = sums is not None  # a native dgrad stops the gradient at the ReLU and sums it
        if not stopped:
            if not unit.native:
                grad_a = ops.dense(grad_a)
            # A native convolution takes the masked gradient; else the mask is applied with the coefficients.
            written = None
            if unit.native or self.needs_sums(i):
                written, sums, a = ops.bn_backward_reduce(
                    grad_a, below, self.coefficients[i], relu=True, write_grad=unit.native, write_activation=delayed
                )
                if delayed:
                    self.through_library(i + 1, self.gradient, a, False, True)
            stopped = unit.native
            grad_a = written if stopped else grad_a
        (b,) = self.through_norms((i,), sums, below)
        self.gradient = _Gradient(
            grad_a, below, self.coefficients[i], b, unit.batch_statistics, relu=not stopped, own=True
        )
