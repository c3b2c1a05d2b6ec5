# SPDX-License-Identifier: BSD-3-Clause
# Copyright (c) the resnet_fused authors
# What csrc/bindings/module.cpp defines, for type checkers.
from collections.abc import Sequence
from typing import Any

class Pooling:
    def __init__(self) -> None: ...
    def __enter__(self) -> None: ...
    def __exit__(self, *args: object) -> None: ...

def build_info() -> dict[str, Any]: ...
def conv_algorithm(
    dtype: str,
    x: Sequence[int],
    weight: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    packed: bool,
    /,
) -> str: ...
def conv_tiles(
    device: str,
    dtype: str,
    conv_pass: str,
    x: Sequence[int],
    weight: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    /,
) -> int: ...
def empty_memory_pool() -> None: ...
def memory_pool_state() -> dict[str, int]: ...
def native_limits(device: str, /) -> tuple[int, int, int, int, int]: ...
def native_multiplies(device: str, dtype: str, /) -> bool: ...
def reduction_tiles(device: str, outer: int, channels: int, inner: int, /) -> int: ...
