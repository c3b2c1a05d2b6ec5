# SPDX-License-Identifier: BSD-3-Clause
# Copyright (c) the resnet_fused authors
"""Whatever a forward may depend on, or do besides computing: a fused module follows it, or is left."""

import copy
import random
import types

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import resnet_fused as rf

X = torch.randn(2, 4, 6, 6, generator=torch.Generator().manual_seed(0))
CFG = {"relu": True}
SPACE = types.SimpleNamespace(relu=True)
FLAG = True
GATE = torch.tensor(1.0)
ACT = nn.LeakyReLU(0.1)
GENERATOR = np.random.default_rng(0)
LOG = []


class Settings:
    relu = True


class Base(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.bn = nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4)
        self.conv2, self.bn2 = nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4)
        self.identity = nn.Identity()
        for norm in (self.bn, self.bn2):
            nn.init.normal_(norm.bias)
            norm.running_mean.normal_()

    def unit(self, x):
        return self.bn(self.conv(x))

    def on(self):
        return True


class Asking(nn.Identity):
    """A child with a property."""

    flag = True

    @property
    def on(self):
        return self.flag


def made(forward, **attributes):
    torch.manual_seed(0)
    model = type("Model", (Base,), {"forward": forward})().eval()
    for name, value in attributes.items():
        setattr(model, name, value)
    return model


def either(relu):
    """A forward that applies a ReLU where `relu(self)` says so."""

    def forward(self, x):
        y = self.unit(x)
        return F.relu(y) if relu(self) else y

    return forward


def closure():
    flag = True

    def forward(self, x):
        y = self.unit(x)
        return F.relu(y) if flag else y

    def switch(_):
        nonlocal flag
        flag = False

    return made(forward), switch


def by_child_mode(self, x):
    y = self.unit(x)
    return F.relu(y) if self.bn.training else y


def set_global(name, value):
    return lambda m: globals().__setitem__(name, value)


def reads_cfg(self, x):
    y = self.unit(x)
    return F.relu(y) if CFG["relu"] else y


def reads_space(self, x):
    y = self.unit(x)
    return F.relu(y) if SPACE.relu else y


def reads_flag(self, x):
    y = self.unit(x)
    return F.relu(y) if FLAG else y


def reads_class(self, x):
    y = self.unit(x)
    return F.relu(y) if Settings.relu else y


def reads_global_tensor(self, x):
    y = self.unit(x)
    return F.relu(y) if GATE > 0 else y


def calls_global_module(self, x):
    return ACT(self.unit(x))


def reads_made_up_name(self, x):
    y = self.unit(x)
    return F.relu(y) if getattr(self, "flag" + str(1)) else y


def reads_later_name(self, x):
    y = self.unit(x)
    return y if getattr(self, "late", False) else F.relu(y)


def helper(x, module):
    return F.relu(x) if module.flag else x


def reads_in_helper(self, x):
    return helper(self.unit(x), self)


def reads_nested(self, x):
    y = self.unit(x)
    return F.relu(y) if self.store["a"]["relu"] else y


def reads_tensor(self, x):
    y = self.unit(x)
    return F.relu(y) if self.gate > 0 else y


def reads_list_of_modules(self, x):
    return self.acts[0](self.unit(x))


def reads_property(self, x):
    y = self.unit(x)
    return F.relu(y) if self.k.on else y


def calls_method(self, x):
    y = self.unit(x)
    return F.relu(y) if self.on() else y


DEPENDENCIES = {
    "global dict": (made(reads_cfg), lambda m: CFG.update(relu=False), lambda: CFG.update(relu=True)),
    "global object": (made(reads_space), lambda m: setattr(SPACE, "relu", False), lambda: setattr(SPACE, "relu", True)),
    "global flag": (made(reads_flag), set_global("FLAG", False), lambda: set_global("FLAG", True)(0)),
    "global class": (
        made(reads_class),
        lambda m: setattr(Settings, "relu", False),
        lambda: setattr(Settings, "relu", True),
    ),
    "global tensor": (made(reads_global_tensor), lambda m: GATE.fill_(-1), lambda: GATE.fill_(1)),
    "global module": (
        made(calls_global_module),
        lambda m: setattr(ACT, "negative_slope", 0.9),
        lambda: setattr(ACT, "negative_slope", 0.1),
    ),
    "closure": (*closure(), None),
    "made-up name": (made(reads_made_up_name, flag1=True), lambda m: setattr(m, "flag1", False), None),
    "name that comes later": (made(reads_later_name), lambda m: setattr(type(m), "late", True), None),
    "helper": (made(reads_in_helper, flag=True), lambda m: setattr(m, "flag", False), None),
    "nested dict": (
        made(reads_nested, store={"a": {"relu": True}}),
        lambda m: m.store["a"].update(relu=False),
        None,
    ),
    "tensor attribute": (made(reads_tensor, gate=torch.tensor(1.0)), lambda m: m.gate.fill_(-1), None),
    "modules in a list": (
        made(reads_list_of_modules, acts=[nn.LeakyReLU(0.1)]),
        lambda m: setattr(m.acts[0], "negative_slope", 0.9),
        None,
    ),
    "property of a child": (made(reads_property, k=Asking()), lambda m: setattr(m.k, "flag", False), None),
    "method of the class": (made(calls_method), lambda m: setattr(type(m), "on", lambda self: False), None),
    "method on the instance": (made(calls_method), lambda m: setattr(m, "on", lambda: False), None),
    "mode of a child": (made(by_child_mode), lambda m: m.bn.train(), None),
    "class": (
        made(either(lambda self: True)),
        lambda m: setattr(m, "__class__", type("Other", (Base,), {"forward": lambda self, x: self.unit(x) - 5})),
        None,
    ),
}


@pytest.mark.parametrize("name", DEPENDENCIES)
def test_what_a_forward_depends_on(name):
    model, change, restore = DEPENDENCIES[name]
    rf.fuse(model)
    try:
        with torch.no_grad():
            state = copy.deepcopy(model.state_dict())
            before = type(model).forward(model, X)
            torch.testing.assert_close(model(X), before)
            change(model)
            after = type(model).forward(model, X)
            model.load_state_dict(state)
            assert not torch.allclose(before, after)
            torch.testing.assert_close(model(X), after)
    finally:
        if restore is not None:
            restore()


@pytest.mark.parametrize("first", [True, False])
def test_mode_of_a_child_in_either_order(first):
    model = made(by_child_mode).train(first)
    rf.fuse(model)
    for mode in (not first, first):
        model.train(mode)
        state = copy.deepcopy(model.state_dict())
        expected = type(model).forward(model, X)
        model.load_state_dict(state)
        torch.testing.assert_close(model(X), expected)


ASKING = {
    "isinstance": lambda self, x: self.bn(y) if isinstance(y := self.conv(x), torch.Tensor) else y,
    "is_tensor": lambda self, x: self.bn(y) if torch.is_tensor(y := self.conv(x)) else y,
    "type": lambda self, x: self.unit(x) if type(x) is torch.Tensor else x,
    "callable": lambda self, x: x if callable(y := self.unit(x)) else F.relu(y),
    "hasattr": lambda self, x: x if hasattr(y := self.unit(x), "logits") else F.relu(y),
    "getattr": lambda self, x: self.unit(x) if getattr(x, "_mask", None) is None else x,
    "identity": lambda self, x: self.unit(x) if self.identity(x) is x else x,
    "other class": lambda self, x: x if isinstance(y := self.unit(x), tuple) else F.relu(y),
}


@pytest.mark.parametrize("name", ASKING)
def test_questions_about_values(name):
    model = made(ASKING[name])
    rf.fuse(model)
    torch.testing.assert_close(model(X), type(model).forward(model, X))
    assert not torch.equal(model(X), X)


def test_the_same_tensor_twice():
    model = made(lambda self, a, b: F.relu(self.unit(a)) if a is b else b)
    rf.fuse(model)
    for args in ((X, X), (X, X.clone())):
        torch.testing.assert_close(model(*args), type(model).forward(model, *args))


DRAWING = {
    "random": lambda: random.random(),
    "numpy": lambda: np.random.rand(),
    "numpy generator": lambda: GENERATOR.random(),
    "torch": lambda: torch.rand(()),
}


@pytest.mark.parametrize("name", DRAWING)
def test_random_numbers_are_drawn_anew(name):
    draw = DRAWING[name]

    def forward(self, x):
        y = self.unit(x)
        return F.relu(y) if draw() < 0.5 else y

    model = made(forward)
    states = random.getstate(), np.random.get_state()[2], torch.get_rng_state()
    rf.fuse(model)
    assert random.getstate() == states[0] and np.random.get_state()[2] == states[1]
    assert torch.equal(torch.get_rng_state(), states[2])
    assert len({model(X).sum().item() for _ in range(40)}) == 2


def in_between(self, x):
    y = self.conv(x)
    x.detach().add_(1)
    return F.relu(self.bn(y))


def data_in_between(self, x):
    y = self.conv(x)
    x.data.mul_(2)
    return F.relu(self.bn(y))


def view_in_between(self, x):
    y = self.conv(x)
    x.unsqueeze(0).add_(1)
    return F.relu(self.bn(y))


def relu_in_between(self, x):
    y = self.conv(x)
    self.relu(self.identity(x))
    return F.relu(self.bn(y))


def weight_in_between(self, x):
    y = self.conv(x)
    self.bn.weight.data.mul_(0.5)
    return F.relu(self.bn(y))


def statistics_in_between(self, x):
    y = self.unit(x)
    s = self.bn.running_mean.sum()
    return F.relu(y + x) + s


def shared_norm(self, x):
    a = self.bn(self.conv(x))
    b = self.bn(self.conv2(x))
    return F.relu(b + a)


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize(
    "forward",
    [
        in_between,
        data_in_between,
        view_in_between,
        relu_in_between,
        weight_in_between,
        statistics_in_between,
        shared_norm,
    ],
)
def test_order_of_effects(forward, training):
    model = made(forward, relu=nn.ReLU(inplace=True)).train(training)
    fused = copy.deepcopy(model)
    rf.fuse(fused)
    results = []
    for m in (model, fused):
        x = X.clone()
        with torch.no_grad():
            results.append([m(x), x, *m.buffers(), *m.parameters()])
    torch.testing.assert_close(results[1], results[0])


def logs(self, x):
    LOG.append(1)
    return F.relu(self.unit(x))


def appends(self, feats):
    feats.append(F.relu(self.unit(feats[-1])))
    return feats


def remembers(self, x):
    self.kept.append(x)
    return F.relu(self.unit(x))


def test_effects_are_neither_lost_nor_doubled():
    model = made(logs)
    LOG.clear()
    rf.fuse(model)
    assert not LOG
    model(X), model(X)
    assert len(LOG) == 2
    model = made(appends)
    rf.fuse(model)
    feats = [X]
    assert model(feats) is feats and len(feats) == 2
    model = made(remembers, kept=[])
    rf.fuse(model)
    assert model.kept == []
    model(X)
    assert model.kept[0] is X


@pytest.mark.parametrize("decorator", [torch.no_grad(), torch.inference_mode(), torch.autocast("cpu", torch.bfloat16)])
def test_decorated_forward_that_is_fused_in_its_own_context(decorator):
    model = made(decorator(lambda self, x: F.relu(self.unit(x))))
    with decorator:
        rf.fuse(model)
    found, expected = model(X), type(model).forward(model, X)
    assert found.dtype == expected.dtype and found.requires_grad == expected.requires_grad


def test_exceptions_that_a_forward_handles():
    def forward(self, x):
        y = self.unit(x)
        try:
            y = y + self.p
        except RuntimeError:
            y = y - 1
        return F.relu(y)

    model = made(forward, p=torch.zeros(7))
    rf.fuse(model)
    torch.testing.assert_close(model(X), type(model).forward(model, X))


def test_calls_that_eager_refuses():
    for forward in (lambda self, x: self.bn(self.conv(x=x)), lambda self, x: self.bn(self.conv(x, True))):
        model = made(forward)
        rf.fuse(model)
        with pytest.raises(TypeError):
            model(X)


class Nothing(nn.Module):
    def forward(self, x):
        return None


def test_what_is_added_may_be_nothing():
    model = made(lambda self, x: self.nothing(x) + self.unit(x), nothing=Nothing())
    rf.fuse(model)
    for call in (model, lambda x: type(model).forward(model, x)):
        with pytest.raises(TypeError, match="unsupported operand"):
            call(X)


FOLDED = {
    "convolution again": lambda self, x: self.conv(F.relu(self.unit(x))),
    "batch norm again": lambda self, x: self.bn(self.conv2(F.relu(self.unit(x)))),
    "weight read": lambda self, x: F.relu(self.unit(x)) * self.conv.weight.sum(),
    "batch norm read": lambda self, x: F.relu(self.unit(x)) * self.bn.weight.sum(),
}


@pytest.mark.parametrize("name", FOLDED)
def test_fold_leaves_layers_that_are_used_otherwise_too(name):
    model = made(FOLDED[name])
    torch.testing.assert_close(rf.fold(model)(X), model(X), rtol=1e-4, atol=1e-4)


def test_compiled_modules_follow_their_settings():
    class Switching(Base):
        of_class = 1.0

        def forward(self, x):
            y = F.relu(self.unit(x)) * self.of_class
            return y if self.flag else -y

    model = Switching().eval()
    model.flag = True
    rf.fuse(model)
    compiled = torch.compile(model, backend="eager")
    for change in (
        lambda: None,
        lambda: setattr(model, "flag", False),
        lambda: setattr(Switching, "of_class", 2.0),
        lambda: setattr(model, "__class__", type("Other", (Base,), {"forward": lambda self, x: self.unit(x)})),
    ):
        change()
        with torch.no_grad():
            torch.testing.assert_close(compiled(X), type(model).forward(model, X))


def test_graph_modules_travel(tmp_path):
    model = torch.fx.symbolic_trace(made(lambda self, x: F.relu(self.unit(x))))
    rf.fuse(model)
    torch.save(model, tmp_path / "model.pt")
    for other in (copy.deepcopy(model), torch.load(tmp_path / "model.pt", weights_only=False)):
        torch.testing.assert_close(other(X), model(X))
