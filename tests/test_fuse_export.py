# SPDX-License-Identifier: BSD-3-Clause
# Copyright (c) the resnet_fused authors
"""What leaves the process is the original forward: files that run anywhere without this package."""

import copy
import warnings

import pytest
import torch
import torchvision
from thinning import missing
from torch import nn
from torchvision.models.resnet import BasicBlock, ResNet
from user_models import OWN_BLOCKS, nontrivial

import resnet_fused as rf

warnings.filterwarnings("ignore", category=FutureWarning, module="torch.jit")
warnings.filterwarnings("ignore", category=DeprecationWarning)

X = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
BATCH = {0: torch.export.Dim("batch", min=1, max=64)}


def network():
    return nontrivial(ResNet(BasicBlock, [1, 1, 1, 1], num_classes=4))


def fused(model):
    other = copy.deepcopy(model)
    assert rf.fuse(other).fused
    return other


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("strict", [False, True])
def test_export(training, strict):
    eager = network().train(training)
    programs = [torch.export.export(m, (X,), dynamic_shapes=(BATCH,), strict=strict) for m in (eager, fused(eager))]
    targets = [[str(n.target) for n in p.graph.nodes] for p in programs]
    assert targets[1] == targets[0]
    assert not any("resnet_fused" in t for t in targets[1])
    x = torch.randn(5, 3, 32, 32)
    torch.testing.assert_close(programs[1].module()(x), programs[0].module()(x))


@pytest.mark.parametrize("make", [network, *OWN_BLOCKS.values()])
def test_torchscript(make):
    eager = make().eval()
    model = fused(eager)
    x = X if isinstance(eager, ResNet) else torch.randn(2, 8, 8, 8)
    expected = eager(x)
    try:
        torch.jit.script(eager)(x)
    except Exception as error:  # what TorchScript does not take, fused or not
        with pytest.raises(type(error)):
            torch.jit.script(model)(x)
        return
    for other in (model, nn.Sequential(model)):
        scripted = torch.jit.script(other)
        torch.testing.assert_close(scripted(x), expected)
        assert "resnet_fused::" not in str(scripted.inlined_graph)  # its operators; the folder may be called anything
    torch.testing.assert_close(model(x), expected, rtol=1e-4, atol=1e-4)
    traced = torch.jit.trace(model, x)
    torch.testing.assert_close(traced(x), expected)
    assert "resnet_fused::" not in str(traced.inlined_graph)


def test_torchscript_of_a_folded_model(tmp_path):
    eager = network().eval()
    folded = rf.fold(eager)
    folded(X)
    scripted = torch.jit.script(folded)
    scripted.save(tmp_path / "model.pt")
    torch.testing.assert_close(torch.jit.load(tmp_path / "model.pt")(X), eager(X), rtol=1e-4, atol=1e-4)
    assert rf.fuse(folded).fused


def test_quantizable_network():
    eager = nontrivial(torchvision.models.quantization.resnet18(num_classes=4)).eval()
    model = copy.deepcopy(eager)
    report = rf.fuse(model)
    assert report.convolutions.training == report.convolutions.total
    x = torch.randn(1, 3, 64, 64)
    torch.testing.assert_close(model(x), eager(x), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(torch.jit.script(model)(x), eager(x))


@pytest.mark.skip_where(reason=lambda dynamo: missing("onnx", "onnxruntime", *["onnxscript"] * dynamo))
@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("dynamo", [False, True])
def test_onnx(tmp_path, dynamo, training):
    runtime = pytest.importorskip("onnxruntime")
    eager = network().eval()
    path = tmp_path / "model.onnx"
    mode = torch.onnx.TrainingMode.TRAINING if training else torch.onnx.TrainingMode.EVAL
    options = {"dynamic_shapes": (BATCH,)} if dynamo else {"dynamic_axes": {"x": {0: "batch"}}, "training": mode}
    model = fused(eager).train(training)
    torch.onnx.export(model, (X,), path, input_names=["x"], dynamo=dynamo, **options)
    if training:
        return
    x = torch.randn(3, 3, 32, 32)
    session = runtime.InferenceSession(path, providers=["CPUExecutionProvider"])
    (found,) = session.run(None, {"x": x.numpy()})
    torch.testing.assert_close(torch.from_numpy(found), eager(x).detach(), rtol=1e-3, atol=1e-3)


def test_openvino():
    openvino = pytest.importorskip("openvino")
    eager = network().eval()
    converted = openvino.convert_model(fused(eager), example_input=X)
    found = openvino.compile_model(converted, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})(X.numpy())[0]
    torch.testing.assert_close(torch.from_numpy(found), eager(X).detach(), rtol=1e-3, atol=1e-3)
