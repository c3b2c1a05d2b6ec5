# SPDX-License-Identifier: BSD-3-Clause
# Copyright (c) the resnet_fused authors
"""PyTorch's own operators on the simulated device against the CPU's results."""

import copy
import io
import os

import pytest
import torch
import torch.nn.functional as F

pytestmark = pytest.mark.cuda
DEVICE = "cuda"


def close(gpu, cpu, **tolerance):
    assert gpu.is_cuda and gpu.dtype == cpu.dtype
    torch.testing.assert_close(gpu.detach().cpu(), cpu.detach(), **tolerance)


def test_device():
    assert torch.cuda.is_available()
    assert torch.cuda.device_count() >= 1
    p = torch.cuda.get_device_properties(0)
    assert p.multi_processor_count > 0 and p.total_memory > 1 << 30
    assert torch.cuda.get_device_capability() == (p.major, p.minor)


def test_factories_and_printing():
    assert torch.zeros(3, device=DEVICE).sum().item() == 0
    assert torch.arange(5, device=DEVICE).tolist() == [0, 1, 2, 3, 4]
    assert torch.full((2, 2), 7, device=DEVICE).cpu().eq(7).all()
    assert torch.eye(3, device=DEVICE).trace().item() == 3
    assert torch.linspace(0, 1, 5, device=DEVICE)[-1].item() == 1
    assert sorted(torch.randperm(9, device=DEVICE).tolist()) == list(range(9))
    assert torch.tril_indices(3, 3, device=DEVICE).shape == (2, 6)
    text = repr(torch.ones(2, device=DEVICE))
    assert "cuda:0" in text and "1., 1." in text


@pytest.mark.skipif(not os.environ.get("PYTORCH_NO_CUDA_MEMORY_CACHING"), reason="the cache hands out used memory")
def test_fresh_memory_is_poisoned():
    assert torch.empty(100, device=DEVICE).isnan().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
def test_pointwise_and_reductions(dtype):
    a, b = torch.randn(33, 17).to(dtype), torch.rand(33, 17).to(dtype) + 0.5
    ga, gb = a.to(DEVICE), b.to(DEVICE)
    for f in (torch.add, torch.mul, torch.div, torch.maximum, torch.atan2, torch.fmod):
        close(f(ga, gb), f(a, b))
    for f in (torch.exp, torch.tanh, torch.sigmoid, F.gelu, F.silu, torch.abs, torch.neg):
        close(f(ga), f(a))
    for f in (torch.sum, torch.mean, torch.amax, torch.std, torch.logsumexp):
        close(f(ga, dim=1), f(a, dim=1))
    close(ga.softmax(-1), a.softmax(-1))
    close(ga.cumsum(0), a.cumsum(0))
    close(ga @ gb.t(), a @ b.t())
    close(ga + 1, a + 1)
    close(torch.where(ga > 0, ga, gb), torch.where(a > 0, a, b))


def test_in_place_out_and_views():
    a = torch.randn(6, 4)
    g = a.to(DEVICE)
    pointer = g.data_ptr()
    g.add_(1).mul_(2)
    assert g.data_ptr() == pointer
    close(g, a.clone().add_(1).mul_(2))
    g[1:3, ::2] = 5
    assert g[1, 0].item() == 5 and g[1, 1].item() != 5
    out = torch.empty(0, device=DEVICE)
    r = torch.add(g, g, out=out)
    assert r.data_ptr() == out.data_ptr() and out.shape == (6, 4)
    close(out, g.cpu() * 2)
    small = torch.empty(2, 2, device=DEVICE)
    with pytest.warns(UserWarning):
        torch.mul(g, 3, out=small)
    close(small, g.cpu() * 3)
    t = g.t()
    t += 1
    close(g.view(-1), (out.cpu() / 2 + 1).view(-1))
    close(g.t().contiguous(), g.cpu().t().contiguous())
    values, indices = torch.sort(g, dim=0)
    torch.sort(g, dim=0, out=(values, indices))
    close(values, torch.sort(g.cpu(), dim=0)[0])
    close(g.unfold(0, 2, 2), g.cpu().unfold(0, 2, 2))
    c = torch.view_as_complex(torch.randn(3, 2, device=DEVICE))
    close(torch.conj(c) * c, torch.conj(c.cpu()) * c.cpu())
    close(torch.conj(c).imag, torch.conj(c.cpu()).imag)


def test_composites_with_kernels_of_their_own():
    a, b = torch.randn(5, 4), torch.randint(-3, 3, (5, 4))
    close(torch.ldexp(a.to(DEVICE), b.to(DEVICE)), torch.ldexp(a, b))
    out = torch.empty(0, device=DEVICE), torch.empty(0, dtype=torch.long, device=DEVICE)
    torch.mode(a.to(DEVICE), out=out)
    close(out[0], torch.mode(a)[0])
    close(torch.histc(b.to(DEVICE), 4), torch.histc(b.double(), 4).long())


def test_indexing():
    a = torch.randn(8, 5)
    g = a.to(DEVICE)
    i = torch.tensor([1, 3, 3])
    close(g[i], a[i])
    close(g[i.to(DEVICE)], a[i])
    close(g[g > 0], a[a > 0])
    close(g.gather(1, torch.zeros(8, 2, dtype=torch.long, device=DEVICE)), a[:, :1].expand(8, 2))
    h = g.clone()
    h[i.to(DEVICE)] = 0
    b = a.clone()
    b[i] = 0
    close(h, b)
    close(h.index_add_(0, i.to(DEVICE), torch.ones(3, 5, device=DEVICE)), b.index_add_(0, i, torch.ones(3, 5)))
    close(g.nonzero(), a.nonzero())
    u, inverse, counts = torch.unique(i.to(DEVICE), return_inverse=True, return_counts=True)
    assert u.tolist() == [1, 3] and counts.tolist() == [1, 2]
    close(torch.cat([g, g], 1), torch.cat([a, a], 1))
    close(torch.stack([g, g]), torch.stack([a, a]))
    close(g.topk(2)[0], a.topk(2)[0])


def test_copies():
    a = torch.randn(4, 6)
    g = a.to(DEVICE)
    close(g.half(), a.half())
    assert torch.equal(g.cpu(), a)
    assert torch.equal(g.t().cpu(), a.t())
    b = torch.empty(6, 4)
    b.copy_(g.t())
    assert torch.equal(b, a.t())
    pinned = a.pin_memory()
    assert pinned.is_pinned() and not a.is_pinned()
    close(pinned.to(DEVICE, non_blocking=True), a)
    buffer = io.BytesIO()
    torch.save(g, buffer)
    buffer.seek(0)
    close(torch.load(buffer), a)
    assert g.new_zeros(2).device == g.device
    assert torch.from_numpy(g.cpu().numpy()).equal(a)
    with pytest.raises(TypeError):
        g.numpy()
    close(copy.deepcopy(g), a)


def test_devices_do_not_mix():
    with pytest.raises(RuntimeError, match="same device"):
        torch.ones(3, device=DEVICE) + torch.ones(3)
    with pytest.raises(RuntimeError, match="same device"):
        F.linear(torch.ones(2, 3, device=DEVICE), torch.ones(4, 3))
    assert (torch.ones(3, device=DEVICE) + torch.tensor(2.0)).sum().item() == 9


def test_random():
    torch.manual_seed(3)
    a = torch.randn(1000, device=DEVICE)
    b = torch.randn(1000, device=DEVICE)
    torch.manual_seed(3)
    assert torch.equal(a, torch.randn(1000, device=DEVICE))
    assert not torch.equal(a, b)
    assert abs(a.mean().item()) < 0.2 and abs(a.std().item() - 1) < 0.1
    state = torch.cuda.get_rng_state()
    c = torch.rand(10, device=DEVICE)
    torch.cuda.set_rng_state(state)
    assert torch.equal(c, torch.rand(10, device=DEVICE))
    g = torch.Generator(device=DEVICE).manual_seed(5)
    d = torch.randint(0, 100, (50,), device=DEVICE, generator=g)
    g.manual_seed(5)
    assert torch.equal(d, torch.randint(0, 100, (50,), device=DEVICE, generator=g))
    with pytest.raises(RuntimeError, match="generator"):
        torch.rand(3, device=DEVICE, generator=torch.Generator())
    cpu_state = torch.get_rng_state()
    x = F.dropout(torch.ones(1000, device=DEVICE), 0.5)
    assert torch.equal(cpu_state, torch.get_rng_state())
    assert 300 < (x == 0).sum().item() < 700
    assert torch.multinomial(torch.ones(10, device=DEVICE), 3).numel() == 3
    assert torch.bernoulli(torch.full((10,), 1.0, device=DEVICE)).sum() == 10


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("stride,padding,groups,dilation", [(1, 0, 1, 1), (2, 1, 1, 1), (1, 2, 2, 2), (1, 1, 4, 1)])
def test_conv2d(dtype, channels_last, stride, padding, groups, dilation):
    form = torch.channels_last if channels_last else torch.contiguous_format
    x = torch.randn(2, 4, 9, 11).to(dtype).to(memory_format=form)
    w = (torch.randn(8, 4 // groups, 3, 3) / 6).to(dtype).to(memory_format=form)
    b = torch.randn(8).to(dtype)
    cpu = [t.float().clone().requires_grad_() for t in (x, w, b)]
    gpu = [t.to(DEVICE).requires_grad_() for t in (x, w, b)]
    y = F.conv2d(*cpu, stride, padding, dilation, groups)
    z = F.conv2d(*gpu, stride, padding, dilation, groups)
    assert z.is_contiguous(memory_format=form)
    g = torch.randn_like(y)
    y.backward(g.to(dtype).float())
    z.backward(g.to(dtype).to(DEVICE))
    tolerance = {torch.float32: 1e-4, torch.float16: 2e-2, torch.bfloat16: 1e-1}[dtype]
    torch.testing.assert_close(z.float().cpu(), y, atol=tolerance, rtol=tolerance)
    for a, c in zip(gpu, cpu, strict=True):
        assert a.grad.dtype == dtype and a.grad.is_cuda
        torch.testing.assert_close(a.grad.float().cpu(), c.grad, atol=4 * tolerance, rtol=tolerance)


def test_other_convolutions():
    for f, shape, weight in ((F.conv1d, (2, 3, 10), (4, 3, 3)), (F.conv3d, (1, 2, 5, 5, 5), (3, 2, 3, 3, 3)),
                             (F.conv_transpose2d, (2, 3, 5, 5), (3, 4, 3, 3))):
        x, w = torch.randn(shape), torch.randn(weight)
        close(f(x.to(DEVICE), w.to(DEVICE)), f(x, w), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("train", [True, False])
@pytest.mark.parametrize("cudnn", [False, True])
def test_batch_norm(dtype, train, cudnn):
    cpu = torch.nn.BatchNorm2d(5).train(train)
    with torch.no_grad():
        cpu.weight.uniform_(0.5, 1.5)
        cpu.bias.normal_()
        cpu.running_mean.normal_()
    gpu = copy.deepcopy(cpu).to(DEVICE)
    x = torch.randn(3, 5, 6, 6).to(dtype)
    a, b = x.clone().requires_grad_(), x.to(DEVICE).requires_grad_()
    g = torch.randn_like(x)
    with torch.backends.cudnn.flags(enabled=cudnn):
        y, z = cpu(a), gpu(b)
        y.backward(g)
        z.backward(g.to(DEVICE))
    close(z, y)
    close(b.grad, a.grad)
    close(gpu.weight.grad, cpu.weight.grad)
    close(gpu.bias.grad, cpu.bias.grad)
    close(gpu.running_mean, cpu.running_mean)
    close(gpu.running_var, cpu.running_var)
    assert gpu.num_batches_tracked.item() == cpu.num_batches_tracked.item()


def compare_layer(cpu, *inputs, backward=True, **tolerance):
    gpu = copy.deepcopy(cpu).to(DEVICE)
    a = [t.clone().requires_grad_(t.is_floating_point()) for t in inputs]
    b = [t.to(DEVICE).requires_grad_(t.is_floating_point()) for t in inputs]
    y, z = cpu(*a), gpu(*b)
    if isinstance(y, tuple):
        y, z = y[0], z[0]
    close(z, y, **tolerance)
    if not backward:
        return
    y.square().mean().backward()
    z.square().mean().backward()
    for s, t in zip(b, a, strict=True):
        if t.grad is not None:
            close(s.grad, t.grad, **tolerance)
    for p, q in zip(gpu.parameters(), cpu.parameters(), strict=True):
        if q.grad is not None:
            close(p.grad, q.grad, **tolerance)


@pytest.mark.parametrize("make", [
    lambda: (torch.nn.Linear(6, 4), torch.randn(3, 6)),
    lambda: (torch.nn.LayerNorm(6), torch.randn(3, 6)),
    lambda: (torch.nn.RMSNorm(6), torch.randn(3, 6)),
    lambda: (torch.nn.GroupNorm(2, 6), torch.randn(3, 6, 4)),
    lambda: (torch.nn.InstanceNorm2d(3, affine=True), torch.randn(2, 3, 4, 4)),
    lambda: (torch.nn.MaxPool2d(2), torch.randn(2, 3, 6, 6)),
    lambda: (torch.nn.AvgPool2d(2), torch.randn(2, 3, 6, 6)),
    lambda: (torch.nn.AdaptiveAvgPool2d(1), torch.randn(2, 3, 6, 6)),
    lambda: (torch.nn.Upsample(scale_factor=2, mode="bilinear"), torch.randn(2, 3, 6, 6)),
    lambda: (torch.nn.Embedding(10, 4), torch.randint(0, 10, (3, 5))),
    lambda: (torch.nn.EmbeddingBag(10, 4), torch.randint(0, 10, (3, 5))),
    lambda: (torch.nn.LSTM(4, 5, num_layers=2, batch_first=True), torch.randn(2, 6, 4)),
    lambda: (torch.nn.GRU(4, 5, bidirectional=True), torch.randn(6, 2, 4)),
    lambda: (torch.nn.RNN(4, 5), torch.randn(6, 2, 4)),
    lambda: (torch.nn.TransformerEncoderLayer(8, 2, 16, dropout=0, batch_first=True), torch.randn(2, 5, 8)),
    lambda: (torch.nn.Softplus(), torch.randn(7)),
    lambda: (torch.nn.PReLU(), torch.randn(7)),
    lambda: (torch.nn.utils.parametrizations.weight_norm(torch.nn.Linear(6, 4)), torch.randn(3, 6)),
], ids=lambda m: None)
def test_layers(make):
    layer, x = make()
    compare_layer(layer, x, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("backend", ["MATH", "FLASH_ATTENTION", "EFFICIENT_ATTENTION"])
@pytest.mark.parametrize("causal", [False, True])
def test_attention(backend, causal):
    from torch.nn.attention import SDPBackend, sdpa_kernel
    dtype = torch.float16 if backend == "FLASH_ATTENTION" else torch.float32
    cpu = [torch.randn(2, 3, 8, 16).to(dtype).requires_grad_() for _ in range(3)]
    gpu = [t.detach().to(DEVICE).requires_grad_() for t in cpu]
    y = F.scaled_dot_product_attention(*[t.float() for t in cpu], is_causal=causal)
    with sdpa_kernel(getattr(SDPBackend, backend)):
        z = F.scaled_dot_product_attention(*gpu, is_causal=causal)
        z.square().sum().backward()
    y.square().sum().backward()
    tolerance = 1e-2 if dtype == torch.float16 else 1e-4
    torch.testing.assert_close(z.float().cpu(), y, atol=tolerance, rtol=tolerance)
    for a, b in zip(gpu, cpu, strict=True):
        torch.testing.assert_close(a.grad.float().cpu(), b.grad.float(), atol=3 * tolerance, rtol=3 * tolerance)


def test_losses():
    x, t = torch.randn(6, 4), torch.randint(0, 4, (6,))
    close(F.cross_entropy(x.to(DEVICE), t.to(DEVICE)), F.cross_entropy(x, t))
    close(F.mse_loss(x.to(DEVICE), -x.to(DEVICE)), F.mse_loss(x, -x))
    close(F.binary_cross_entropy_with_logits(x.to(DEVICE), torch.ones(6, 4, device=DEVICE)),
          F.binary_cross_entropy_with_logits(x, torch.ones(6, 4)))
    lp = torch.randn(10, 2, 5).log_softmax(-1)
    targets, il, tl = torch.randint(1, 5, (2, 4)), torch.tensor([10, 8]), torch.tensor([4, 3])
    close(F.ctc_loss(lp.to(DEVICE), targets.to(DEVICE), il, tl), F.ctc_loss(lp, targets, il, tl))


def test_linear_algebra_and_fft():
    a = torch.randn(5, 5)
    spd = a @ a.t() + torch.eye(5)
    g = spd.to(DEVICE)
    close(torch.linalg.cholesky(g), torch.linalg.cholesky(spd))
    close(torch.linalg.inv(g), torch.linalg.inv(spd), atol=1e-4, rtol=1e-4)
    close(torch.linalg.solve(g, g), torch.linalg.solve(spd, spd), atol=1e-4, rtol=1e-4)
    close(torch.linalg.svdvals(g), torch.linalg.svdvals(spd), atol=1e-4, rtol=1e-4)
    close(torch.linalg.eigvalsh(g), torch.linalg.eigvalsh(spd), atol=1e-4, rtol=1e-4)
    close(torch.fft.rfft(a.to(DEVICE)), torch.fft.rfft(a))
    close(torch.einsum("ij,jk->ik", g, g), torch.einsum("ij,jk->ik", spd, spd))
    close(torch.bmm(g[None], g[None]), torch.bmm(spd[None], spd[None]))


def test_sparse():
    s = torch.tensor([[0, 2.0], [3, 0]]).to_sparse()
    g = s.to(DEVICE)
    d = torch.randn(2, 3)
    assert g.is_sparse and g.device.type == DEVICE and g._nnz() == 2
    close(g.to_dense(), s.to_dense())
    close(torch.sparse.mm(g, d.to(DEVICE)), torch.sparse.mm(s, d))
    close((g + g).coalesce().to_dense(), s.to_dense() * 2)
    close((g * 3).to_dense(), s.to_dense() * 3)
    close(torch.eye(3, device=DEVICE).to_sparse().to_dense(), torch.eye(3))
    layer = torch.nn.Embedding(5, 2, sparse=True)
    gpu = copy.deepcopy(layer).to(DEVICE)
    for model, device in ((layer, "cpu"), (gpu, DEVICE)):
        optimizer = torch.optim.SparseAdam(model.parameters(), lr=0.1)
        model(torch.tensor([1, 3, 1], device=device)).sum().backward()
        assert model.weight.grad.is_sparse
        optimizer.step()
    close(gpu.weight, layer.weight)


@pytest.mark.parametrize("name,options", [
    ("SGD", dict(lr=0.1, momentum=0.9, foreach=True)), ("SGD", dict(lr=0.1, fused=True)),
    ("AdamW", dict(lr=0.1, foreach=True)), ("AdamW", dict(lr=0.1, fused=True)), ("Adam", dict(lr=0.1, capturable=True)),
    ("RMSprop", dict(lr=0.1)), ("Adagrad", dict(lr=0.1))])
def test_optimizers(name, options):
    cpu = torch.nn.Linear(5, 3)
    gpu = copy.deepcopy(cpu).to(DEVICE)
    cpu_options = {k: v for k, v in options.items() if k not in ("fused", "foreach", "capturable")}
    a = getattr(torch.optim, name)(cpu.parameters(), **cpu_options)
    b = getattr(torch.optim, name)(gpu.parameters(), **options)
    x = torch.randn(4, 5)
    for _ in range(3):
        for model, optimizer, data in ((cpu, a, x), (gpu, b, x.to(DEVICE))):
            optimizer.zero_grad()
            model(data).square().mean().backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
    close(gpu.weight, cpu.weight, atol=1e-5, rtol=1e-4)


def test_autocast_and_grad_scaler():
    model = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.BatchNorm2d(4), torch.nn.Flatten(),
                                torch.nn.Linear(4 * 36, 2)).to(DEVICE)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    scaler = torch.amp.GradScaler("cuda", init_scale=1024.0)
    x = torch.randn(2, 3, 8, 8, device=DEVICE)
    before = model[0].weight.detach().clone()
    for dtype in (torch.float16, torch.bfloat16):
        with torch.autocast("cuda", dtype=dtype):
            y = model(x)
            assert y.dtype == dtype
            loss = y.float().square().mean()
        optimizer.zero_grad()
        scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        scaler.step(optimizer)
        scaler.update()
    assert not torch.equal(before, model[0].weight)
    assert scaler.get_scale() == 1024.0
    optimizer.zero_grad()
    scaler.scale(model(x).sum() * float("inf")).backward()
    kept = model[0].weight.detach().clone()
    scaler.step(optimizer)
    scaler.update()
    assert torch.equal(kept, model[0].weight) and scaler.get_scale() == 512.0


def test_checkpoint():
    from torch.utils.checkpoint import checkpoint
    layer = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Dropout(0.5)).to(DEVICE)
    x = torch.randn(3, 4, device=DEVICE, requires_grad=True)
    torch.manual_seed(1)
    layer(x).sum().backward()
    plain = x.grad.clone()
    x.grad = None
    torch.manual_seed(1)
    checkpoint(layer, x, use_reentrant=False).sum().backward()
    assert torch.equal(plain, x.grad)


def test_streams_events_and_memory():
    stream = torch.cuda.Stream()
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    with torch.cuda.stream(stream):
        assert torch.cuda.current_stream() == stream
        x = torch.ones(10, device=DEVICE) * 2
        x.record_stream(stream)
    stream.synchronize()
    end.record()
    torch.cuda.synchronize()
    assert start.elapsed_time(end) >= 0 and end.query()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    big = torch.zeros(1 << 20, device=DEVICE)
    assert torch.cuda.memory_allocated() - before == 4 << 20
    del big
    assert torch.cuda.memory_allocated() == before
    assert torch.cuda.max_memory_allocated() >= before + (4 << 20)
    free, total = torch.cuda.mem_get_info()
    assert 0 < free <= total
    with pytest.raises(RuntimeError, match="out of memory"):
        torch.empty(1 << 40, device=DEVICE)


def test_autograd_functions():
    assert torch.autograd.gradcheck(lambda a, b: (a @ b).tanh(),
                                    (torch.randn(3, 3, dtype=torch.double, device=DEVICE, requires_grad=True),
                                     torch.randn(3, 3, dtype=torch.double, device=DEVICE, requires_grad=True)))
    x = torch.randn(4, device=DEVICE)
    close(torch.func.vmap(torch.func.grad(lambda v: v.sin()))(x), x.cpu().cos())


def test_resnet18_step():
    torchvision = pytest.importorskip("torchvision")
    cpu = torchvision.models.resnet18(num_classes=10)
    gpu = copy.deepcopy(cpu).to(DEVICE)
    x, t = torch.randn(2, 3, 32, 32), torch.tensor([1, 7])
    losses = []
    for model, device in ((cpu, "cpu"), (gpu, DEVICE)):
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
        loss = F.cross_entropy(model(x.to(device)), t.to(device))
        loss.backward()
        optimizer.step()
        losses.append(loss)
    close(losses[1], losses[0], atol=1e-5, rtol=1e-5)
    for p, q in zip(gpu.parameters(), cpu.parameters(), strict=True):
        close(p, q, atol=1e-5, rtol=1e-4)
    for p, q in zip(gpu.buffers(), cpu.buffers(), strict=True):
        close(p, q, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_compile(backend):
    f = torch.compile(lambda x: (x.sin() + x).sum(), backend=backend)
    x = torch.randn(5, device=DEVICE, requires_grad=True)
    f(x).backward()
    close(x.grad, x.detach().cpu().cos() + 1)


def test_gloo(tmp_path):
    import torch.distributed as dist
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        x = torch.ones(3, device=DEVICE)
        dist.all_reduce(x)
        assert x.tolist() == [1, 1, 1]
    finally:
        dist.destroy_process_group()


def test_torchvision_operators():
    ops = pytest.importorskip("torchvision").ops
    boxes = torch.tensor([[0, 0, 2, 2], [0, 0, 2.1, 2], [5, 5, 6, 6]])
    scores = torch.tensor([0.9, 0.8, 0.7])
    assert ops.nms(boxes.to(DEVICE), scores.to(DEVICE), 0.5).tolist() == [0, 2]


def test_graph_of_operators():
    x = torch.zeros(4, device=DEVICE)
    y = torch.zeros(4, device=DEVICE)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        z = (x + 1) * 2
        y.add_(z)
    assert y.sum().item() == 0
    for value in (1.0, 2.0):
        x.fill_(value)
        graph.replay()
        assert z.tolist() == [(value + 1) * 2] * 4
    assert y.tolist() == [10.0] * 4
