# SPDX-License-Identifier: BSD-3-Clause
# Copyright (c) the resnet_fused authors
"""A fused module computes what its class's own forward computes at that moment: whatever was put on it, before fuse or
after, on the instance, on the class or on a child."""

import copy
import gc
import inspect
import types
import weakref

import pytest
import torch
import torch.nn.functional as F
import torchvision
from lecture import ResBlk
from torch import nn
from torch.nn.utils import prune
from torchvision.models.resnet import BasicBlock, Bottleneck, ResNet
from user_models import OWN_BLOCKS, ThreeInputs, nontrivial

import resnet_fused as rf
from resnet_fused.surgery.forward import fused_forward


def is_fused(z):
    return type(z.grad_fn).__name__ == "_BlockBackward"


def assert_equal_now(model, *args, **kwargs):
    """`model` against its class's own forward, with what hangs on the instance and the children as it is now."""
    state = copy.deepcopy(model.state_dict())
    with torch.no_grad():
        z = model(*args, **kwargs)
        model.load_state_dict(state)
        with torch.random.fork_rng():
            expected = type(model).forward(model, *args, **kwargs)
    torch.testing.assert_close(z, expected, rtol=1e-5, atol=1e-5)
    return z


class Block(BasicBlock):
    """A class of its own, which tests may change."""


class AddingNorm(nn.BatchNorm2d):
    def forward(self, x):
        return x + 1


@pytest.fixture
def block():
    return nontrivial(Block(8, 8)).eval()


X = torch.randn(2, 8, 6, 6, generator=torch.Generator().manual_seed(0))


# What is added, replaced or changed ----------------------------------------------------------------------------


def tiled(conv):
    original = conv._conv_forward
    conv._conv_forward = lambda x, w, b: original(x.roll(1, -1), w, b)


CHANGES = {
    "conv._conv_forward": lambda b: tiled(b.conv1),
    "conv.forward": lambda b: setattr(b.conv1, "forward", lambda x: x * 2),
    "bn.forward": lambda b: setattr(b.bn2, "forward", lambda x: x * 2),
    "relu.forward": lambda b: setattr(b.relu, "forward", lambda x: x * 2),
    "attribute read by forward": lambda b: setattr(b, "downsample", nn.Conv2d(8, 8, 1)),
    "child replaced": lambda b: setattr(b, "conv2", nn.Conv2d(8, 8, 1)),
    "norm replaced": lambda b: setattr(b, "bn1", nn.InstanceNorm2d(8)),
    "activation replaced": lambda b: setattr(b, "relu", nn.Tanh()),
    "hook": lambda b: b.conv2.register_forward_hook(lambda m, a, z: z + 1),
    "pre-hook": lambda b: b.bn2.register_forward_pre_hook(lambda m, a: (a[0] + 1,)),
    "parametrization": lambda b: nn.utils.parametrizations.weight_norm(b.conv1),
    "pruning": lambda b: prune.random_unstructured(b.conv1, "weight", 0.5),
    "padding mode": lambda b: (
        setattr(b.conv1, "padding_mode", "circular"),
        setattr(b.conv1, "_reversed_padding_repeated_twice", [1, 1, 1, 1]),
    ),
    "padding by a number": lambda b: (setattr(b.conv1, "padding", 0), setattr(b.conv2, "padding", 2)),
    "stride of a child": lambda b: (setattr(b.conv1, "padding", (0, 0)), setattr(b.conv2, "padding", (2, 2))),
    "class of a child": lambda b: setattr(b.bn1, "__class__", AddingNorm),
}


@pytest.mark.parametrize("when", ["before", "after", "after a call"])
@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_changes_of_instance_and_children(block, change, when):
    if when == "before":
        change(block)
    assert rf.fuse(block).fused
    if when == "after a call":
        assert_equal_now(block, X)
    before = type(block).forward(block, X)
    if when != "before":
        change(block)
        after = type(block).forward(block, X)
        assert not torch.allclose(before, after)
    assert_equal_now(block, X)


def test_changes_of_a_class(block, monkeypatch):
    rf.fuse(block)
    assert is_fused(block.train()(X))
    block.eval()
    monkeypatch.setattr(Block, "forward", lambda self, x: self.conv1(x), raising=False)
    torch.testing.assert_close(block(X), block.conv1(X))
    monkeypatch.undo()
    assert_equal_now(block, X)


@pytest.mark.parametrize(
    ("owner", "name"),
    [
        (nn.Conv2d, "forward"),
        (nn.Conv2d, "_conv_forward"),
        (nn.BatchNorm2d, "forward"),
        (nn.ReLU, "forward"),
        (F, "relu"),
        (F, "conv2d"),
        (F, "batch_norm"),
    ],
)
def test_torchs_own_functions_replaced_by_somebody(block, monkeypatch, owner, name):
    rf.fuse(block)
    original, calls = getattr(owner, name), []

    def spy(*args, **kwargs):
        calls.append(name)
        return original(*args, **kwargs)

    block(X)
    monkeypatch.setattr(owner, name, spy)
    block(X)
    assert calls


def test_settings_that_forward_reads():
    class Scaling(ResBlk):
        factors = [0.5]
        last_relu = True

        def forward(self, x):
            out = F.relu(self.bn1(self.conv1(x)))
            out = self.extra(x) + self.bn2(self.conv2(out)) * self.factors[0]
            return F.relu(out) if self.last_relu else out

    model = nontrivial(Scaling(8, 8)).eval()
    assert rf.fuse(model).fused
    results = [assert_equal_now(model, X)]
    for change in (
        lambda: setattr(model, "last_relu", False),
        lambda: setattr(Scaling, "factors", [2.0]),
        lambda: Scaling.factors.__setitem__(0, 4.0),
        lambda: setattr(model, "factors", (8.0,)),
    ):
        change()
        results.append(assert_equal_now(model, X))
    assert all(not torch.allclose(a, b) for a, b in zip(results, results[1:], strict=False))


def test_inner_function_set_on_the_instance():
    model = nontrivial(ResNet(BasicBlock, [1, 1, 1, 1], num_classes=4)).eval()
    assert rf.fuse(model).fused
    x = torch.randn(1, 3, 32, 32)
    assert model(x).shape == (1, 4)
    model._forward_impl = lambda x: model.layer1(model.maxpool(model.relu(model.bn1(model.conv1(x)))))
    assert model(x).shape == (1, 64, 8, 8)


def test_forward_that_somebody_wrapped_stays_when_unfused(block):
    rf.fuse(block)
    inner, seen = block.forward, []

    def outer(x):
        seen.append(1)
        return inner(x)

    block.forward = outer
    assert_equal_now(block, X)
    rf.unfuse(block)
    assert block.forward is outer
    assert not is_fused(block.train()(X))
    assert seen == [1, 1]


def test_function_that_somebody_binds_again(block):
    """As accelerate does for mixed precision: it runs fused for its own module, and for another one plainly."""
    rf.fuse(block)
    expected, other = block(X), copy.deepcopy(block)
    function = block.forward.__func__
    for module in (block, other):
        module.forward = types.MethodType(lambda self, *args: function(self, *args) * 2, module)
    found = block(X)
    assert "_BlockBackward" in {type(node).__name__ for node, _ in found.grad_fn.next_functions}
    torch.testing.assert_close(found, 2 * expected, rtol=0, atol=0)
    assert "_BlockBackward" not in {type(node).__name__ for node, _ in other(X).grad_fn.next_functions}
    torch.testing.assert_close(other(X), 2 * expected)


def test_class_that_somebody_swapped_stays(block):
    rf.fuse(block)
    block.__class__ = Sharded = type("Sharded", (Block,), {})
    assert is_fused(block.train()(X))
    rf.unfuse(block)
    assert type(block) is Sharded and not is_fused(block(X))


# What is seen from outside -------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [lambda: Block(8, 8), *OWN_BLOCKS.values()])
def test_nothing_of_the_class_changes(make):
    model = make()
    plain = copy.deepcopy(model)
    rf.fuse(model)
    assert type(model) is type(plain)
    assert inspect.signature(model.forward) == inspect.signature(plain.forward)
    assert inspect.getsource(model.forward) == inspect.getsource(plain.forward)
    assert repr(model) == repr(plain)
    assert [n for n, _ in model.named_modules()] == [n for n, _ in plain.named_modules()]


def test_class_attributes_are_the_users():
    class Expanding(Bottleneck):
        expansion = 2

        def __init__(self):
            super().__init__(16, 8)

    model = Expanding()
    assert rf.fuse(model).fused
    assert model.expansion == type(model).expansion == 2
    assert model.conv3.out_channels == 16


def test_names_of_parameters():
    model = nontrivial(OWN_BLOCKS["child called memory"]()).eval()
    rf.fuse(model)
    assert_equal_now(model, inputs=X)
    with pytest.raises(TypeError, match="unexpected keyword argument 'x'"):
        model(x=X)
    with pytest.raises(TypeError, match="missing 1 required positional argument: 'inputs'"):
        model()


def test_arguments_of_every_kind():
    model = nontrivial(ThreeInputs(8)).eval()
    rf.fuse(model)
    for args, kwargs in [
        ((X,), {}),
        ((X, X * 2), {}),
        ((X,), {"shortcut": X * 3}),
        ((X, None), {}),
        ((X, X, [X, X]), {}),
        ((X,), {"children": ()}),
        ((X,), {"children": object()}),
    ]:
        assert_equal_now(model, *args, **kwargs)
    assert is_fused(model.train()(X, shortcut=X))


def test_results_of_every_kind():
    class Several(ResBlk):
        def forward(self, x, kind):
            a = F.relu(self.bn1(self.conv1(x)))
            b = self.bn2(self.conv2(a))
            return {"tuple": (a, b), "dict": {"a": a, "n": [b, 1]}, "none": (b, None), "same": x}[kind]

    model = nontrivial(Several(8, 8)).eval()
    rf.fuse(model)
    for kind in ("tuple", "dict", "none"):
        z = assert_equal_now(model, X, kind)
        assert type(z) is type(Several.forward(model, X, kind))
    assert model(X, "same") is X


def test_no_cycle_keeps_a_model_alive():
    model = ResBlk(4, 4)
    rf.fuse(model)
    model(torch.randn(1, 4, 4, 4))
    gone = weakref.ref(model.conv1)
    gc.disable()
    try:
        del model
        assert gone() is None
    finally:
        gc.enable()


def test_module_of_a_forward_that_is_gone():
    forward = rf.ResBlk(4, 4).forward
    with pytest.raises(ReferenceError, match="keep it"):
        forward(torch.randn(1, 4, 4, 4))


def test_a_model_that_changes_all_the_time_runs_its_own_forward(block):
    rf.fuse(block)
    for i in range(40):
        block.extra_attribute = i
        setattr(block, f"extra_{i}", i)
        assert_equal_now(block, X)
    assert fused_forward(block)._count <= 20


# Contexts ------------------------------------------------------------------------------------------------------


def test_graphs_are_eagers():
    for eager in (torchvision.models.resnet18(num_classes=4), nontrivial(OWN_BLOCKS["squeeze and excitation"]())):
        fused = copy.deepcopy(eager)
        rf.fuse(fused)
        graphs = [torch.fx.symbolic_trace(m).graph for m in (eager, fused)]
        assert [(n.op, n.target) for n in graphs[0].nodes] == [(n.op, n.target) for n in graphs[1].nodes]


def test_feature_extractor():
    from torchvision.models.feature_extraction import create_feature_extractor, get_graph_node_names

    eager = nontrivial(torchvision.models.resnet18(num_classes=4)).eval()
    fused = copy.deepcopy(eager)
    rf.fuse(fused)
    assert get_graph_node_names(fused) == get_graph_node_names(eager)
    x = torch.randn(1, 3, 64, 64)
    nodes = ["layer1.0.bn1", "layer2.1.conv2", "layer3"]
    extractors = [create_feature_extractor(m, nodes) for m in (eager, fused)]
    assert rf.fuse(extractors[1]).fused
    expected, found = (e(x) for e in extractors)
    for name in nodes:
        torch.testing.assert_close(found[name], expected[name], rtol=1e-4, atol=1e-4)


def test_function_modes_see_every_function(block):
    from torch.overrides import TorchFunctionMode

    class Listening(TorchFunctionMode):
        def __init__(self):
            super().__init__()
            self.seen = []

        def __torch_function__(self, function, types, args=(), kwargs=None):
            self.seen.append(getattr(function, "__name__", ""))
            return function(*args, **(kwargs or {}))

    rf.fuse(block)
    with Listening() as mode:
        block(X)
    assert mode.seen.count("conv2d") == 2


def test_default_device_keeps_the_fused_path(block):
    rf.fuse(block)
    with torch.device("cpu"):
        assert is_fused(block.train()(X))


def test_tensor_subclasses_decide_themselves(block):
    class Loud(torch.Tensor):
        pass

    rf.fuse(block)
    z = block(X.as_subclass(Loud))
    assert type(z) is Loud
    block.conv1.weight = nn.Parameter(block.conv1.weight.detach().as_subclass(Loud))
    assert type(block(X)) is Loud


def test_data_parallel_replica(block):
    rf.fuse(block)
    replica = block._replicate_for_data_parallel()
    replica._modules["conv1"] = nn.Conv2d(8, 8, 1)
    torch.testing.assert_close(replica(X), type(block).forward(replica, X))
    assert not torch.allclose(replica(X), block(X))


@pytest.mark.parametrize("change", ["half weight", "no running_var", "wrong channels", "negative momentum", "string"])
@pytest.mark.parametrize("training", [True, False])
def test_odd_states_are_eagers_business(block, change, training):
    if change == "half weight":
        block.bn1.weight = nn.Parameter(block.bn1.weight.detach().half())
    elif change == "no running_var":
        block.bn1.running_var = None
    elif change == "wrong channels":
        block.bn1.running_mean = torch.zeros(9)
    elif change == "negative momentum":
        block.bn1.momentum = -0.5
    else:
        block.bn1.eps = "small"
    block.train(training)
    fused = copy.deepcopy(block)
    rf.fuse(fused)
    outcomes = []
    for model in (block, fused):
        try:
            outcomes.append((model(X), [*model.buffers()]))
        except Exception as error:
            outcomes.append((type(error), str(error)))
    if isinstance(outcomes[0][0], torch.Tensor):
        torch.testing.assert_close(outcomes[1], outcomes[0])
    else:
        assert outcomes[1] == outcomes[0]
