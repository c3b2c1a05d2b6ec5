# SPDX-License-Identifier: BSD-3-Clause
# Copyright (c) the resnet_fused authors
"""``python -m resnet_fused``: what was built, what the machine has, which engines apply, and a check against eager.

Made for pasting into a bug report; it names no folder of the user's. The exit status is 1 if the check fails.
"""

from __future__ import annotations

import os
import platform
import re
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor, nn

import resnet_fused
from resnet_fused import ops
from resnet_fused.checks import check
from resnet_fused.installation import cuda_archs
from resnet_fused.surgery.forward import without_fusion

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
VARIABLES = ("RESNET_FUSED_", "ATEN_CPU_CAPABILITY", "ONEDNN_MAX_CPU_ISA", "OMP_NUM_THREADS", "CUDA_VISIBLE_DEVICES")
CHANNELS, SIDE, IMAGES = 64, 16, 2
ROUNDS = 10


def built() -> Iterator[str]:
    """What the extension was built of."""
    info = resnet_fused.build_info()
    yield f"resnet_fused {info['version']}, built against torch {info['torch']} by {info['compiler']}"
    sets = ", ".join(info["cpu_instruction_sets"])
    yield f"  CPU kernels: {sets}; this processor runs {info['cpu_instruction_set']}"
    yield f"  CUDA kernels: {f'for {cuda_archs()}' if info['cuda'] else 'not built'}"


def machine() -> Iterator[str]:
    """What it runs on."""
    yield f"torch {torch.__version__}, Python {platform.python_version()}, {platform.system()} {platform.machine()}"
    cpuinfo = Path("/proc/cpuinfo")
    model = re.search(r"^model name\s*:\s*(.+)$", cpuinfo.read_text(), re.MULTILINE) if cpuinfo.exists() else None
    capability = torch.backends.cpu.get_cpu_capability()
    yield f"  processor: {model[1] if model else platform.processor()}, {capability}, {torch.get_num_threads()} threads"
    if torch.cuda.is_available():
        for i in range(torch.cuda.device_count()):
            p = torch.cuda.get_device_properties(i)
            yield f"  GPU {i}: {p.name}, compute capability {p.major}.{p.minor}, {p.total_memory / 2**30:.0f} GiB"
        yield f"  CUDA {torch.version.cuda}, cuDNN {torch.backends.cudnn.version()}"
    else:
        yield f"  no GPU is visible{'' if torch.version.cuda else '; this torch is built without CUDA'}"
    for name in sorted(os.environ):
        if name.startswith(VARIABLES):
            yield f"  {name}={without_home(os.environ[name])}"


def engines(device: torch.device) -> Iterator[str]:
    """Which convolutions are native on ``device``, and why others are not."""
    weight = torch.empty(CHANNELS, CHANNELS, 3, 3, device=device)
    for dtype in DTYPES:
        x = torch.empty(1, CHANNELS, SIDE, SIDE, dtype=dtype, device=device).to(memory_format=torch.channels_last)
        reason = ops.native_reason(x, weight.to(dtype), (1, 1), (1, 1), (1, 1), 1)
        yield f"  {device.type}, {name_of(dtype)}: {'native and library' if reason is None else f'library: {reason}'}"


def plan() -> Iterator[str]:
    """The file of measured plans."""
    path = resnet_fused.plan.path()
    yield f"plans: {without_home(str(path))}, {f'{path.stat().st_size} bytes' if path.exists() else 'not there'}"


def network() -> nn.Module:
    """A projecting block and one with an identity."""
    torch.manual_seed(0)
    projection = nn.Sequential(nn.Conv2d(CHANNELS, CHANNELS, 1, 2, bias=False), nn.BatchNorm2d(CHANNELS))
    first = resnet_fused.BasicBlock(CHANNELS, CHANNELS, 2, projection)
    return nn.Sequential(first, resnet_fused.BasicBlock(CHANNELS, CHANNELS)).to(memory_format=torch.channels_last)


def self_check(device: torch.device) -> Iterator[tuple[bool, str]]:
    """Forward and backward of two blocks under the tolerance policy, by dtype: whether it passed, and a line.

    Where a processor has no instructions for a dtype, another line says so.
    """
    model = network().to(device)
    plain = without_fusion(model)
    base = None

    def draw(index: int) -> Tensor:
        x = torch.randn(IMAGES, CHANNELS, SIDE, SIDE, generator=torch.Generator().manual_seed(index))
        return x.to(device).to(memory_format=torch.channels_last)

    for dtype in DTYPES:
        line = f"  {device.type}, {name_of(dtype)}: "
        autocast = None if dtype == torch.float32 else dtype
        took = seconds(plain, draw(0), autocast)
        base = base or took
        engines = {name: name for name in ("library", "native")}
        try:
            found = check(
                plain, dict.fromkeys(engines, model), draw, autocast=autocast, gradients=True, engines=engines
            )
        except Exception as error:  # whatever it is, it belongs into the report
            yield False, f"{line}FAILED, {type(error).__name__}: {without_home(' '.join(str(error).split()))}"
            continue
        yield found.passed, f"{line}{found}, {found.compared} tensors{''.join(f'; {f}' for f in found.failures)}"
        if device.type == "cpu" and not multiplies(dtype):
            much = (
                f"this processor has no instructions for it, and takes {took / base:.1f} times as long as for float32"
            )
            yield True, f"{line}{much}, in eager PyTorch as well; use float32 here"


def multiplies(dtype: torch.dtype) -> bool:
    """Whether the library has convolutions of ``dtype`` that are made for this processor."""
    if dtype == torch.float32 or not torch.backends.mkldnn.is_available():
        return True
    supported = {
        torch.bfloat16: torch.ops.mkldnn._is_mkldnn_bf16_supported,
        torch.float16: torch.ops.mkldnn._is_mkldnn_fp16_supported,
    }
    return bool(supported[dtype]())


def seconds(model: nn.Module, x: Tensor, autocast: torch.dtype | None) -> float:
    """Of a forward pass, the fastest after a first one."""
    times = []
    with torch.no_grad(), torch.autocast(x.device.type, autocast, enabled=autocast is not None):
        for _ in range(ROUNDS + 1):
            start = time.perf_counter()
            model(x).sum().item()
            times.append(time.perf_counter() - start)
    return min(times[1:])


def name_of(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def without_home(text: str) -> str:
    """``text`` with the user's folder as ``~``."""
    home = str(Path.home())
    return text.replace(home, "~") if home != "/" else text


def main() -> int:
    """Print the report; return the exit status."""
    devices = [torch.device("cpu")]
    if torch.cuda.is_available() and ops.has_kernels(torch.device("cuda")):
        devices.append(torch.device("cuda"))
    for lines in (built(), machine(), ["engines:"], *map(engines, devices), plan(), ["check against eager:"]):
        for line in lines:
            print(line)
    # In TF32 native and eager need not round alike; bfloat16 and float16 see to the native kernels.
    torch.backends.cudnn.allow_tf32 = False
    passed = True
    for device in devices:
        for good, line in self_check(device):
            passed = passed and good
            print(line, flush=True)
    print("the check passed" if passed else "THE CHECK FAILED")
    return 0 if passed else 1


if __name__ == "__main__":
    sys.exit(main())
