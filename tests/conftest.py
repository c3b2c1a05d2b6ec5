# SPDX-License-Identifier: BSD-3-Clause
# Copyright (c) the resnet_fused authors
import sys
from collections import defaultdict
from pathlib import Path

import pytest
import torch
from simulator import simulated
from thinning import covering, skip_reason

import resnet_fused
from resnet_fused.planner import decide
from resnet_fused.surgery import program

# For `benchmarks`. Appended, so that the package is still imported from where it is installed.
sys.path.append(str(Path(__file__).parents[1]))

collect_ignore = ["gpusim"]  # the simulator's own tests run on it: make test-gpusim


@pytest.hookimpl(tryfirst=True)  # before -m chooses
def pytest_collection_modifyitems(items):
    skip_impossible(items)
    mark_further(items)
    skip_cuda(items)


def skip_impossible(items):
    """Skips the cases that can't run here, before others are chosen to cover the values of parameters."""
    for item in items:
        reason = skip_reason(item)
        if reason is None and "sim_counters" in item.fixturenames and not simulated():
            reason = "counts on the simulator only: make test-cuda"
        if reason is not None:
            item.add_marker(pytest.mark.skip(reason=reason))


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item):
    """A case that skips itself may have been chosen to stand for others: then nothing did what it should."""
    report = yield
    declared = item.get_closest_marker("skip") or item.get_closest_marker("skipif")
    if report.skipped and hasattr(item, "callspec") and not declared and not hasattr(report, "wasxfail"):
        report.outcome = "failed"
        report.longrepr = f"{item.nodeid}: a case of several skips by its mark skip_where, not while it runs"
    return report


def mark_further(items):
    """Marks as `further` the cases of a test, on each device, beyond a few that cover them, of those that can run."""
    tests = defaultdict(list)
    for item in items:
        slow = item.get_closest_marker("slow")
        if slow and not slow.kwargs.get("reason"):
            raise pytest.UsageError(f"{item.nodeid}: slow without a reason")
        if not slow and hasattr(item, "callspec"):
            tests[item.nodeid.split("[")[0], item.get_closest_marker("cuda") is not None].append(item)
    for cases in tests.values():
        possible = [case for case in cases if not case.get_closest_marker("skip")] or cases
        values = [{name: repr(value) for name, value in case.callspec.params.items()} for case in possible]
        kept = {possible[i] for i in covering(values)}
        for case in cases:
            if case not in kept:
                case.add_marker("further")


def skip_cuda(items):
    """Skips what is marked `cuda` where it can't run."""
    if not torch.cuda.is_available():
        reason = "needs a GPU, or the simulator: make test-cuda"
    elif not resnet_fused.build_info()["cuda"]:
        reason = f"{resnet_fused.__file__} is built without its CUDA kernels"
    else:
        return
    if simulated():  # Nothing else is to be tested there: skipping it all would look like success.
        raise pytest.UsageError(f"on the simulator: {reason}")
    for item in items:
        if item.get_closest_marker("cuda"):
            item.add_marker(pytest.mark.skip(reason=reason))


@pytest.fixture(autouse=True)
def seed():
    """The same random numbers for each test, whichever tests run."""
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def full_precision(monkeypatch):
    """Convolutions of float32 in float32: cuDNN's default is TF32, whose 11 bits would hide what we round ourselves."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)


@pytest.fixture(autouse=True)
def shipped_table(monkeypatch):
    """What is fused does not depend on the tests before: benchmarks turn this on, and then blocks are measured."""
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", False)


@pytest.fixture(autouse=True)
def learns_at_once(monkeypatch):
    """Inference is repeated from a test's second call on, which then has to see what changed after the first."""
    monkeypatch.setattr(program, "LEARN_AFTER", 0)


@pytest.fixture(autouse=True)
def no_plans(monkeypatch, tmp_path):
    """No plan of the user's is followed or changed, and none outlives a test."""
    monkeypatch.setenv("RESNET_FUSED_CACHE", str(tmp_path / "plans"))
    monkeypatch.delenv("RESNET_FUSED_PLAN", raising=False)
    decide.forget(plans=True)
    yield
    decide.forget(plans=True)


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.cuda)])
def device(request):
    """Each device with kernels of its own."""
    return torch.device(request.param)


@pytest.fixture
def sim_counters():
    """A function that calls its argument and returns the simulator's counters of each kernel launched, as dicts.

    They are exact and repeatable; tests/gpusim/README.md explains them.
    """
    import gpusim

    return gpusim.count
