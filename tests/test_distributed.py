# SPDX-License-Identifier: BSD-3-Clause
# Copyright (c) the resnet_fused authors
"""SyncBatchNorm, DDP and FSDP2 in two and three processes (gloo) against one process with the whole batch, on the CPU
and in part on a GPU, where PyTorch's own SyncBatchNorm is there to compare with.

The processes start once; each runs all of `distributed_checks.py` and writes down what it found.
"""

import json
import subprocess
import sys
from pathlib import Path

import distributed_checks
import pytest
import torch
from scripts import environment
from thinning import missing
from torch import nn

import resnet_fused as rf

SCRIPT = Path(distributed_checks.__file__)


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """By the number of processes and their device, for each process the error of each check that failed."""
    known = {}

    def run(processes, device="cpu"):
        if (processes, device) not in known:
            folder = tmp_path_factory.mktemp("distributed")
            started = [
                subprocess.Popen(
                    [sys.executable, SCRIPT, device, folder, folder / "store", str(rank), str(processes)],
                    env=environment() | {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"},
                    stdout=subprocess.PIPE,
                    stderr=subprocess.STDOUT,
                    text=True,
                )
                for rank in range(processes)
            ]
            outputs = [process.communicate(timeout=600)[0] for process in started]
            written = [folder / f"{rank}.json" for rank in range(processes)]
            assert all(path.exists() for path in written), outputs
            known[processes, device] = [json.loads(path.read_text()) for path in written]
        return known[processes, device]

    return run


needs_installed = pytest.mark.skip_where(reason=lambda check: missing(*distributed_checks.NEEDS.get(check, ())))


@needs_installed
@pytest.mark.parametrize("check", distributed_checks.CHECKS)
def test_two_processes(found, check):
    assert_passed(found(2), check)


@needs_installed
@pytest.mark.slow(reason="three processes, each of which imports torch")
@pytest.mark.parametrize("check", distributed_checks.CHECKS)
def test_three_processes(found, check):
    assert_passed(found(3), check)


@pytest.mark.cuda
@pytest.mark.parametrize("check", distributed_checks.ON_A_GPU)
def test_two_processes_on_a_gpu(found, check):
    assert_passed(found(2, "cuda"), check)


def assert_passed(of_processes, check):
    for rank, errors in enumerate(of_processes):
        assert check in errors, f"process {rank} did not get there: {errors}"
        assert errors[check] is None, f"process {rank}: {errors[check]}"


@pytest.mark.parametrize("training", [True, False])
def test_without_a_process_group(training):
    """As `nn.BatchNorm2d`, to the bit."""
    torch.manual_seed(0)
    block = rf.BasicBlock(8, 8).train(training)
    x, results = torch.randn(2, 8, 6, 6), []
    for _ in range(2):
        mine = x.clone().requires_grad_()
        z = block(mine)
        z.square().sum().backward()
        results.append([z, mine.grad, block.bn1.weight.grad.clone()])
        block.zero_grad()
        nn.SyncBatchNorm.convert_sync_batchnorm(block)
    assert type(block.bn1) is nn.SyncBatchNorm
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
