# SPDX-License-Identifier: BSD-3-Clause
# Copyright (c) the resnet_fused authors
"""Plans: what is chosen and when, that it is proven first, and what is remembered. An injected clock tells the time."""

import contextlib
import copy
import json
import multiprocessing
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from pairs import PAIRS
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.checkpoint import checkpoint

import resnet_fused as rf
from resnet_fused import block, inference, ops
from resnet_fused.planner import decide, keys, modules, search, store
from resnet_fused.planner.entry import EAGER, Entry, all_library, name_of
from resnet_fused.planner.recording import recording
from resnet_fused.planner.scratch import Scratch
from resnet_fused.surgery.forward import without_fusion
from resnet_fused.testing import observe

CHANNELS = 16
MIXED = ((True, False), (False, True))
LIBRARY = all_library(MIXED)
NATIVE = ((True, True), (True, True))

needs_native = pytest.mark.skipif(
    ops.native_device_reason(torch.device("cpu")) is not None, reason="this processor has no native convolutions"
)
pytestmark = needs_native


def basic_block():
    return rf.BasicBlock(CHANNELS, CHANNELS).to(memory_format=torch.channels_last)


def images(n=2):
    return torch.randn(n, CHANNELS, 6, 6).to(memory_format=torch.channels_last)


def calls_of(model, x):
    with recording() as noted:
        model(x)
    return noted.calls


def call_of(model, x):
    (call,) = calls_of(model, x)
    return call


def choices_of(model, x):
    return [call.choices for call in calls_of(model, x)]


def state_of(model):
    return {name: t.detach().clone() for name, t in model.state_dict().items()}


def table_of(model, x):
    """What the shipped table says."""
    return call_of(model, x).table


def entry(choices, why="for a test"):
    return Entry(choices, name_of(choices, True), why, {"library": 1.0}, {})


@pytest.fixture
def seconds(monkeypatch):
    """Makes measured times what a function of a candidate's choices says."""
    ran = []
    run = Scratch.run

    def noted(self, choices):
        ran.append(choices)
        return run(self, choices)

    monkeypatch.setattr(Scratch, "run", noted)

    def inject(cost):
        def clock(call):
            call()
            return cost(ran[-1])

        monkeypatch.setattr(search, "clock_for", lambda device: clock)
        return ran

    return inject


@pytest.fixture
def measured(monkeypatch):
    """The keys that are measured, each with the result `MIXED`."""
    found = []

    def plan_block(key, *_):
        found.append(key)
        return entry(MIXED[: len(key.units)])

    monkeypatch.setattr(search, "plan_block", plan_block)
    return found


@pytest.fixture
def ran(monkeypatch):
    """The choices of each block that runs."""
    found = []
    assemble = block.assemble

    def noted(choices, *rest):
        found.append(choices)
        return assemble(choices, *rest)

    monkeypatch.setattr(block, "assemble", noted)
    return found


@pytest.fixture
def ran_in_inference(ran, monkeypatch):
    """As ``ran``, with those that nothing differentiates."""
    run_units = inference.run_units
    monkeypatch.setattr(inference, "run_units", lambda *a, **k: ran.append(a[4]) or run_units(*a, **k))
    return ran


@pytest.fixture(autouse=True)
def whole(monkeypatch):
    """Makes fused and eager calls of a module take so long; otherwise fused ones are the faster ones."""

    def inject(fused, eager):
        def medians(runs, operands, clock):
            for run in runs.values():
                run(operands[0])
            return {"fused": fused, "eager": eager}

        monkeypatch.setattr(modules, "medians", medians)

    inject(1.0, 2.0)
    return inject


def costs_of_passes(fprop, backward):
    """A candidate's time where each native pass adds, or spares, so much for each unit."""
    def cost(choices):
        if choices == EAGER:
            return 20
        return 10 + sum(f * a + b * c for f, b, (a, c) in zip(fprop, backward, choices, strict=True))

    return cost


@pytest.mark.parametrize(
    "wanted", [LIBRARY, NATIVE, MIXED, ((False, True), (False, True)), ((True, True), (False, False))]
)
def test_the_fastest_candidate_is_chosen(wanted, seconds):
    signs = [[-1 if c else 1 for c in column] for column in zip(*wanted, strict=True)]
    seconds(costs_of_passes(*signs))
    report = rf.plan(basic_block(), images())
    (planned,) = report.blocks
    assert planned.choices == wanted
    assert planned.entry.seconds["library"] == 10
    assert planned.entry.chosen == name_of(wanted, True)


@pytest.mark.parametrize("faster, choices", [(0.98, LIBRARY), (0.96, NATIVE)])
def test_small_gains_are_left_to_the_library(faster, choices, seconds):
    seconds(lambda c: 1.0 if c == LIBRARY else faster if c == NATIVE else 1.2)
    call = call_of(basic_block(), images())
    found = search.plan_block(call.key, call.native, call.table)
    assert found.choices == choices
    assert f"{1 / faster:.2f} times as fast" in found.why


def test_hopeless_candidates_are_timed_once(seconds):
    ran = seconds(lambda c: 1.0 if c != LIBRARY else 2.0)
    call = call_of(basic_block(), images())
    search.plan_block(call.key, call.native, call.table)
    assert ran.count(NATIVE) > ran.count(LIBRARY)


def test_inference_is_planned(seconds):
    wanted = ((False, False), (True, False))
    seconds(lambda c: 1.0 if c == wanted else 2.0)
    model = rf.fold(basic_block().eval())
    report = rf.plan(model, images(), training=False)
    assert [b.choices for b in report.blocks] == [wanted]
    x = images()
    with torch.no_grad():
        torch.testing.assert_close(model(x), basic_like(model, x))


def basic_like(model, x):
    with rf.engine("library"):
        return model(x)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("name", ["basic_stride", "bottleneck", "resnext"])
def test_eager_runs_where_it_is_the_fastest(name, training, seconds):
    """With the very numbers of the modules, in training with its gradients and running statistics."""
    seconds(lambda c: 1.0 if c == EAGER else 2.0)
    channels, make = PAIRS[name]
    fused, composed = make()
    x = torch.randn(2, channels, 6, 6)
    report = rf.plan(fused, x, training=training)
    assert [b.choices for b in report.blocks] == [EAGER]
    decide.forget(plans=True)
    assert store_of_file(report)
    seen = [observe(m.train(training), x, gradients=training) for m in (fused, composed)]
    for key, value in seen[1].items():
        torch.testing.assert_close(seen[0][key], value, rtol=1e-6, atol=1e-6)
    rf.set_memory(fused, "minimal")
    if training:
        assert rf.plan(fused, x).blocks[0].choices != EAGER


@pytest.mark.parametrize("training", [True, False])
def test_a_block_left_to_eager_asks_again_when_something_changed(training, monkeypatch):
    """Its modules are called without its key being made anew; what a key tells apart ends that."""
    asked = []
    choices = decide.choices
    monkeypatch.setattr(decide, "choices", lambda *args, **named: asked.append(1) or choices(*args, **named))
    model, x = basic_block().train(training).requires_grad_(training), images()
    found = call_of(model, x)
    decide.decide(found.key, entry(EAGER))

    def asks(x=x):
        asked.clear()
        model(x)
        return bool(asked)

    assert asks() and not asks()
    assert call_of(model, x).choices == EAGER  # who records sees it
    assert asks() and not asks()
    assert asks(images(3)) and asks(x.contiguous())
    with rf.engine("library"):
        assert asks()
    asks()
    assert not asks()
    with torch.no_grad():
        assert asks()
    model.bn1.train(not training)
    assert asks()
    model.bn1.train(training)
    model.requires_grad_(not training)
    assert asks()
    model.requires_grad_(training)
    asks()
    assert not asks()
    decide.decide(found.key, entry(NATIVE if training else ((True, False),) * 2))
    assert asks() and asks()


def test_functions_run_what_a_plan_leaves_to_eager():
    model, x = basic_block(), images()
    conv, norm = rf.functional.Conv(model.conv1.weight, None, padding=(1, 1)), model.bn1
    unit = rf.functional.Norm(norm.weight, norm.bias)
    with recording() as noted:
        expected = rf.functional.conv_bn_act(x, conv, unit)
    decide.decide(noted.calls[0].key, entry(EAGER))
    torch.testing.assert_close(rf.functional.conv_bn_act(x, conv, unit), expected)


def store_of_file(report):
    return all(decide.store.find(b.key).choices == b.choices for b in report.blocks)


def test_compiled_blocks_cannot_be_eager(measured, ran, monkeypatch):
    monkeypatch.setattr(search, "plan_block", lambda *_: entry(EAGER))
    model, x = basic_block(), images()
    rf.plan(model, x)
    ran.clear()
    torch.compile(model, backend="aot_eager")(x).sum().backward()
    assert set(ran) == {LIBRARY}


def test_a_wrong_kernel_is_disqualified(seconds, monkeypatch):
    right = ops.conv_fprop

    def wrong(*arguments):
        y, statistics = right(*arguments)
        return y * 1.01, statistics

    monkeypatch.setattr(ops, "conv_fprop", wrong)
    seconds(lambda c: 10 - sum(map(sum, c)) if c else 20)  # the more is native, the faster
    model, x = basic_block(), images()
    with pytest.warns(UserWarning, match=r"not used here: native, for training float32 2x16x6x6.*report"):
        (planned,) = rf.plan(model, x).blocks
    assert planned.choices == ((False, True), (False, True))
    assert {"native", "fprop | library", "library | fprop"} <= set(planned.entry.disqualified)
    # For good: a later process does not try again, and the right kernels stay in use.
    decide.forget(plans=True)
    monkeypatch.setattr(ops, "conv_fprop", right)
    (again,) = rf.plan(model, x).blocks
    assert again.choices == planned.choices


def test_a_kernel_wrong_beyond_a_few_images_is_disqualified(seconds, monkeypatch):
    right = ops.conv_fprop

    def wrong(x, *arguments):
        y, statistics = right(x, *arguments)
        if len(x) > 4:
            y[-1, :, 0, 0] += 1
        return y, statistics

    monkeypatch.setattr(ops, "conv_fprop", wrong)
    monkeypatch.setattr("resnet_fused.planner.proof.MOST_MULTIPLY_ADDS", 1)
    seconds(lambda c: 10 - sum(map(sum, c)) if c else 20)
    with pytest.warns(UserWarning, match="from the library's"):
        (planned,) = rf.plan(basic_block(), images(8)).blocks
    assert not any(fprop for fprop, _ in planned.choices)


def test_no_memory_means_library(monkeypatch):
    def exhausted(*_, **__):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(search, "make", exhausted)
    (planned,) = rf.plan(basic_block(), images()).blocks
    assert planned.choices == LIBRARY
    assert "memory" in planned.entry.why


def test_planning_leaves_the_model_as_it_was(measured, capsys):
    model = basic_block().eval()
    model.bn1.train()
    before = {name: t.clone() for name, t in model.state_dict().items()}
    random = torch.get_rng_state()
    rf.plan(model, images().requires_grad_())
    after = torch.get_rng_state()
    assert not model.training and model.bn1.training
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())
    images()
    torch.set_rng_state(random)
    images()
    assert torch.equal(torch.get_rng_state(), advanced(after))
    assert "for a test" in capsys.readouterr().out


def advanced(state):
    torch.set_rng_state(state)
    return torch.get_rng_state()


def test_nothing_fused_is_an_error():
    with pytest.raises(ValueError, match="model: expected fused blocks"):
        rf.plan(torch.nn.Conv2d(3, 3, 1), torch.randn(1, 3, 4, 4))


# When.


def test_by_default_the_shipped_table_decides(measured, ran):
    model, x = basic_block(), images()
    model(x)
    assert not measured and len(ran) == 1 and ran[0] == table_of(model, x)


@pytest.mark.parametrize("how", ["measure", "benchmark"])
def test_first_use_is_measured_once(how, measured, ran, monkeypatch):
    if how == "measure":
        monkeypatch.setenv("RESNET_FUSED_PLAN", "measure")
    else:
        monkeypatch.setattr(torch.backends.cudnn, "benchmark", True)
    model = basic_block()
    for _ in range(2):
        model(images()).sum().backward()
    assert len(measured) == 1 and ran == [MIXED] * 2
    model(images(3))
    assert len(measured) == 2


def test_a_file_alone_is_followed(measured, monkeypatch):
    monkeypatch.setenv("RESNET_FUSED_PLAN", "file")
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", True)
    basic_block()(images())
    assert not measured


def test_a_decision_stays(measured, ran, monkeypatch):
    """What ran by the shipped table goes on so, whatever is switched on later; an explicit plan replaces it."""
    model, x = basic_block(), images()
    model(x)
    monkeypatch.setenv("RESNET_FUSED_PLAN", "measure")
    model(x)
    assert not measured and ran[0] == ran[1] != MIXED
    rf.plan(model, x)
    ran.clear()
    model(x)
    assert ran == [MIXED]


def test_off(measured, ran, monkeypatch):
    model, x = basic_block(), images()
    rf.plan(model, x)
    decide.forget(plans=True)
    monkeypatch.setenv("RESNET_FUSED_PLAN", "off")
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", True)
    ran.clear()
    model(x)
    assert len(measured) == 1 and len(ran) == 1 and ran[0] == table_of(model, x)
    assert "off" in rf.plan(model, x).note


def test_a_wrong_value_is_named(monkeypatch):
    monkeypatch.setenv("RESNET_FUSED_PLAN", "always")
    with pytest.raises(ValueError, match=r"RESNET_FUSED_PLAN: expected one of .*'off', 'file', 'measure'.*'always'"):
        basic_block()(images())


def test_deterministic_algorithms_are_not_measured(measured, ran, monkeypatch):
    monkeypatch.setenv("RESNET_FUSED_PLAN", "measure")
    model, x = basic_block(), images()
    table = call_of(model, x).table
    torch.use_deterministic_algorithms(True)
    try:
        model(x)
        assert "deterministic" in rf.plan(model, x).note
        model(x)
    finally:
        torch.use_deterministic_algorithms(False)
    assert not measured and set(ran) == {table}
    model(x)
    assert len(measured) == 1


def test_nothing_is_measured_during_capture(monkeypatch):
    monkeypatch.setenv("RESNET_FUSED_PLAN", "measure")
    key = call_of(basic_block(), images()).key._replace(device=torch.device("cuda"))
    for capturing in (True, False):
        monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda c=capturing: c)
        assert decide._may_measure(key) is not capturing


def test_nothing_is_decided_on_fake_tensors(measured, monkeypatch):
    monkeypatch.setenv("RESNET_FUSED_PLAN", "measure")
    model, x = basic_block(), images()
    with FakeTensorMode(allow_non_fake_inputs=True) as fake:
        model(fake.from_tensor(x))
    assert not measured and not decide._decided
    model(x)
    assert len(measured) == 1


def test_compiled_blocks_follow_plans_and_measure_nothing(measured, ran, monkeypatch):
    monkeypatch.setenv("RESNET_FUSED_PLAN", "measure")
    model = basic_block()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    compiled(images(2)).sum().backward()
    assert not measured and set(ran) == {table_of(model, images(2))}
    rf.plan(model, images(2))
    ran.clear()
    compiled(images(2)).sum().backward()
    assert len(measured) == 1 and set(ran) == {MIXED}


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpoints_run_again_as_they_ran(reentrant, measured, ran, monkeypatch):
    monkeypatch.setenv("RESNET_FUSED_PLAN", "measure")
    first, second = basic_block(), basic_block()
    x = images().requires_grad_()
    checkpoint(lambda t: second(first(t)), x, use_reentrant=reentrant).sum().backward()
    assert len(measured) == 1 and ran == [MIXED] * 4


def test_nothing_is_measured_in_backward(measured, monkeypatch):
    monkeypatch.setenv("RESNET_FUSED_PLAN", "measure")
    model, x = basic_block(), torch.ones(1, requires_grad=True)

    def hook(_):
        model(images())

    (x * 2).register_hook(hook)
    y = x * 2
    y.register_hook(hook)
    y.backward()
    assert not measured and len(decide._decided) == 1


def test_measuring_never_fails_a_forward(monkeypatch, capsys):
    monkeypatch.setenv("RESNET_FUSED_PLAN", "measure")

    def broken(*_, **__):
        raise RuntimeError("no such kernel")

    monkeypatch.setattr(search, "make", broken)
    basic_block()(images()).sum().backward()
    assert "no such kernel" in capsys.readouterr().err


def test_first_use_for_real(monkeypatch):
    """Under everything that a caller may have on, with its own clock."""
    monkeypatch.setenv("RESNET_FUSED_PLAN", "measure")
    model, x = basic_block(), images()
    with torch.autocast("cpu", torch.bfloat16), torch.autograd.graph.saved_tensors_hooks(lambda t: t, lambda t: t):
        model(x)
    with torch.inference_mode():
        model.eval()(x)
    assert {source for _, source in decide._decided.values()} == {"measured"}


# What is remembered.


def test_a_later_process_follows_the_file(measured, ran):
    model, x = basic_block(), images()
    rf.plan(model, x)
    decide.forget(plans=True)
    ran.clear()
    model(x)
    assert len(measured) == 1 and ran == [MIXED]
    assert json.loads(rf.plan.path().read_text())["format"] == store.FORMAT


@pytest.mark.parametrize(
    "text",
    [
        "{",
        "[]",
        '{"format": 0}',
        '{"format": 1, "machines": [{}]}',
        '{"format": 1, "machines": [{"machine": {}, "blocks": {"b": {"units": [{"fprop": "fastest"}]}}}]}',
        '{"format": 1, "machines": [{"machine": {}, "blocks": []}]}',
        '{"format": 1, "machines": [{"machine": 3, "blocks": {}}]}',
    ],
)
def test_a_corrupt_file_is_ignored_once_and_replaced(text, measured, ran, capsys):
    rf.plan.path().parent.mkdir(parents=True)
    rf.plan.path().write_text(text)
    model = basic_block()
    for n in (2, 3):
        model(images(n))
    assert ran[0] == table_of(model, images())
    assert capsys.readouterr().err.count("is ignored") == 1
    rf.plan(model, images())
    assert store.parse(rf.plan.path().read_text())


def test_plans_of_other_versions_are_ignored_with_a_message(measured, ran, capsys, monkeypatch):
    model, x = basic_block(), images()
    rf.plan(model, x)
    decide.forget(plans=True)
    monkeypatch.setattr(torch, "__version__", "9.9")
    ran.clear()
    for n in (2, 3):
        model(images(n))
    assert ran[0] == table_of(model, x)
    assert capsys.readouterr().err.count("now 9.9 are ignored") == 1


def test_a_file_cannot_make_native_what_is_not(measured, ran):
    model, x = basic_block(), images().contiguous()
    call = call_of(model.to(memory_format=torch.contiguous_format), x)
    assert call.native == LIBRARY
    decide.store.add(call.key, entry(NATIVE))
    ran.clear()
    model(x)
    assert ran == [LIBRARY]


def test_a_folder_that_cannot_be_written_is_no_error(measured, monkeypatch, tmp_path, capsys):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("RESNET_FUSED_CACHE", str(tmp_path / "file"))
    rf.plan(basic_block(), images())
    rf.plan(basic_block(), images(3))
    assert capsys.readouterr().err.count("are not kept in") == 1


def write_many(path, name, start):
    start.wait()
    for i in range(25):
        store.write(path, {json.dumps({"device": "a card"}): {f"{name} {i}": entry(MIXED)}})


def test_two_processes_at_once_lose_nothing(tmp_path):
    path, context = tmp_path / "plans.json", multiprocessing.get_context("fork")
    start = context.Event()
    processes = [context.Process(target=write_many, args=(path, name, start)) for name in "ab"]
    for p in processes:
        p.start()
    start.set()
    for p in processes:
        p.join()
        assert p.exitcode == 0
    (blocks,) = store.parse(path.read_text()).values()
    assert len(blocks) == 50
    assert {p.name for p in tmp_path.iterdir()} == {"plans.json", "plans.lock"}


def test_export_load_show_clear(measured, ran, tmp_path, capsys):
    model, x = basic_block(), images()
    rf.plan(model, x)
    rf.plan.export(tmp_path / "shipped.json")
    rf.plan.clear()
    assert not rf.plan.path().exists()
    ran.clear()
    model(x)
    rf.plan.load(tmp_path / "shipped.json")
    model(x)
    assert ran[0] != MIXED and ran[1] == MIXED
    assert not rf.plan.path().exists()
    capsys.readouterr()
    rf.plan.show()
    shown = capsys.readouterr().out
    assert str(call_of(model, x).key.alone) in shown and str(rf.plan.path()) in shown
    (tmp_path / "other.json").write_text("{}")
    with pytest.raises(ValueError, match="other.json: not a file of plans"):
        rf.plan.load(tmp_path / "other.json")


def test_keys_tell_apart_what_runs_differently():
    """Each of these differs in the text that the file has, too."""
    model, x = basic_block(), images()
    found = {str(call_of(model, x).key), str(call_of(model, images(3)).key), str(call_of(model, x.contiguous()).key)}
    found.add(str(call_of(rf.BasicBlock(CHANNELS, CHANNELS), x).key))
    rf.set_memory(model, "minimal")
    found.add(str(call_of(model, x).key))
    with torch.autocast("cpu", torch.bfloat16):
        found.add(str(call_of(model, x.bfloat16()).key))
    with torch.no_grad():
        found.add(str(call_of(model.eval(), x).key))
    assert len(found) == 7
    assert keys.machine(torch.device("cpu"))["threads"] == str(torch.get_num_threads())


class TwoRuns(torch.nn.Module):
    """A module of two runs, since a ReLU6 is none of their layers."""

    def __init__(self):
        super().__init__()
        self.conv1, self.bn1 = torch.nn.Conv2d(CHANNELS, CHANNELS, 3, padding=1), torch.nn.BatchNorm2d(CHANNELS)
        self.conv2, self.bn2 = torch.nn.Conv2d(CHANNELS, CHANNELS, 3, padding=1), torch.nn.BatchNorm2d(CHANNELS)

    def forward(self, x):
        return F.relu6(self.bn2(self.conv2(F.relu6(self.bn1(self.conv1(x))))))


def two_runs():
    model = TwoRuns().to(memory_format=torch.channels_last)
    rf.fuse(model)
    return model


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("eager", [0.98, 0.995])
def test_a_module_that_is_slower_as_a_whole_is_left_to_eager(eager, training, measured, whole):
    whole(1.0, eager)
    model, x = two_runs(), images()
    before = state_of(model)
    report = rf.plan(model, x, training=training)
    (found,) = report.modules
    assert (found.seconds, found.eager_seconds, found.eager) == (1.0, eager, eager == 0.98)
    assert f"TwoRuns as a whole: {'eager' if found.eager else 'fused'}" in str(report)
    assert {name: t for name, t in state_of(model).items() if not torch.equal(t, before[name])} == {}

    expected = EAGER if found.eager else MIXED[:1]
    model.train(training)
    with torch.set_grad_enabled(training):
        assert choices_of(model, x) == [expected] * 2
        for _ in range(2):  # asks, and goes by the answer
            expected_output = without_fusion(copy.deepcopy(model))(x)
            torch.testing.assert_close(model(x), expected_output)
    # The same block elsewhere follows its own measurement.
    alone = torch.nn.Sequential(model.conv1, model.bn1)
    rf.fuse(alone)
    with torch.set_grad_enabled(training):
        assert choices_of(alone, x) == [MIXED[:1]]
    # Later processes follow the file.
    decide.forget(plans=True)
    with torch.set_grad_enabled(training):
        assert choices_of(two_runs().train(training), x) == [expected] * 2


def test_a_module_that_became_faster_is_fused_again(measured, whole, ran):
    model, x = two_runs(), images()
    whole(1.0, 0.5)
    rf.plan(model, x)
    assert choices_of(model, x) == [EAGER] * 2
    whole(1.0, 2.0)
    ran.clear()
    rf.plan(model, x)
    assert set(ran) == {MIXED[:1]}  # what raced was fused
    assert choices_of(model, x) == [MIXED[:1]] * 2


def test_no_memory_to_race_a_module_leaves_its_blocks_as_planned(measured, monkeypatch):
    def medians(*_):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(modules, "medians", medians)
    model, x = two_runs(), images()
    assert rf.plan(model, x).modules == []
    assert choices_of(model, x) == [MIXED[:1]] * 2


def test_a_module_has_the_same_keys_in_each_process():
    """Functions, whose addresses differ, are steps of it."""
    script = """
import test_plan, torch
model = test_plan.two_runs().eval()
with torch.no_grad():
    print(*(call.key for call in test_plan.calls_of(model, test_plan.images())), sep="\\n")
"""
    environ = os.environ | {"PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), *sys.path])}
    found = subprocess.run([sys.executable, "-c", script], env=environ, capture_output=True, text=True, check=True)
    with torch.no_grad():
        here = [str(call.key) for call in calls_of(two_runs().eval(), images())]
    assert found.stdout.splitlines() == here and len(here) == 2


def test_minimal_memory_is_never_left_to_eager(measured, whole):
    whole(1.0, 0.5)
    model, x = two_runs(), images()
    rf.set_memory(model, "minimal")
    assert rf.plan(model, x).modules == []
    assert choices_of(model, x) == [MIXED[:1]] * 2


@pytest.mark.parametrize(
    "count, dtype, memory, eager",
    [
        (1, torch.float32, "default", True),
        (2, torch.float32, "default", False),
        (1, torch.bfloat16, "default", False),
        (1, torch.float32, "minimal", False),
    ],
)
def test_one_small_image_is_eagers_in_training(count, dtype, memory, eager):
    """PyTorch multiplies it without packing weights; with more images, or in 16 bits, it does not."""
    model = basic_block().to(dtype)
    rf.set_memory(model, memory)
    x = images(count).to(dtype)
    found = call_of(model, x)
    assert (found.choices == EAGER, found.source) == (eager, "table")
    with torch.no_grad():
        assert call_of(model.eval(), x).choices != EAGER


def test_explain_says_that_the_table_leaves_a_block_to_eager():
    found = rf.explain(torch.nn.Sequential(two_runs()), images(1), training=True, rounds=1)
    engines = {engine for b in found.blocks for c in b.convolutions for engine in c.passes.values()}
    assert {e.name for e in engines} == {"eager"} and all("choice.py" in e.why for e in engines)


@pytest.mark.parametrize("change", ["layout", "pixels", "engine", "gradients", "plan", "forward"])
def test_few_contiguous_pixels_are_eagers_in_inference(change, ran_in_inference, monkeypatch):
    """Until something else is asked for; what the module itself does is followed at once."""
    model, x = torch.nn.Sequential(rf.BasicBlock(CHANNELS, CHANNELS)).eval(), images().contiguous()
    rf.fuse(model)
    with torch.no_grad():
        expected = model(x)
        assert choices_of(model, x) == [EAGER] and choices_of(model, images()) != [EAGER]
        for _ in range(2):
            del ran_in_inference[:]
            assert torch.equal(model(x), expected) and ran_in_inference == []
    grad, context = False, contextlib.nullcontext()
    if change == "layout":
        x = x.to(memory_format=torch.channels_last)
    elif change == "pixels":
        monkeypatch.setattr("resnet_fused.choice.FEW_CONTIGUOUS", 100)
        decide.forget(plans=False)
    elif change == "engine":
        context = rf.engine("library")
    elif change == "gradients":
        grad = True
    elif change == "plan":
        with torch.no_grad():
            key = call_of(model, x).key
        decide.decide(key, entry(all_library(key.units)))
    else:
        model[0].bn1.register_forward_hook(lambda module, args, output: output + 1)
    with context, torch.set_grad_enabled(grad):
        found = model(x)
        assert (ran_in_inference == []) == (change == "forward")
        reference = without_fusion(model)(x)
        torch.testing.assert_close(found, reference)
        assert torch.allclose(reference, expected) == (change != "forward")


def test_what_is_left_as_a_whole_is_left_inside_as_well(measured, whole, ran_in_inference):
    """Though its own forward calls children that are fused themselves."""
    unit = [torch.nn.Conv2d(CHANNELS, CHANNELS, 3, padding=1), torch.nn.BatchNorm2d(CHANNELS), torch.nn.ReLU6()]
    model = torch.nn.Sequential(torch.nn.Sequential(*unit), *copy.deepcopy(unit)).to(memory_format=torch.channels_last)
    rf.fuse(model.eval())
    whole(1.0, 0.5)
    x = images()
    rf.plan(model, x, training=False)
    with torch.no_grad():
        model(x)
        del ran_in_inference[:]
        for _ in range(4):
            model(x)
        assert ran_in_inference == []


def test_a_plane_of_one_pixel_is_no_contiguous_one():
    x = torch.randn(2, CHANNELS, 1, 1)
    model = basic_block().eval()
    with torch.no_grad():
        assert x.is_contiguous() and choices_of(model, x) != [EAGER]
