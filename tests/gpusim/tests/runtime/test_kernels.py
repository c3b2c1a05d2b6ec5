# SPDX-License-Identifier: BSD-3-Clause
# Copyright (c) the resnet_fused authors
"""An extension's own kernels, run from the PTX that nvcc embedded in it."""

import json
import os
import subprocess
import sys

import pytest
import torch

pytestmark = pytest.mark.cuda
DEVICE = "cuda"


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16])
def test_elementwise(ext, dtype):
    x = torch.randn(1000, device=DEVICE).to(dtype)
    y = torch.randn(1000, device=DEVICE).to(dtype)
    torch.testing.assert_close(ext.saxpy(x, y, 2.0), 2 * x + y)


def test_shared_memory_reduction(ext):
    x = torch.randn(5000, device=DEVICE)
    torch.testing.assert_close(ext.sum(x), x.sum().reshape(1), atol=1e-3, rtol=1e-4)


@pytest.mark.parametrize("extended", [False, True])
@pytest.mark.parametrize("n", [100, 15000])
def test_dynamic_shared_memory(ext, n, extended):
    x = torch.randn(3, n, device=DEVICE)
    assert torch.equal(ext.reverse(x, True, extended), x.flip(1))


def test_tensor_cores(ext):
    a = torch.randn(16, 16, device=DEVICE).bfloat16()
    b = torch.randn(16, 8, device=DEVICE).bfloat16()
    torch.testing.assert_close(ext.mma(a, b), a.float() @ b.float(), atol=1e-4, rtol=1e-4)


def test_symbols(ext):
    out, count = ext.look_up()
    assert out.tolist() == [1, 2, 3, 4, 1, 2, 3, 4] and count == 2


def test_autograd_through_an_extension(ext):
    class Saxpy(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x, y):
            return ext.saxpy(x, y, 3.0)

        @staticmethod
        def backward(ctx, grad):
            grad = grad.contiguous()  # sum's gradient is one number with strides of 0
            return ext.saxpy(grad, torch.zeros_like(grad), 3.0), grad

    x = torch.randn(10, device=DEVICE, requires_grad=True)
    Saxpy.apply(x.sin(), x).sum().backward()
    torch.testing.assert_close(x.grad, 3 * x.detach().cos() + 1)


def test_graph_of_kernels(ext):
    x, y = torch.zeros(100, device=DEVICE), torch.ones(100, device=DEVICE)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        z = ext.saxpy(x + 1, y, 2.0)
        total = ext.sum(z)
    for value in (1.0, 5.0):
        x.fill_(value)
        graph.replay()
        assert total.item() == 100 * (2 * (value + 1) + 1)


def test_occupancy(ext):
    p = torch.cuda.get_device_properties(0)
    blocks, shared, threads = ext.describe_reverse(256, 60000)
    assert shared == 1024 and threads == 1024
    per_sm = {(8, 0): 164, (9, 0): 228, (8, 9): 100, (7, 5): 64}[(p.major, p.minor)] * 1024
    reserved = 1024 if p.major >= 8 else 0
    assert blocks == min(per_sm // (60000 + reserved), 65536 // (128 * 256))


# --- wrong kernels ------------------------------------------------------------

def test_write_past_the_end(ext, capfd):
    x = torch.zeros(10, device=DEVICE)
    with pytest.raises(RuntimeError, match="illegal memory access"):
        ext.write_at(x, 10, True)
    report = capfd.readouterr().err
    assert "write_at" in report and "0 bytes past the end" in report and "40 bytes" in report
    ext.write_at(x, 9, True)  # and the device goes on working
    assert x.sum().item() == 1


@pytest.mark.parametrize("index", [-1, 10, 1000])
def test_read_outside(ext, index):
    x = torch.zeros(10, device=DEVICE)
    with pytest.raises(RuntimeError, match="illegal memory access"):
        ext.read_at(x, index, 1)


def test_read_after_free(ext):
    x, out = torch.zeros(10, device=DEVICE), torch.zeros(1, device=DEVICE)
    pointer = x.data_ptr()
    del x
    with pytest.raises(RuntimeError, match="illegal memory access"):
        ext.read_stale(pointer, out)


def test_host_memory(ext):
    x, out = torch.zeros(10), torch.zeros(1, device=DEVICE)
    with pytest.raises(RuntimeError, match="illegal memory access"):
        ext.read_stale(x.data_ptr(), out)
    ext.read_stale(x.pin_memory().data_ptr(), out)


@pytest.mark.parametrize("tell", ["synchronize", "item", "operator"])
def test_unchecked_fault_is_told_later(ext, tell):
    x = torch.zeros(10, device=DEVICE)
    ext.write_at(x, 11, False)
    with pytest.raises(RuntimeError, match="illegal memory access"):
        {"synchronize": torch.cuda.synchronize, "item": lambda: x[0].item(), "operator": lambda: x + 1}[tell]()
    torch.cuda.synchronize()


def test_unchecked_refusal_is_told_later(ext):
    x = torch.zeros(2048, device=DEVICE)
    ext.launch_shape(x, 1, 1025, False)
    with pytest.raises(RuntimeError, match="invalid configuration"):
        x + 1
    assert x.sum().item() == 0


def test_misaligned_vector_load(ext):
    x = torch.arange(9.0, device=DEVICE)
    assert ext.load_vector(x[4:]).item() == 4 + 5 + 6 + 7
    with pytest.raises(RuntimeError, match="misaligned"):
        ext.load_vector(x[1:])


def test_too_much_shared_memory(ext):
    x = torch.zeros(1, 15001, device=DEVICE)
    with pytest.raises(RuntimeError, match="invalid argument"):
        ext.reverse(torch.zeros(1, 100000, device=DEVICE), True, False)
    torch.cuda.synchronize()
    with pytest.raises(RuntimeError, match="invalid argument"):
        ext.reverse(torch.zeros(1, 20000, device=DEVICE), False, False)
    assert ext.reverse(x, True, False).sum().item() == 0


def test_launch_shapes(ext):
    x = torch.zeros(2048, device=DEVICE)
    for grid, block in ((1, 0), (0, 1), (1, 1025)):
        with pytest.raises(RuntimeError, match="invalid configuration"):
            ext.launch_shape(x, grid, block, True)
    ext.launch_shape(x, 2, 1024, True)
    assert x.sum().item() == 1024


def run_python(ext, code, **env):
    code = f"import torch, importlib.util as u; s = u.spec_from_file_location({ext.__name__!r}, {ext.__file__!r})\n" \
           f"ext = u.module_from_spec(s); s.loader.exec_module(ext)\n" + code
    return subprocess.run([sys.executable, "-c", code], env={**os.environ, **env}, capture_output=True, text=True)


def test_race_checker(ext):
    assert run_python(ext, "ext.racy()").returncode == 0
    p = run_python(ext, "ext.racy()", GPUSIM_CHECK="memory,races")
    assert p.returncode != 0 and "racy" in p.stderr


def test_endless_loop(ext):
    p = run_python(ext, "ext.endless(torch.zeros(1, device='cuda'))", GPUSIM_MAX_INSTRUCTIONS="100000")
    assert p.returncode != 0 and "endless" in p.stderr


def test_statistics(ext, tmp_path):
    path = tmp_path / "stats.jsonl"
    p = run_python(ext, "x = torch.ones(1000, device='cuda'); ext.saxpy(x, x, 2.0); ext.sum(x)",
                   GPUSIM_STATS=str(path))
    assert p.returncode == 0, p.stderr
    first, second = [json.loads(line) for line in path.read_text().splitlines()]
    assert "saxpy<float>" in first["kernel"] and first["grid"] == [8, 1, 1] and first["block"] == [128, 1, 1]
    assert first["global_load_bytes"] == 8000 and first["global_store_bytes"] == 4000
    assert second["static_shared_bytes"] == 1024 and second["atomics"] > 0 and second["barriers"] > 0


def test_counting_within_a_process(ext):
    import gpusim

    x = torch.ones(1000, device=DEVICE)
    ext.sum(x)
    assert gpusim.count(lambda: None) == []
    first, second = gpusim.count(lambda: (ext.saxpy(x, x, 2.0), ext.sum(x)))
    assert first["global_load_bytes"] == 8000 and first["global_distinct_store_sectors"] == 125
    assert second["global_distinct_load_sectors"] >= 125


def test_other_profiles(ext):
    p = run_python(ext, "print(torch.cuda.get_device_capability(), torch.cuda.device_count())\n"
                   "x = torch.ones(10, device='cuda:1'); print(ext.sum(x).item(), x.device)",
                   GPUSIM_DEVICE="h100", GPUSIM_DEVICES="2")
    assert p.returncode == 0, p.stderr
    assert p.stdout.split("\n")[:2] == ["(9, 0) 2", "10.0 cuda:1"]
    p = run_python(ext, "ext.sum(torch.ones(10, device='cuda'))", GPUSIM_DEVICE="t4")
    assert p.returncode != 0 and "TORCH_CUDA_ARCH_LIST" in p.stderr
