# SPDX-License-Identifier: BSD-3-Clause
# Copyright (c) the resnet_fused authors
"""The CPU's memory pool: what comes from it, that it is used again, and that it lets go."""

import gc
import subprocess
import sys
import textwrap
import threading

import pytest
import torch

import resnet_fused as rf
from resnet_fused import _C, ops

MIB = 2**20
IDENTITY = torch.tensor([[0.0], [1.0], [1.0], [0.0]])


def activation(mib):
    return torch.randn(1, 1, mib * 256, 1024)


def apply(y):
    return ops.bn_apply(y, IDENTITY)


@pytest.fixture(autouse=True)
def empty():
    gc.collect()  # what earlier tests left in reference cycles
    rf.empty_cache()
    before = _C.memory_pool_state()["in_use"]
    yield
    rf.empty_cache()
    assert _C.memory_pool_state() == {"in_use": before, "waiting": 0}


def change(call):
    """What ``call`` changed: bytes in use and waiting; and its result, alive."""
    before = _C.memory_pool_state()
    result = call()
    after = _C.memory_pool_state()
    return after["in_use"] - before["in_use"], after["waiting"] - before["waiting"], result


def test_freed_memory_is_used_again():
    y = activation(4)
    used, waiting, z = change(lambda: apply(y))
    assert (used, waiting) == (4 * MIB, 0)
    address = z.data_ptr()
    del z
    assert _C.memory_pool_state()["waiting"] == 4 * MIB
    used, waiting, z = change(lambda: apply(y))
    assert (used, waiting, z.data_ptr()) == (4 * MIB, -4 * MIB, address)
    assert torch.equal(z, y)


def test_a_block_serves_several_and_is_whole_again():
    address = apply(activation(8)).data_ptr()
    before = _C.memory_pool_state()
    halves = [apply(activation(4)), apply(activation(3)), apply(activation(1))]
    state = _C.memory_pool_state()
    assert (state["in_use"] - before["in_use"], state["waiting"]) == (8 * MIB, 0)
    assert sorted(h.data_ptr() - address for h in halves) == [0, 4 * MIB, 7 * MIB]
    for i in (1, 0, 2):  # neighbours on both sides, on one, and none yet
        halves[i] = None
    used, waiting, z = change(lambda: apply(activation(8)))
    assert (used, waiting, z.data_ptr()) == (8 * MIB, -8 * MIB, address)


def test_the_smallest_that_fits_is_taken():
    large, small = apply(activation(8)), apply(activation(4))
    address = small.data_ptr()
    del large, small
    assert apply(activation(3)).data_ptr() == address


def test_parts_do_not_overlap():
    apply(activation(32))
    sources = [activation(mib) for mib in (3, 5, 1, 7, 2)]
    results = [apply(s) for s in sources]
    results[1] = results[3] = None
    results[1], results[3] = apply(sources[1]), apply(sources[3])
    assert all(torch.equal(r, s) for r, s in zip(results, sources, strict=True))


def test_the_same_calls_again_take_nothing_from_the_system():
    """Also where what lives longer lies in the midst of a block, so that another one was needed."""
    y = {mib: activation(mib) for mib in (1, 2, 4, 6, 8)}

    def calls():
        first, second = apply(y[8]), apply(y[8])
        del first, second
        small = apply(y[2])
        large = apply(y[8]), apply(y[8])
        del small, large
        return apply(y[4]), apply(y[6]), apply(y[1])

    def held():
        return sum(_C.memory_pool_state().values())

    results = calls()
    del results
    expected = held()
    for _ in range(5):
        results = calls()
        assert held() == expected
        del results
        assert held() == expected


def test_never_holds_more_than_was_in_use_together():
    before = _C.memory_pool_state()["in_use"]
    apply(activation(8))
    for mib in (2, 3, 4, 5, 6, 7):
        z = apply(activation(mib))
        state = _C.memory_pool_state()
        assert state["in_use"] + state["waiting"] - before <= 8 * MIB
        del z


def test_what_waits_too_long_is_given_back():
    large = apply(activation(8)), apply(activation(9))
    del large
    small = activation(1)
    for _ in range(1100):
        apply(small)
    assert _C.memory_pool_state()["waiting"] == 8 * MIB  # the one that is in use now and then


def test_small_tensors_are_left_to_torch():
    assert change(lambda: apply(torch.randn(1, 1, 16, 16)))[:2] == (0, 0)


def test_convolutions_come_from_it_and_nothing_else_does():
    x, weight = torch.randn(4, 16, 64, 64), torch.randn(16, 16, 1, 1)
    used, _, y = change(lambda: ops.convolution(x, weight, None, (1, 1), (0, 0), (1, 1), 1))
    assert used == MIB
    used, _, grads = change(lambda: ops.convolution_backward(y, x, weight, (1, 1), (0, 0), (1, 1), 1, True, True))
    assert used == MIB
    assert change(lambda: torch.conv2d(x, weight))[:2] == (0, 0)
    with pytest.raises(RuntimeError):
        ops.convolution(x, torch.randn(16, 15, 1, 1), None, (1, 1), (0, 0), (1, 1), 1)
    assert change(lambda: torch.empty(4 * MIB))[:2] == (0, 0)


def test_output_can_be_resized_and_outlives_the_call():
    z = apply(activation(1))
    first = z.flatten()[:10].clone()
    z.resize_(1, 1, 1024, 1024)
    assert torch.equal(z.flatten()[:10], first)


def test_many_threads():
    block = rf.BasicBlock(16, 16)
    x = torch.randn(4, 16, 64, 64)
    block.eval()
    with torch.no_grad():
        expected = block(x)
    wrong = []

    def work():
        with torch.no_grad():
            for _ in range(20):
                if not torch.equal(block(x), expected):
                    wrong.append(1)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_a_fork_amid_allocations():
    """As of a DataLoader's workers; the child would wait for a lock whose holder it has not."""
    script = """
        import os, signal, threading, torch
        from resnet_fused import ops
        torch.set_num_threads(1)  # OpenMP's threads don't survive a fork
        y, table = torch.zeros(1, 1, 2048, 1024), torch.zeros(4, 1)
        part = y[:, :, :1200].clone()

        def work():
            while True:  # neither fits where the other was: unmapping it takes long
                ops.bn_apply(y, table)
                ops.bn_apply(part, table)

        for _ in range(2):
            threading.Thread(target=work, daemon=True).start()
        for _ in range(40):
            child = os.fork()
            if child == 0:
                signal.alarm(10)
                ops.bn_apply(y, table)
                os._exit(0)
            assert os.waitpid(child, 0)[1] == 0
        os._exit(0)
    """
    subprocess.run([sys.executable, "-W", "ignore", "-c", textwrap.dedent(script)], check=True, timeout=120)


def test_profiler_sees_it():
    y = activation(4)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        z = apply(y)
    found = {e.key: e.self_cpu_memory_usage for e in profile.key_averages()}
    assert found["resnet_fused::bn_apply"] == z.nbytes
