# SPDX-License-Identifier: BSD-3-Clause
# Copyright (c) the resnet_fused authors
"""The kernel vocabulary: one thin function per dispatcher operator; `fake_kernels` has what each gives in shape.

The only file that names ``torch.ops``. Everywhere below:

* ``y``, ``grad``, ``shortcut``, ``z``: ``[N, C, H, W]`` of one dtype (float64, float32, bfloat16, float16), in any
  layout; kernels walk channels_last and contiguous memory directly, anything else is copied first.
* *acc* is float64 for float64 and float32 for all others.
* ``coefficients``: ``[4, C]`` acc, the rows mean, invstd, scale, shift, with ``scale = weight * invstd`` and
  ``shift = bias - mean * scale``.
* ``backward_coefficients``: ``[5, C]`` acc, the rows d_weight, d_bias, a, b, c, with ``dy = a*g + b*y + c``.

Every operator checks its arguments and raises ``ValueError`` (shape, device, range) or ``TypeError`` (dtype) naming
the argument. Results are the same bits from run to run and for any number of threads.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Sequence

import torch
from torch import Tensor

from resnet_fused import _C
from resnet_fused.units import output_plane

_ops = torch.ops.resnet_fused
_WITH_CUDA: bool = _C.build_info()["cuda"]


def acc_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which kernels accumulate for activations of ``dtype``."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def dense(t: Tensor) -> Tensor:
    """``t`` ``[N, C, H, W]``, copied if it is dense in neither channels_last nor contiguous layout."""
    if t.is_contiguous(memory_format=torch.channels_last):
        return t
    return t.contiguous()


def to_channels_last(t: Tensor) -> Tensor:
    """``t`` ``[N, C, H, W]``, copied if it is not channels_last."""
    with _pooling(t):
        return t.contiguous(memory_format=torch.channels_last)


def to_contiguous(t: Tensor) -> Tensor:
    """``t`` ``[N, C, H, W]``, copied if it is not contiguous."""
    with _pooling(t):
        return t.contiguous()


def empty_cache() -> None:
    """Return to the system the CPU memory that waits to be used again.

    Outputs and gradients of at least 1 MiB that fused code allocates on the CPU come from memory that is kept when
    they are freed: at most as much as was in use together since the last call of this, each block until it waited
    for 1024 allocations.
    """
    _C.empty_memory_pool()


def has_kernels(device: torch.device) -> bool:
    """Whether this build serves tensors on ``device``."""
    return device.type == "cpu" or (device.type == "cuda" and _WITH_CUDA)


def bn_statistics(y: Tensor) -> Tensor:
    """Per-channel count, mean and M2 (sum of squared deviations) of ``y``: ``[tiles, 3, C]`` acc.

    How many tiles depends on the shape and layout alone; one on the CPU.
    """
    return _ops.bn_statistics(y)


def bn_merge_statistics(statistics: Tensor) -> Tensor:
    """``statistics`` ``[tiles, 3, C]`` as one tile, ``[1, 3, C]``, merged as in :func:`bn_finalize`."""
    return _ops.bn_merge_statistics(statistics) if len(statistics) != 1 else statistics


def bn_finalize(
    statistics: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    num_batches_tracked: Tensor | None,
    momentum: float | None,
    eps: float,
) -> Tensor:
    """Merge ``statistics`` ``[tiles, 3, C]`` into ``coefficients``; update the running statistics in place.

    Merging is Chan, Golub & LeVeque's (1979), in an order that the number of tiles fixes. ``running_var`` takes the
    unbiased variance. ``num_batches_tracked`` (one int64) is incremented; ``momentum=None`` is the cumulative average.
    """
    return _ops.bn_finalize(
        statistics, weight, bias, running_mean, running_var, num_batches_tracked, momentum, eps
    )


def bn_coefficients(
    running_mean: Tensor,
    running_var: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    dtype: torch.dtype,
) -> Tensor:
    """``coefficients`` of an evaluating or frozen batch norm, for activations of ``dtype``."""
    return _ops.bn_coefficients.default(running_mean, running_var, weight, bias, eps, acc_dtype(dtype))


def bn_apply(
    y: Tensor,
    coefficients: Tensor,
    shortcut: Tensor | None = None,
    shortcut_coefficients: Tensor | None = None,
    relu: bool = False,
) -> Tensor:
    """``relu(scale*y + shift + s)``, ``s`` being the shortcut, or its own affine with ``shortcut_coefficients``."""
    return _ops.bn_apply.default(y, coefficients, shortcut, shortcut_coefficients, relu)


def bn_backward_reduce(
    grad: Tensor,
    y: Tensor,
    coefficients: Tensor,
    shortcut: Tensor | None = None,
    shortcut_coefficients: Tensor | None = None,
    z: Tensor | None = None,
    relu: bool = False,
    write_grad: bool = False,
    write_activation: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """The sums of one or two batch norms' backward over ``g``, the gradient behind the ReLU.

    Returns ``(g, sums, activation)``: ``g`` like ``y`` if ``write_grad``, else empty; ``sums`` ``[tiles, 2, C]`` acc,
    tiles as in :func:`bn_statistics`: sum of g, sum of g*(y - mean); with ``shortcut_coefficients`` a third row, sum
    of g*(shortcut - its mean); ``activation`` ``relu(scale*y + shift)`` like ``y`` if ``write_activation``, which
    allows for no shortcut, else empty. The ReLU's mask is ``z > 0`` if ``z`` is given, else recomputed from ``y`` and
    ``shortcut``.
    """
    return _ops.bn_backward_reduce(
        grad, y, coefficients, shortcut, shortcut_coefficients, z, relu, write_grad, write_activation
    )


def bn_backward_finalize(
    sums: Tensor, coefficients: Tensor, branch: int, count: int, batch_statistics: bool
) -> Tensor:
    """``backward_coefficients`` of branch 0 (``y``) or 1 (the shortcut) from the sums over ``count`` values."""
    return _ops.bn_backward_finalize(sums, coefficients, branch, count, batch_statistics)


def bn_backward_merge_(backward_coefficients: Tensor, gathered: Tensor, coefficients: Tensor, branch: int) -> Tensor:
    """Write b and c of ``backward_coefficients`` as they are over the values of several processes, and return it.

    ``gathered`` ``[processes, 3 or 5, C]``, summed in the order of its first dimension: each process's d_weight and
    d_bias, of one branch or two, and how many values per channel it has.
    """
    _ops.bn_backward_merge_(backward_coefficients, gathered, coefficients, branch)
    return backward_coefficients


def bn_backward_apply(
    grad: Tensor,
    y: Tensor,
    coefficients: Tensor,
    backward_coefficients: Tensor,
    shortcut: Tensor | None = None,
    z: Tensor | None = None,
    relu: bool = False,
    batch_statistics: bool = True,
) -> Tensor:
    """``dy = a*g + b*y + c`` (``a*g`` without batch statistics), ``g`` being ``grad`` behind the ReLU."""
    return _ops.bn_backward_apply(
        grad, y, coefficients, backward_coefficients, shortcut, z, relu, batch_statistics
    )


def bn_backward_apply_(
    grad: Tensor,
    y: Tensor,
    coefficients: Tensor,
    backward_coefficients: Tensor,
    shortcut: Tensor | None = None,
    z: Tensor | None = None,
    relu: bool = False,
    batch_statistics: bool = True,
) -> Tensor:
    """:func:`bn_backward_apply` that writes over ``grad``, which must be dense, and returns it."""
    _ops.bn_backward_apply_(
        grad, y, coefficients, backward_coefficients, shortcut, z, relu, batch_statistics
    )
    return grad


def bn_backward_apply_pair(
    grad: Tensor,
    y: Tensor,
    coefficients: Tensor,
    backward_coefficients: Tensor,
    shortcut: Tensor,
    shortcut_coefficients: Tensor,
    shortcut_backward_coefficients: Tensor,
    relu: bool,
    batch_statistics: bool,
    shortcut_batch_statistics: bool,
    z: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """``(dy, dshortcut)`` of the join of two batch norms, from one read of the gradient.

    The mask as in :func:`bn_backward_reduce`.
    """
    return _ops.bn_backward_apply_pair(
        grad,
        y,
        coefficients,
        backward_coefficients,
        shortcut,
        shortcut_coefficients,
        shortcut_backward_coefficients,
        relu,
        batch_statistics,
        shortcut_batch_statistics,
        z,
    )


def relu_backward_add_(
    out: Tensor,
    grad: Tensor,
    y: Tensor,
    coefficients: Tensor,
    shortcut: Tensor | None = None,
    z: Tensor | None = None,
) -> Tensor:
    """``out += grad`` where the ReLU passed; ``out`` must be dense. The mask as in :func:`bn_backward_reduce`."""
    _ops.relu_backward_add_(out, grad, y, coefficients, shortcut, z)
    return out


def all_gather(t: Tensor, processes: int, group: str) -> Tensor:
    """``t`` ``[1, ...]`` of each of ``processes`` in the group of that name, in the order of their ranks:
    ``[processes, ...]``. Without gradients; the host does not wait for a GPU."""
    functional = torch.ops._c10d_functional
    return functional.wait_tensor(functional.all_gather_into_tensor(t.contiguous(), processes, group))


# Pixels of a plane up to which the library's 1x1 convolutions of 16-bit tensors are slower on the CPU than the same
# matrix product over all images: measured with oneDNN 3 (AVX-512), wgrad by 1.2 to 1.9, fprop and dgrad by 1.2.
_MATMUL_PLANE = 8 * 8
_MATMUL_PLANE_WGRAD = 28 * 28


def _is_matmul(
    x: Tensor,
    weight: Tensor,
    stride: tuple[int, int],
    padding: tuple[int, int],
    groups: int,
    pixels: int,
) -> bool:
    """Whether a convolution of ``x`` is a matrix product of views, and planes are small enough to compute it as one."""
    return (
        x.dtype in (torch.bfloat16, torch.float16)
        and x.is_cpu
        and tuple(weight.shape[2:]) == (1, 1)
        and tuple(stride) == (1, 1)
        and tuple(padding) == (0, 0)
        and groups == 1
        and 1 < x.shape[2] * x.shape[3] <= pixels
        and x.is_contiguous(memory_format=torch.channels_last)
    )


def _rows(t: Tensor) -> Tensor:
    """``[N, C, H, W]`` channels_last as ``[N*H*W, C]``."""
    return t.permute(0, 2, 3, 1).reshape(-1, t.shape[1])


def _planes(rows: Tensor, like: Tensor) -> Tensor:
    """``[N*H*W, C]`` as ``[N, C, H, W]`` channels_last, N, H and W being ``like``'s."""
    n, _, h, w = like.shape
    return rows.view(n, h, w, -1).permute(0, 3, 1, 2)


# Bytes of an input below which an operator's output, up to four times as many, is left to the C library: the pool
# takes blocks of 1 MiB.
_POOLED_INPUT = 1 << 18
_NO_POOLING = contextlib.nullcontext()


def _pools(x: Tensor) -> bool:
    return x.is_cpu and not torch.compiler.is_compiling() and x.nbytes >= _POOLED_INPUT


def _pooling(x: Tensor) -> contextlib.AbstractContextManager[None]:
    """What an operator of PyTorch allocates for ``x`` on the CPU comes from the memory pool, too."""
    if not _pools(x):
        return _NO_POOLING
    return _C.Pooling()


def convolution(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: tuple[int, int],
    padding: tuple[int, int],
    dilation: tuple[int, int],
    groups: int,
) -> Tensor:
    """fprop of the library's convolution."""
    if x.dtype == torch.float32 and not _pools(x):  # small, where every step in Python counts
        return torch.conv2d(x, weight, bias, stride, padding, dilation, groups)
    with _pooling(x):
        if _is_matmul(x, weight, stride, padding, groups, _MATMUL_PLANE):
            return _planes(torch.nn.functional.linear(_rows(x), weight.flatten(1), bias), x)
        return torch.conv2d(x, weight, bias, stride, padding, dilation, groups)


def convolution_backward(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    stride: tuple[int, int],
    padding: tuple[int, int],
    dilation: tuple[int, int],
    groups: int,
    need_input: bool,
    need_weight: bool,
) -> tuple[Tensor | None, Tensor | None]:
    """dgrad and wgrad of the library's convolution, ``None`` for what is not needed."""
    grad_x = grad_weight = None
    with _pooling(x):
        if grad.is_contiguous(memory_format=torch.channels_last):
            if need_input and _is_matmul(x, weight, stride, padding, groups, _MATMUL_PLANE):
                grad_x = _planes(_rows(grad) @ weight.flatten(1), x)
            if need_weight and _is_matmul(x, weight, stride, padding, groups, _MATMUL_PLANE_WGRAD):
                grad_weight = (_rows(grad).t() @ _rows(x)).view_as(weight)
        left = (need_input and grad_x is None, need_weight and grad_weight is None, False)
        if any(left):
            of_input, of_weight, _ = torch.ops.aten.convolution_backward(
                grad, x, weight, None, stride, padding, dilation, False, (0, 0), groups, left
            )
            grad_x = of_input if left[0] else grad_x
            grad_weight = of_weight if left[1] else grad_weight
    return grad_x, grad_weight


# Of native convolutions, by the names that the extension has for them.
NATIVE_DTYPES = {torch.bfloat16: "bfloat16", torch.float16: "float16", torch.float32: "float32"}
# By device: a multiple of channels, at most so many, taps, stride, pixels. Read where torch.compile does not trace.
_NATIVE_LIMITS: dict[str, tuple[int, int, int, int, int]] = {
    device: _C.native_limits(device) for device in (("cpu", "cuda") if _WITH_CUDA else ("cpu",))
}
# What this processor multiplies; a GPU that has native convolutions at all multiplies every dtype of theirs.
_CPU_MULTIPLIES = {dtype: _C.native_multiplies("cpu", name) for dtype, name in NATIVE_DTYPES.items()}


def conv_algorithm(
    dtype: torch.dtype,
    x_shape: Sequence[int],
    weight_shape: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    packed: bool,
) -> str:
    """How the CPU's native ``conv_fprop_inference`` of such sizes multiplies.

    Args:
        packed: with weights of ``conv_pack``.

    Returns:
        ``"winograd"``; of direct sums ``"registers"``, by vectors of the processor, or ``"microkernel"``, by oneDNN's.
    """
    sizes = (x_shape, weight_shape, stride, padding, dilation)
    x, weight, strides, pads, dilations = ([int(v) for v in values] for values in sizes)
    return _C.conv_algorithm(NATIVE_DTYPES[dtype], x, weight, strides, pads, dilations, packed)


def native_device_reason(device: torch.device) -> str | None:
    """Why no convolution on ``device`` is native; None if some are."""
    if device.type == "cpu":
        return None if any(_CPU_MULTIPLIES.values()) else "this PyTorch has no microkernel for this processor"
    if device.type != "cuda" or not _WITH_CUDA:
        return f"no native convolutions for device {device}"
    if not torch.cuda.is_available():
        return "no GPU is visible"
    return _native_build_reason(torch.cuda.current_device() if device.index is None else device.index)


@functools.cache
def _native_build_reason(index: int) -> str | None:
    return _C.native_build_reason(f"cuda:{index}") or None


def native_reason(
    x: Tensor,
    weight: Tensor,
    stride: tuple[int, int],
    padding: tuple[int, int],
    dilation: tuple[int, int],
    groups: int,
) -> str | None:
    """Why the native convolutions do not take ``weight`` ``[K, C, R, S]`` on inputs like ``x``; None if they do."""
    if reason := native_device_reason(x.device):
        return reason
    if x.dtype not in NATIVE_DTYPES:
        return f"dtype {x.dtype}; native are bfloat16, float16 and float32 (on a GPU as TF32)"
    if x.device.type == "cpu":
        if not _CPU_MULTIPLIES[x.dtype]:
            return f"this processor or PyTorch has no microkernel for {x.dtype}"
    # cudnn.conv is an attribute that torch's annotations lack.
    elif x.dtype == torch.float32 and torch.backends.cudnn.conv.fp32_precision != "tf32":  # type: ignore[attr-defined]
        return "float32, and torch.backends.cudnn.conv.fp32_precision does not allow TF32"
    if not x.is_contiguous(memory_format=torch.channels_last):
        return "the input is not channels_last"
    return _native_shape_reason(_NATIVE_LIMITS[x.device.type], x.shape, weight.shape, stride, padding, dilation, groups)


@functools.lru_cache(maxsize=4096)  # it is asked for every unit in every call
def _native_shape_reason(
    limits: tuple[int, int, int, int, int],
    shape: torch.Size,
    filter: torch.Size,
    stride: tuple[int, int],
    padding: tuple[int, int],
    dilation: tuple[int, int],
    groups: int,
) -> str | None:
    multiple, most, taps, steps, pixels = limits
    channels = (filter[1], filter[0])
    if groups != 1:
        return f"groups={groups}"
    if any(c % multiple or c > most for c in channels):
        return f"channels {channels}; native are multiples of {multiple} up to {most}"
    if max(filter[2:]) > taps:
        return f"a filter of {tuple(filter[2:])}; native are up to {taps} taps"
    if max(stride) > steps:
        return f"stride={tuple(stride)}; native are up to {steps}"
    if min(padding) < 0:
        return f"padding={tuple(padding)}"
    planes = (shape[2:], output_plane(shape[2:], filter[2:], stride, padding, dilation))
    if any(shape[0] * height * width > pixels for height, width in planes):
        return f"input {tuple(shape)}; native are up to {pixels} pixels"
    return None


def casts_weight(x: Tensor, weight: Tensor) -> bool:
    """Whether native convolutions of ``x`` take ``weight`` as it is and round it to x's dtype."""
    return x.device.type == "cpu" and weight.dtype == torch.float32


def conv_fprop(
    x: Tensor,
    coefficients: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    stride: tuple[int, int],
    padding: tuple[int, int],
    dilation: tuple[int, int],
) -> tuple[Tensor, Tensor]:
    """``(y, statistics)`` of a native convolution of ``x``, or with ``coefficients`` of ``relu(scale*x + shift)``.

    Args:
        x: ``[N, C, H, W]`` channels_last, bfloat16, float16, or float32, which a GPU multiplies as TF32. Padding is
            zero behind the ReLU.
        coefficients: ``[4, C]`` float32.
        weight: ``[K, C, R, S]`` of x's dtype; on the CPU float32 as well, which is rounded to it.
        bias: ``[K]`` float32.

    Returns:
        y ``[N, K, P, Q]`` channels_last, and the stored y's statistics ``[tiles, 3, K]`` for :func:`bn_finalize`.
    """
    return _ops.conv_fprop(x, coefficients, weight, bias, stride, padding, dilation)


def conv_fprop_inference(
    x: Tensor,
    coefficients: Tensor | None,
    weight: Tensor,
    affine: Tensor,
    shortcut: Tensor | None,
    relu: bool,
    stride: tuple[int, int],
    padding: tuple[int, int],
    dilation: tuple[int, int],
    packed: Tensor | None = None,
) -> Tensor:
    """``relu(scale*conv(x) + shift + shortcut)``, with ``affine`` ``[4, K]``; the rest as in :func:`conv_fprop`.

    ``packed``: what :func:`conv_pack` made of ``weight``, which is then not read; CPU.
    """
    return _ops.conv_fprop_inference(
        x, coefficients, weight, affine, shortcut, relu, stride, padding, dilation, packed
    )


def conv_pack(
    weight: Tensor,
    dtype: torch.dtype,
    stride: tuple[int, int],
    padding: tuple[int, int],
    dilation: tuple[int, int],
) -> Tensor:
    """``weight`` ``[K, C, R, S]`` (float32 or ``dtype``) as a native convolution of ``dtype`` multiplies it: one
    dimension of ``dtype``, for inputs of any size, on this processor. CPU."""
    return _ops.conv_pack(weight, dtype, stride, padding, dilation)


def conv_dgrad(
    grad: Tensor,
    y: Tensor | None,
    backward_coefficients: Tensor | None,
    weight: Tensor,
    input_plane: Sequence[int],
    stride: tuple[int, int],
    padding: tuple[int, int],
    dilation: tuple[int, int],
    addend: Tensor | None = None,
    mask_y: Tensor | None = None,
    mask_coefficients: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """``(dx, sums)``: a native convolution's gradient with respect to its input of plane ``input_plane`` (H, W).

    The output's gradient is ``grad``, or ``a*grad + b*y + c`` with ``y`` and ``backward_coefficients`` ``[5, K]``.
    ``addend`` is added to dx. With ``mask_y`` and ``mask_coefficients`` ``[4, C]``, dx is stopped where
    ``scale*mask_y + shift`` is not positive, and ``sums`` ``[tiles, 2, C]`` are those of :func:`bn_backward_reduce`
    over what is left; else sums are empty.
    """
    return _ops.conv_dgrad(
        grad,
        y,
        backward_coefficients,
        weight,
        input_plane,
        stride,
        padding,
        dilation,
        addend,
        mask_y,
        mask_coefficients,
    )


def conv_wgrad(
    grad: Tensor,
    y: Tensor | None,
    backward_coefficients: Tensor | None,
    x: Tensor,
    coefficients: Tensor | None,
    filter: tuple[int, int],
    stride: tuple[int, int],
    padding: tuple[int, int],
    dilation: tuple[int, int],
    dtype: torch.dtype,
) -> Tensor:
    """A native convolution's gradient with respect to its weight, ``[K, C, *filter]`` channels_last.

    The output's gradient as in :func:`conv_dgrad`, the input as in :func:`conv_fprop`; ``dtype`` is float32 or x's.
    Sums are float32 and in a fixed order.
    """
    return _ops.conv_wgrad(
        grad, y, backward_coefficients, x, coefficients, filter, stride, padding, dilation, dtype
    )


def reads_once(
    x: Tensor, weight: Tensor, stride: tuple[int, int], padding: tuple[int, int], dilation: tuple[int, int]
) -> bool:
    """Whether :func:`conv_backward` of a native convolution is one kernel, where the output's gradient has ``y``."""
    geometry = (stride, padding, dilation)
    return x.device.type == "cuda" and _reads_once(NATIVE_DTYPES[x.dtype], x.shape, weight.shape, *geometry)


@functools.lru_cache(maxsize=4096)  # as _native_shape_reason
def _reads_once(dtype: str, *sizes: Sequence[int]) -> bool:
    return _C.conv_tiles("cuda", dtype, "one_read", *map(list, sizes)) > 0


def conv_backward(
    grad: Tensor,
    y: Tensor | None,
    backward_coefficients: Tensor | None,
    weight: Tensor,
    x: Tensor,
    coefficients: Tensor | None,
    stride: tuple[int, int],
    padding: tuple[int, int],
    dilation: tuple[int, int],
    addend: Tensor | None,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor]:
    """``(dx, sums, dw)``: a native convolution's gradients with respect to both of its operands.

    What :func:`conv_dgrad` gives, masked by ``x`` where that comes with ``coefficients``, and :func:`conv_wgrad` in
    ``dtype``. Narrow 1x1 filters have a kernel on CUDA that reads all tensors once (:func:`reads_once`): it sums in
    another order, and ``sums`` has other tiles.
    """
    return _ops.conv_backward(
        grad, y, backward_coefficients, weight, x, coefficients, stride, padding, dilation, addend, dtype
    )


MOST_POOL_TAPS = 255  # of a window of max_pool2d: a byte says which one


def pooled_plane(
    plane: Sequence[int],
    kernel_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    ceil_mode: bool,
) -> list[int]:
    """Height and width of what :func:`max_pool2d` makes of ``plane`` (H, W)."""
    if not ceil_mode:
        return output_plane(plane, kernel_size, stride, padding, dilation)
    # Rounded up, without a last window that would begin in the padding behind the input.
    padded = [n + s - 1 for n, s in zip(plane, stride, strict=True)]
    most = output_plane(padded, kernel_size, stride, padding, dilation)
    return [
        m - 1 if (m - 1) * s >= n + p else m for m, n, s, p in zip(most, plane, stride, padding, strict=True)
    ]


def max_pool2d(
    x: Tensor,
    kernel_size: tuple[int, int],
    stride: tuple[int, int],
    padding: tuple[int, int],
    dilation: tuple[int, int],
    ceil_mode: bool,
    write_taps: bool,
) -> tuple[Tensor, Tensor]:
    """``(z, taps)``: the maxima of ``x``'s windows, to the bit PyTorch's, and with ``write_taps`` where they were. CPU.

    Args:
        x: ``[N, C, H, W]`` float32, bfloat16 or float16; copied if it is not channels_last.
        kernel_size, stride, padding, dilation, ceil_mode: as in ``nn.MaxPool2d``; at most 255 positions in a window.

    Returns:
        z ``[N, C, P, Q]`` channels_last; taps uint8 like z, the maximum's position in its window counted row by row:
        the first of equal ones, the last NaN if there are any. Empty without ``write_taps``.
    """
    return _ops.max_pool2d.default(x, kernel_size, stride, padding, dilation, ceil_mode, write_taps)


def max_pool2d_backward(
    grad: Tensor,
    taps: Tensor,
    input_plane: Sequence[int],
    kernel_size: tuple[int, int],
    stride: tuple[int, int],
    padding: tuple[int, int],
    dilation: tuple[int, int],
    ceil_mode: bool,
) -> Tensor:
    """The gradient of :func:`max_pool2d` with respect to its input, of plane ``input_plane`` (H, W), channels_last.

    ``grad``, ``taps``: ``[N, C, P, Q]``. Each value is summed in float32, in the order of the windows, and rounded
    once: in float32 PyTorch's own bits, in 16-bit types, of which PyTorch rounds each sum, closer to the exact ones.
    """
    return _ops.max_pool2d_backward.default(
        grad, taps, input_plane, kernel_size, stride, padding, dilation, ceil_mode
    )


_HAS_ONEDNN: bool = (
    torch.backends.mkldnn.is_available()
    and hasattr(torch.ops.mkldnn, "_convolution_pointwise")
    and hasattr(torch.ops.mkldnn, "_reorder_convolution_weight")
)
_FUSED_DTYPES = {torch.float32} if _HAS_ONEDNN else set()
if _HAS_ONEDNN and torch.ops.mkldnn._is_mkldnn_bf16_supported():
    _FUSED_DTYPES.add(torch.bfloat16)
if _HAS_ONEDNN and torch.ops.mkldnn._is_mkldnn_fp16_supported():
    _FUSED_DTYPES.add(torch.float16)


def has_fused_convolution(dtype: torch.dtype) -> bool:
    """Whether this PyTorch carries oneDNN's convolution with fused post-ops for ``dtype`` on this processor."""
    return dtype in _FUSED_DTYPES and bool(torch.backends.mkldnn.enabled)


def prepack_weight(
    weight: Tensor,
    stride: tuple[int, int],
    padding: tuple[int, int],
    dilation: tuple[int, int],
    groups: int,
    input_size: list[int],
) -> Tensor:
    """``weight`` ``[K, C/groups, R, S]`` in the opaque layout oneDNN prefers for inputs of ``input_size``."""
    return torch.ops.mkldnn._reorder_convolution_weight(
        weight, padding, stride, dilation, groups, input_size
    )


def fused_convolution(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: tuple[int, int],
    padding: tuple[int, int],
    dilation: tuple[int, int],
    groups: int,
    shortcut: Tensor | None,
    relu: bool,
    overwrite: bool = False,
) -> Tensor:
    """``relu(conv(x) + bias + shortcut)`` by oneDNN's post-ops; inference only. Its ReLU returns 0 for NaN.

    ``overwrite``: the result may take the shortcut's memory. 64->256 1x1 on 56x56, 16 images, 2 cores with AMX: 2.7 ms
    for 5.4 in bfloat16, 8 for 21 in float32.
    """
    arguments = (weight, bias, padding, stride, dilation, groups)
    with _pooling(x):
        if shortcut is None:
            return torch.ops.mkldnn._convolution_pointwise(x, *arguments, "relu" if relu else "none", [], "")
        activation = "relu" if relu else None
        if overwrite and shortcut is not x and shortcut.is_contiguous(memory_format=torch.channels_last):
            return torch.ops.mkldnn._convolution_pointwise_.binary(
                shortcut, x, *arguments, "add", 1.0, activation, [], ""
            )
        return torch.ops.mkldnn._convolution_pointwise.binary(
            x, shortcut, *arguments, "add", 1.0, activation, [], ""
        )
