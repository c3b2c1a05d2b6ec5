# SPDX-License-Identifier: BSD-3-Clause
# Copyright (c) the resnet_fused authors
"""Plans on a GPU: real kernels, events and streams; what needs no GPU to be seen is in test_plan.py."""

import copy
import math
import warnings

import pytest
import torch
from simulator import needs_tensor_cores

import resnet_fused as rf
from resnet_fused import ops
from resnet_fused.planner import decide, search
from resnet_fused.planner.entry import EAGER, Entry, name_of
from resnet_fused.surgery.forward import without_fusion
from resnet_fused.testing import assert_passed, compare_observations, observe, observe_reference

pytestmark = pytest.mark.cuda


CHANNELS = 16
LIBRARY = ((False, False),) * 2
NATIVE = {True: ((True, True),) * 2, False: ((True, False),) * 2}  # by training


def basic_block():
    # bfloat16: tensor cores multiply it, which float32 has none of in full precision.
    model = rf.BasicBlock(CHANNELS, CHANNELS).to("cuda", torch.bfloat16)
    return model.to(memory_format=torch.channels_last)


def images(n=2):
    x = torch.randn(n, CHANNELS, 6, 6, device="cuda", dtype=torch.bfloat16)
    return x.to(memory_format=torch.channels_last)


@pytest.fixture
def native(monkeypatch):
    """The names of the native convolutions that run."""
    ran = []

    def noted(name, function):
        def run(*arguments):
            ran.append(name)
            return function(*arguments)

        return run

    for name in ("conv_fprop", "conv_fprop_inference", "conv_dgrad", "conv_wgrad"):
        monkeypatch.setattr(ops, name, noted(name, getattr(ops, name)))
    return ran


@needs_tensor_cores
@pytest.mark.parametrize("training", [True, False])
def test_plans_are_made_and_followed(training, native):
    model, x = basic_block(), images()
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # nothing is disqualified, and no other GPU is touched
        (planned,) = rf.plan(model, x, training=training).blocks
    assert planned.source == "measured"
    assert {"eager", "library", "native"} <= set(planned.entry.seconds)
    assert all(0 < s < math.inf for s in planned.entry.seconds.values())
    rf.plan.clear()  # the race of the whole module, too, which may have left it to eager

    model.train(training)
    plain = without_fusion(copy.deepcopy(model))
    reference = observe_reference(plain, x, gradients=training)
    seen = {}
    for choices in (EAGER, LIBRARY, NATIVE[training]):
        decide.decide(planned.key, Entry(choices, name_of(choices, training), "for a test", {}, {}))
        native.clear()
        name = name_of(choices, training)
        seen[name] = observe(copy.deepcopy(model), x, gradients=training)
        assert bool(native) == (choices == NATIVE[training])
        compared = compare_observations(seen[name], seen["eager"], reference, precision=x.dtype)
        # Of a gradient one draw says little, see planner/proof.py, which has compared them.
        assert_passed([c for c in compared if not c.name.startswith("gradient")])
    assert torch.equal(seen["eager"]["output"], observe(plain, x, gradients=training)["output"])


@needs_tensor_cores
@pytest.mark.parametrize("training", [True, False])
def test_a_wrong_kernel_is_disqualified(training, monkeypatch):
    name = "conv_fprop" if training else "conv_fprop_inference"
    right = getattr(ops, name)

    def wrong(*arguments):
        found = right(*arguments)
        first = found[0] if training else found
        first[-1, :, -1, -1] += 1  # one pixel of an image
        return found

    monkeypatch.setattr(ops, name, wrong)
    with pytest.warns(UserWarning, match="not used here: native"):
        (planned,) = rf.plan(basic_block(), images(), training=training).blocks
    assert not any(fprop for fprop, _ in planned.choices)
    assert "native" in planned.entry.disqualified and "native" not in planned.entry.seconds


def test_nothing_is_measured_while_a_graph_is_captured(monkeypatch):
    monkeypatch.setenv("RESNET_FUSED_PLAN", "measure")
    measured = []
    plan_block = search.plan_block
    monkeypatch.setattr(search, "plan_block", lambda key, *rest: measured.append(key) or plan_block(key, *rest))
    model, x = basic_block().eval(), images()
    graph, warm = torch.cuda.CUDAGraph(), torch.cuda.Stream()
    with torch.no_grad():
        warm.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(warm), rf.engine("library"):
            expected = model(x)
        torch.cuda.current_stream().wait_stream(warm)
        with torch.cuda.graph(graph):
            z = model(x)
        assert not measured
        graph.replay()
        torch.testing.assert_close(z, expected)
        model(x)  # what was captured goes on so
        assert not measured
        model(images(3))
        assert len(measured) == 1
