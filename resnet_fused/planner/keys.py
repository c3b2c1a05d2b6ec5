# SPDX-License-Identifier: BSD-3-Clause
# Copyright (c) the resnet_fused authors
"""What a plan is made for: a block's shapes and flags (:class:`Key`) on a machine (:func:`machine`)."""

from __future__ import annotations

import functools
import platform
import re
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from resnet_fused._C import build_info
from resnet_fused.units import Join, Unit


class UnitKey(NamedTuple):
    """A unit without its tensors. Without a convolution ``weight`` is None and the geometry is meaningless."""

    weight: tuple[int, ...] | None  # [K, C/groups, R, S]
    weight_dtype: torch.dtype | None
    weight_channels_last: bool
    bias: bool
    stride: tuple[int, int]
    padding: tuple[int, int]
    dilation: tuple[int, int]
    groups: int
    normalises: bool
    batch_statistics: bool
    packed: bool  # by resnet_fused.fold

    def __str__(self) -> str:
        parts = []
        if self.weight is not None:
            parts.append(f"conv {'x'.join(map(str, self.weight))} {_name(self.weight_dtype)}")
            parts += ["channels_last"] * self.weight_channels_last + ["bias"] * self.bias
            usual = {"stride": (1, 1), "padding": (0, 0), "dilation": (1, 1)}
            for field, value in usual.items():
                if tuple(getattr(self, field)) != value:
                    parts.append(f"{field} {'x'.join(map(str, getattr(self, field)))}")
            parts += [f"groups {self.groups}"] * (self.groups != 1) + ["packed"] * self.packed
        if self.normalises:
            parts.append("norm" if self.batch_statistics else "frozen norm")
        return " ".join(parts)


class Key(NamedTuple):
    """A block without its tensors, and what else its time depends on; ``units`` ends with the projection's."""

    training: bool  # False: evaluation without gradients
    device: torch.device
    dtype: torch.dtype
    shape: tuple[int, ...]  # [N, C, H, W]
    channels_last: bool
    join: Join
    relu: bool
    minimal: bool
    cast_weights: bool
    reads_joined: bool
    units: tuple[UnitKey, ...]
    threads: int  # of a CPU, else 0
    precision: str  # of the library's float32 convolutions
    deterministic: bool
    within: str = ""  # the module whose block it is, told by its steps and layers; of a function's none

    @property
    def alone(self) -> Key:
        """The same block wherever it is."""
        return self._replace(within="") if self.within else self

    def __str__(self) -> str:
        flags = ("relu", "minimal", "cast_weights", "reads_joined", "deterministic")
        layout = "channels_last" if self.channels_last else "contiguous"
        use = "training" if self.training else "inference"
        return "; ".join(
            [
                f"{use} {_name(self.dtype)} {'x'.join(map(str, self.shape))} {layout}",
                *map(str, self.units),
                f"join {self.join.name.lower()}",
                *(flag for flag in flags if getattr(self, flag)),
                *([f"float32 as {self.precision}"] if self.precision else []),
                *([f"in module {self.within}"] if self.within else []),
            ]
        )


def _name(dtype: torch.dtype | None) -> str:
    return str(dtype).removeprefix("torch.")


def key_of(
    training: bool,
    x: Tensor,
    chain: Sequence[Unit],
    join: Join,
    relu: bool,
    minimal: bool = False,
    cast_weights: bool = False,
    reads_joined: bool = False,
    within: str = "",
) -> Key:
    """The key of a call. It is made in every call: a bottleneck's takes some microseconds.

    What needs a gradient is no part of it: a checkpoint's first forward, which needs none, has to run as its second.
    """
    units = []
    for conv, norm in chain:
        statistics = norm is not None and norm.batch_statistics
        if conv is None:
            units.append(_BARE[statistics])
            continue
        w = conv.weight
        units.append(
            UnitKey(
                w.shape,
                w.dtype,
                w.is_contiguous(memory_format=torch.channels_last),
                conv.bias is not None,
                *conv[2:6],
                norm is not None,
                statistics,
                not training and norm is None and conv.packed is not None and not w.requires_grad,
            )
        )
    return Key(
        training,
        x.device,
        x.dtype,
        x.shape,
        x.is_contiguous(memory_format=torch.channels_last),
        join,
        relu,
        minimal,
        cast_weights,
        reads_joined,
        tuple(units),
        *settings(x),
        within,
    )


def settings(x: Tensor) -> tuple[int, str, bool]:
    """Fields of a key: what the process is set to for tensors such as ``x``."""
    on_cpu = x.is_cpu
    precision = ""
    if x.dtype == torch.float32:
        precision = (torch.backends.mkldnn if on_cpu else torch.backends.cudnn).conv.fp32_precision
    return (
        torch.get_num_threads() if on_cpu else 0,
        precision,
        torch.are_deterministic_algorithms_enabled() or torch.backends.cudnn.deterministic,
    )


_BARE = tuple(
    UnitKey(None, None, False, False, (1, 1), (0, 0), (1, 1), 1, True, statistics, False)
    for statistics in (False, True)
)


@functools.cache
def _processor() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        model = re.search(r"^model name\s*:\s*(.+)$", cpuinfo.read_text(), re.MULTILINE)
        if model:
            return model[1]
    return platform.processor() or platform.machine()


def _driver() -> str:
    """NVIDIA's, as Linux tells it: not every PyTorch does."""
    try:
        found = re.search(r"\b\d+\.\d+(\.\d+)?\b", Path("/proc/driver/nvidia/version").read_text())
    except OSError:
        found = None
    return found[0] if found else "unknown"


def machine(device: torch.device) -> dict[str, str]:
    """What measured times depend on besides the block: the hardware, how it is driven, and the versions."""
    info = build_info()
    versions = {"torch": torch.__version__, "resnet_fused": str(info["version"])}
    if device.type != "cuda":
        return {
            "device": _processor(),
            "instruction set": f"{info['cpu_instruction_set']}, torch {torch.backends.cpu.get_cpu_capability()}",
            "threads": str(torch.get_num_threads()),
            **versions,
        }
    return {
        "device": torch.cuda.get_device_name(device),
        "capability": ".".join(map(str, torch.cuda.get_device_capability(device))),
        "driver": _driver(),
        "cudnn": str(torch.backends.cudnn.version()),
        **versions,
    }
