# SPDX-License-Identifier: BSD-3-Clause
# Copyright (c) the resnet_fused authors
"""Other software that runs the same networks: torch.compile, ONNX Runtime, OpenVINO. Imported where it is used."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

# The precisions, keys of benchmarks.cases.DTYPES, in which a runtime takes an exported network for inference.
RUNTIMES = {"onnxruntime": ("float32",), "openvino": ("float32", "bfloat16")}


@contextlib.contextmanager
def compiled(module: nn.Module, *, training: bool) -> Iterator[nn.Module]:
    """``module`` under torch.compile, which compiles at the first call, to be made inside; for inference, frozen."""
    import torch._inductor.config as inductor

    # Without it the earlier cases' versions of the same forward count, and from the ninth on nothing is compiled.
    torch.compiler.reset()
    # Workers that compile in the background could still be busy when the step is timed.
    with inductor.patch(freezing=not training, compile_threads=1):
        # The whole graph, so that nothing falls back to eager unnoticed.
        compiled: Any = torch.compile(module, fullgraph=True)
        yield compiled


def export(network: nn.Module, images: Tensor, path: Path) -> None:
    """Write ``network`` for inference on ``images``, float32, as ONNX."""
    torch.onnx.export(network.eval(), (images.contiguous(),), path, dynamo=True, verbose=False)


def onnxruntime_step(path: Path, images: Tensor) -> Callable[[], object]:
    """A call that runs the exported network on ``images``."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    feed = {session.get_inputs()[0].name: images.contiguous().numpy()}
    return lambda: session.run(None, feed)


def openvino_step(path: Path, images: Tensor, dtype: str) -> Callable[[], object]:
    """A call that runs the exported network on ``images``, computing in ``dtype``."""
    import openvino

    configuration = {
        "PERFORMANCE_HINT": "LATENCY",
        "INFERENCE_NUM_THREADS": torch.get_num_threads(),
        # Said for float32, too: where the processor multiplies bfloat16, that is its default.
        "INFERENCE_PRECISION_HINT": {"float32": "f32", "bfloat16": "bf16"}[dtype],
    }
    request = openvino.Core().compile_model(path, "CPU", configuration).create_infer_request()
    feed = [images.contiguous().numpy()]
    return lambda: request.infer(feed, share_inputs=True)
