# SPDX-License-Identifier: BSD-3-Clause
# Copyright (c) the resnet_fused authors
"""What people do with a model in training beside calling it: the fused one answers as before, or as eager does.

Autocast with GradScaler and accumulation are in test_devices.py, CUDA graphs in test_cuda.py, DDP in test_modules.py.
"""

import copy
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn, update_bn
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts
from user_models import assert_same_results, classifier, fused_copy, nontrivial, switched

import resnet_fused as rf

LABELS = torch.arange(4)


@pytest.fixture
def x():
    return torch.randn(4, 3, 32, 32).to(memory_format=torch.channels_last)


@pytest.fixture
def eager():
    return nontrivial(classifier()).to(memory_format=torch.channels_last)


def gradients(model, x, run=None):
    """Of each parameter, and the buffers afterwards; ``run`` instead of a plain call."""
    model = copy.deepcopy(model)
    F.cross_entropy((run or model.__class__.__call__)(model, x), LABELS).backward()
    return [p.grad for p in model.parameters()], dict(model.named_buffers())


def assert_equal(found, expected):
    assert len(found) == len(expected) and all(map(torch.equal, found, expected))


@pytest.mark.parametrize("norms", ["of float32", "of 16 bits"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_16_bit_weights(eager, x, dtype, norms):
    eager.to(dtype)
    if norms == "of float32":
        for m in eager.modules():
            if isinstance(m, nn.BatchNorm2d):
                m.float()
    fused, _ = fused_copy(eager)
    assert_same_results(fused, eager, x.to(dtype))


SAVED = {torch.ops.aten.convolution.default, torch.ops.resnet_fused.conv_fprop.default}


def keep_convolutions(context, operator, *args, **kwargs):
    return CheckpointPolicy.MUST_SAVE if operator in SAVED else CheckpointPolicy.PREFER_RECOMPUTE


CHECKPOINTS = {
    "reentrant": {"use_reentrant": True},
    "not reentrant": {"use_reentrant": False},
    "selective": {
        "use_reentrant": False,
        "context_fn": partial(create_selective_checkpoint_contexts, keep_convolutions),
    },
}


@pytest.mark.parametrize("engine", ["native", "library"])
@pytest.mark.parametrize("how", CHECKPOINTS)
def test_checkpointing(eager, x, how, engine):
    """The same bits, and running statistics that, as eager's, move twice."""
    fused, _ = fused_copy(eager)

    def run(call, model, x):
        x = model[:4](x)
        for stage in model[4:6]:
            x = call(stage, x)
        return model[6:](x)

    plain = partial(run, nn.Module.__call__)
    checkpointed = partial(run, partial(checkpoint, **CHECKPOINTS[how]))
    with rf.engine(engine):
        grads, _ = gradients(fused, x, plain)
        found, buffers = gradients(fused, x, checkpointed)
    assert_equal(found, grads)
    _, expected = gradients(eager, x, checkpointed)
    assert buffers["4.0.bn1.num_batches_tracked"] == expected["4.0.bn1.num_batches_tracked"]
    for name, buffer in buffers.items():
        torch.testing.assert_close(buffer, expected[name], rtol=1e-4, atol=1e-5, msg=name)


def test_averaged_weights(eager, x):
    """The average runs fused, its batch norms' statistics are gathered anew, and it answers as eager's."""
    fused, _ = fused_copy(eager)
    answers = []
    for model in (fused, eager):
        averaged = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.5))
        assert switched(averaged.module) == switched(model)
        optimizer = torch.optim.SGD(model.parameters(), 0.01)
        for _ in range(2):
            F.cross_entropy(model(x), LABELS).backward()
            optimizer.step()
            averaged.update_parameters(model)
        update_bn([x, x.flip(0)], averaged)
        assert averaged.module[1].num_batches_tracked == 2
        with torch.no_grad():
            answers.append((averaged.eval()(x), model.eval()(x)))
    for found, expected in zip(*answers, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3)
    assert not torch.allclose(*answers[0], rtol=1e-3, atol=1e-3)


def test_functional_call_with_other_tensors(eager, x):
    """It computes with, differentiates and updates what it is given, and the model's own tensors stay."""
    fused, _ = fused_copy(eager)
    given = {name: t.detach().clone() for name, t in nontrivial(classifier()).state_dict().items()}
    before = {name: t.clone() for name, t in fused.state_dict().items()}
    loaded = copy.deepcopy(fused)
    loaded.load_state_dict(given)
    expected, buffers = gradients(loaded, x)
    leaves = [given[name].requires_grad_() for name, _ in fused.named_parameters()]
    loss = F.cross_entropy(torch.func.functional_call(fused, given, (x,)), LABELS)
    assert_equal(torch.autograd.grad(loss, leaves), expected)
    assert_equal([given[name] for name in buffers], list(buffers.values()))
    assert_equal(list(fused.state_dict().values()), list(before.values()))


def test_transforms_over_parameters(eager, x):
    """torch.func's gradient, and a batch of models at once."""
    fused, _ = fused_copy(eager)
    fused.eval(), eager.eval()

    def loss(model):
        return lambda given, x: F.cross_entropy(torch.func.functional_call(model, given, (x,)), LABELS)

    found, expected = (torch.func.grad(loss(m))(dict(m.named_parameters()), x) for m in (fused, eager))
    for name, grad in found.items():
        torch.testing.assert_close(grad, expected[name], rtol=1e-3, atol=1e-4, msg=name)
    models = [fused, *(fused_copy(nontrivial(classifier()).eval())[0] for _ in range(2))]
    stacked = torch.func.stack_module_state(models)
    together = torch.vmap(lambda *state: torch.func.functional_call(fused, state, (x,)))(*stacked)
    torch.testing.assert_close(together, torch.stack([m(x) for m in models]), rtol=1e-3, atol=1e-4)


def test_training_goes_on_after_inference_mode(eager, x):
    fused, _ = fused_copy(eager)
    expected, buffers = gradients(fused, x)
    with torch.inference_mode():
        answer = fused.eval()(x.clone())
    assert answer.is_inference()
    found, after = gradients(fused.train(), x)
    assert_equal(found, expected)
    assert_equal(list(after.values()), list(buffers.values()))


class Adapter(nn.Module):
    """A frozen convolution with a learnt correction of low rank beside it (Hu et al. 2021)."""

    def __init__(self, conv, rank=2):
        super().__init__()
        self.conv = conv.requires_grad_(False)
        self.down = nn.Conv2d(conv.in_channels, rank, conv.kernel_size, conv.stride, conv.padding, bias=False)
        self.up = nn.Conv2d(rank, conv.out_channels, 1, bias=False)

    def forward(self, x):
        return self.conv(x) + self.up(self.down(x))


class AdaptedConv2d(nn.Conv2d):
    """The same as a subclass, which has the convolution's own attributes."""

    def __init__(self, conv, rank=2):
        bias = conv.bias is not None
        super().__init__(
            conv.in_channels, conv.out_channels, conv.kernel_size, conv.stride, conv.padding, bias=bias
        )
        self.load_state_dict(conv.state_dict())
        self.requires_grad_(False)
        self.down = nn.Parameter(torch.randn(rank, self.weight[0].numel()) * 0.1)
        self.up = nn.Parameter(torch.randn(self.out_channels, rank) * 0.1)

    def forward(self, x):
        return self._conv_forward(x, self.weight + (self.up @ self.down).view_as(self.weight), self.bias)


@pytest.mark.parametrize("when", ["before", "after", "after a call"])
@pytest.mark.parametrize("adapter", [Adapter, AdaptedConv2d])
def test_adapters(eager, x, adapter, when):
    fused = copy.deepcopy(eager)
    if when != "before":
        rf.fuse(fused)
    if when == "after a call":
        fused(x), eager(x)
    for model in (fused, eager):
        torch.manual_seed(2)
        model.requires_grad_(False)
        for block in (model[4][0], model[5][0]):
            block.conv2 = adapter(block.conv2)
    if when == "before":
        rf.fuse(fused)
    learnt = [name for name, p in fused.named_parameters() if p.requires_grad]
    assert len(learnt) == 4
    assert_same_results(fused, eager, x)
    for i in (4, 5):  # the adapter is taken away again
        plain = nn.Conv2d(eager[i][0].bn1.num_features, eager[i][0].bn2.num_features, 3, padding=1, bias=False)
        for model in (fused, eager):
            model[i][0].conv2 = copy.deepcopy(plain)
    assert_same_results(fused, eager, x)
