# SPDX-License-Identifier: BSD-3-Clause
# Copyright (c) the resnet_fused authors
"""What happens after `import torch` and `import torchvision` under gpusim-run."""

import importlib.abc
import importlib.util
import os
import sys


def _after_torch(torch):
    plugin = os.environ.get("GPUSIM_TORCH_PLUGIN")
    if not plugin or torch.version.cuda is None:
        return
    torch.ops.load_library(plugin)
    _report_memory(torch)


def _after_torchvision(module):
    import torch
    if os.environ.get("GPUSIM_TORCH_PLUGIN"):
        torch.ops.gpusim.cover("torchvision")


_AFTER = {"torch": _after_torch, "torchvision": _after_torchvision}


def _report_memory(torch):
    """Answer memory questions from the simulated device: PyTorch's own caching
    allocator, which usually keeps these counts, is switched off."""
    if not os.environ.get("PYTORCH_NO_CUDA_MEMORY_CACHING"):
        return
    import ctypes

    import gpusim

    library = gpusim.library()

    def use(device):
        out = (ctypes.c_uint64 * 8)()
        library.gpusim_memory_use(ctypes.c_int(device), out)
        return list(out)

    def group(values):
        current, peak, allocated, freed = values
        total = {"current": current, "peak": peak, "allocated": allocated, "freed": freed}
        nothing = dict.fromkeys(total, 0)
        return {"all": total, "small_pool": dict(nothing), "large_pool": total.copy()}

    def statistics(device):
        values = use(device)
        stats = original(device)
        for name in ("allocated_bytes", "reserved_bytes", "active_bytes", "requested_bytes"):
            stats[name] = group(values[:4])
        for name in ("allocation", "segment", "active"):
            stats[name] = group(values[4:])
        return stats

    original = torch._C._cuda_memoryStats
    original_reset = torch._C._cuda_resetPeakMemoryStats

    def reset(device):
        original_reset(device)
        library.gpusim_reset_peak(ctypes.c_int(device))

    torch._C._cuda_memoryStats = statistics
    torch._C._cuda_resetPeakMemoryStats = reset


class _Loader(importlib.abc.Loader):
    def __init__(self, loader, after):
        self._loader, self._after = loader, after

    def create_module(self, spec):
        return self._loader.create_module(spec)

    def exec_module(self, module):
        module.__loader__ = module.__spec__.loader = self._loader
        self._loader.exec_module(module)
        self._after(module)

    def __getattr__(self, name):
        return getattr(self._loader, name)


class _Finder(importlib.abc.MetaPathFinder):
    def __init__(self):
        self._busy = set()

    def find_spec(self, name, path=None, target=None):
        if name not in _AFTER or name in self._busy:
            return None
        self._busy.add(name)
        try:
            spec = importlib.util.find_spec(name)
        finally:
            self._busy.discard(name)
        if spec is not None and spec.loader is not None:
            spec.loader = _Loader(spec.loader, _AFTER[name])
        return spec


def install():
    if not any(isinstance(f, _Finder) for f in sys.meta_path):
        sys.meta_path.insert(0, _Finder())
