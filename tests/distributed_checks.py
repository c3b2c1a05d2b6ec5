# SPDX-License-Identifier: BSD-3-Clause
# Copyright (c) the resnet_fused authors
"""What each process of tests/test_distributed.py does: checks by name, each of them by all processes at once.

Processes exchange by gloo, which takes tensors of the CPU and of a GPU that processes share.
"""

import contextlib
import copy
import dataclasses
import datetime
import functools
import json
import os
import sys
import threading
import traceback
from collections import Counter
from pathlib import Path
from unittest import mock

import torch
import torch.distributed as dist
import torch.nn.functional as F
from thinning import missing
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint
from torchvision.models.resnet import BasicBlock, Bottleneck

import resnet_fused as rf
from resnet_fused import ops
from resnet_fused.planner import decide
from resnet_fused.planner.entry import EAGER
from resnet_fused.planner.recording import recording
from resnet_fused.testing import assert_passed, compare_observations

CHECKS = {}
NEEDS = {"timm_batch_norms_with_an_activation": ("timm",)}  # what is not always installed
ON_A_GPU = (
    "as_torchs",
    "engines",
    "one_gather_in_each_direction",
    "settings_of_batch_norms",
    "sixteen_bits",
    "training_mode_without_gradients",
)
device = "cpu"  # main says
CLOSE = 1e-10  # in float64
# Images of each process, by how many processes there are.
UNEQUAL = {2: (2, 5), 3: (4, 1, 3)}
EMPTY = {2: (6, 0), 3: (3, 0, 5)}


def check(function):
    CHECKS[function.__name__] = function
    return function


class Net(nn.Module):
    """Blocks with an identity and with a projection, a bias, batch norms of one's choice."""

    def __init__(self, norm):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), norm(8), nn.ReLU())
        self.basic = BasicBlock(8, 8, norm_layer=norm)
        downsample = nn.Sequential(nn.Conv2d(8, 16, 1, 2, bias=False), norm(16))
        self.bottleneck = Bottleneck(8, 4, 2, downsample, norm_layer=norm)
        self.norm = norm(16)
        self.head = nn.Linear(16, 3)

    def forward(self, x):
        return self.head(F.relu(self.norm(self.bottleneck(self.basic(self.stem(x))))).mean((2, 3)))


def make(norm=nn.BatchNorm2d, dtype=torch.float64):
    torch.manual_seed(0)
    model = Net(norm)
    for m in model.modules():
        if isinstance(m, nn.BatchNorm2d) and m.affine:
            nn.init.uniform_(m.weight, 0.5, 1.5)
            nn.init.normal_(m.bias)
    return model.to(device, dtype, memory_format=torch.channels_last)


def sync(model, group=None):
    return nn.SyncBatchNorm.convert_sync_batchnorm(model, group)


def fused(model):
    report = rf.fuse(model)
    assert report.batch_norms.training == report.batch_norms.total, report
    return model


def batch(images, dtype=torch.float64):
    """Images, and the weights of the outputs in the loss."""
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(images, 3, 10, 8, generator=generator, dtype=torch.float64) + 3
    weight = torch.randn(images, 3, generator=generator, dtype=torch.float64)
    return x.to(device, dtype, memory_format=torch.channels_last), weight.to(device, dtype)


def share_of(counts, rank=None):
    """Where a process's images are in the whole batch."""
    rank = dist.get_rank() if rank is None else rank
    begin = sum(counts[:rank])
    return slice(begin, begin + counts[rank])


def whole(t):
    """A parameter that FSDP2 may have sharded."""
    return t.full_tensor() if hasattr(t, "full_tensor") else t


def train(model, run, x, weight, scale=1, reduce=lambda model: None, steps=2, backward=torch.Tensor.backward):
    """All that comes out of steps of SGD on the loss ``scale * (run(x) * weight).sum()``."""
    optimizer = torch.optim.SGD(model.parameters(), 0.05, momentum=0.9)
    seen = {}
    for step in range(steps):
        optimizer.zero_grad()
        mine = x.detach().requires_grad_()
        out = run(mine)
        backward((scale * out * weight).sum())
        reduce(model)
        seen |= {f"output {step}": out.detach(), f"gradient of x {step}": mine.grad / scale}
        learnt = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
        seen |= {f"gradient of {name} {step}": whole(grad).clone() for name, grad in learnt.items()}
        optimizer.step()
    seen |= {f"parameter {name}": whole(p.detach()).clone() for name, p in model.named_parameters()}
    return seen | {f"buffer {name}": b.clone() for name, b in model.named_buffers()}


def in_one_process(
    counts, norm=nn.BatchNorm2d, dtype=torch.float64, share=None, around=lambda run: run, prepare=None, **options
):
    """What eager execution of the whole batch gives, cut to this process's share. ``around``: how a model is called."""
    model, share = make(norm, dtype), share_of(counts) if share is None else share
    if prepare is not None:
        prepare(model)
    seen = train(model, around(model), *batch(sum(counts), dtype), **options)
    return {k: v[share] if k.startswith(("output", "gradient of x")) else v for k, v in seen.items()}


def assert_close(found, expected):
    assert found.keys() == expected.keys()
    for name, e in expected.items():
        assert found[name].shape == e.shape, name
        if e.numel():
            distance, size = float((found[name] - e).abs().max()), max(1.0, float(e.abs().max()))
            assert distance <= CLOSE * size, f"{name}: {distance:.1e} apart"


def assert_same_bits(tensors):
    """Of what every process has, the same everywhere."""
    for name, t in tensors.items():
        first = t.clone()
        dist.broadcast(first, 0)
        assert torch.equal(first, t), f"{name} differs between processes"


def sum_gradients(model, group=None):
    for p in model.parameters():
        if p.grad is not None:
            dist.all_reduce(p.grad, group=group)


def equals_one_process(counts, norm=nn.BatchNorm2d, wrap=None, prepare=None, **options):
    """A synchronised model on this process's share against one process. ``wrap``: DDP's or FSDP2's way to make it."""
    x, weight = (t[share_of(counts)] for t in batch(sum(counts)))
    model = make(norm)
    if prepare is not None:
        prepare(model)
    if wrap is not None:
        run = wrap(model)
        found = train(model, run, x, weight, scale=dist.get_world_size())  # the average of these is the sum
    else:
        run = fused(sync(model))
        found = train(model, run, x, weight, reduce=sum_gradients, **options)
    assert_close(found, in_one_process(counts, norm, prepare=prepare))
    assert_same_bits({k: v for k, v in found.items() if k.startswith(("parameter", "buffer"))})


@contextlib.contextmanager
def gathered():
    """How often tables of how many rows were exchanged."""
    seen, original = Counter(), ops.all_gather

    def gather(table, *group):
        seen[table.shape[1]] += 1
        return original(table, *group)

    with mock.patch.object(ops, "all_gather", gather):
        yield seen


def ddp(model):
    # DDP refuses a SyncBatchNorm on the CPU when it is made: converted behind it.
    wrapped = DistributedDataParallel(fused(model))
    sync(wrapped.module)
    return wrapped


def fsdp(model):
    fused(sync(model.to(memory_format=torch.contiguous_format)))  # FSDP2 takes no other parameters
    for child in (model.basic, model.bottleneck, model):
        fully_shard(child)
    return model


@check
def ddp_with_unequal_counts():
    equals_one_process(UNEQUAL[dist.get_world_size()], wrap=ddp)


@check
def ddp_with_an_empty_process():
    equals_one_process(EMPTY[dist.get_world_size()], wrap=ddp)


@check
def fsdp2():
    equals_one_process(UNEQUAL[dist.get_world_size()], wrap=fsdp)


@check
def engines():
    for name in ("reference", "library", "native"):
        for counts in (UNEQUAL, EMPTY):
            with rf.engine(name):
                equals_one_process(counts[dist.get_world_size()])


@check
def one_gather_in_each_direction():
    for memory in ("default", "minimal"):
        model = fused(sync(make()))
        rf.set_memory(model, memory)
        x, weight = batch(4)
        with gathered() as seen:
            (model(x) * weight).sum().backward()
        # Eight batch norms; those that meet in the projection's join share one in backward.
        assert seen == {3: 8 + 6, 5: 1}, (memory, seen)
        with gathered() as seen:
            model.eval()(x).sum().backward()
        assert not seen, seen


@check
def minimal_memory():
    def minimal(model):
        wrapped = ddp(model)
        rf.set_memory(model, "minimal")
        return wrapped

    for counts in (UNEQUAL, EMPTY):
        equals_one_process(counts[dist.get_world_size()], wrap=minimal)


@check
def settings_of_batch_norms():
    for options in ({"momentum": None}, {"affine": False}, {"track_running_stats": False}):
        equals_one_process(UNEQUAL[dist.get_world_size()], functools.partial(nn.BatchNorm2d, **options))


@check
def frozen_layers():
    """Gammas that are not learnt, nothing that is, batch norms that evaluate beside others that train."""

    def gammas(model):
        for m in model.modules():
            if isinstance(m, nn.modules.batchnorm._BatchNorm):
                m.weight.requires_grad_(False)

    def everything(model):
        model.requires_grad_(False).head.requires_grad_(True)

    def evaluating(model):
        model.basic.bn2.eval()
        model.bottleneck.downsample[1].eval()

    for prepare in (gammas, everything, evaluating):
        equals_one_process(UNEQUAL[dist.get_world_size()], prepare=prepare)


@check
def training_mode_without_gradients():
    """As when running statistics are made anew: they are those of all processes."""
    counts = UNEQUAL[dist.get_world_size()]
    model, expected = fused(sync(make())), make()
    x, _ = batch(sum(counts))
    with torch.no_grad(), gathered() as seen:
        found = {"output": model(x[share_of(counts)])} | dict(model.named_buffers())
        expected = {"output": expected(x)[share_of(counts)]} | dict(expected.named_buffers())
    assert seen == {3: 8}
    assert_close(found, expected)


@check
def deterministic_algorithms():
    torch.use_deterministic_algorithms(True)
    try:
        equals_one_process(UNEQUAL[dist.get_world_size()])
    finally:
        torch.use_deterministic_algorithms(False)


@check
def backward_in_another_thread():
    def backward(loss):
        thread = threading.Thread(target=loss.backward)
        thread.start()
        thread.join()

    equals_one_process(UNEQUAL[dist.get_world_size()], backward=backward)


@check
def groups():
    """The first process by itself, the others together."""
    world, rank = dist.get_world_size(), dist.get_rank()
    members = [[0], list(range(1, world))]
    made = [dist.new_group(ranks) for ranks in members]
    own = int(rank > 0)
    group, counts = made[own], [UNEQUAL[world][r] for r in members[own]]
    share = share_of(counts, members[own].index(rank))
    x, weight = (t[share] for t in batch(sum(counts)))
    model = fused(sync(make(), group))
    with gathered() as seen:
        found = train(model, model, x, weight, reduce=functools.partial(sum_gradients, group=group))
    assert_close(found, in_one_process(counts, share=share))
    assert bool(seen) == (len(counts) > 1)


@check
def float32_within_the_policy():
    for engine, images in (("library", UNEQUAL), ("native", UNEQUAL), ("native", EMPTY)):
        counts = images[dist.get_world_size()]
        reference, eager = (in_one_process(counts, dtype=t, steps=1) for t in (torch.float64, torch.float32))
        with rf.engine(engine):
            model = fused(sync(make(dtype=torch.float32)))
            x, weight = (t[share_of(counts)] for t in batch(sum(counts), torch.float32))
            found = train(model, model, x, weight, reduce=sum_gradients, steps=1)
        present = {name: t for name, t in eager.items() if t.numel()}
        assert_passed(compare_observations(found, present, reference, precision=torch.float32))


@check
def sixteen_bits():
    """Autocast, and weights of 16 bits, with an empty process, too: as far from float64 as the fused network in one."""

    def casting(run):
        return torch.autocast(device, torch.bfloat16)(run)

    for images in (UNEQUAL, EMPTY):
        counts = images[dist.get_world_size()]
        reference = in_one_process(counts, steps=1)
        for dtype, around in ((torch.float32, casting), (torch.bfloat16, lambda run: run)):
            whole_batch = in_one_process(counts, dtype=dtype, around=lambda run, a=around: a(fused(run)), steps=1)
            model = fused(sync(make(dtype=dtype)))
            x, weight = (t[share_of(counts)] for t in batch(sum(counts), dtype))
            found = train(model, around(model), x, weight, reduce=sum_gradients, steps=1)
            present = {name: t for name, t in whole_batch.items() if t.numel()}
            assert_passed(compare_observations(found, present, reference, precision=torch.bfloat16))


@check
def second_derivatives():
    counts = UNEQUAL[dist.get_world_size()]

    def penalised(model, x, weight):
        x = x.detach().requires_grad_()
        (g,) = torch.autograd.grad((model(x) * weight).sum(), x, create_graph=True)
        g.square().sum().backward()
        return x.grad

    expected = make()
    of_x = penalised(expected, *batch(sum(counts)))[share_of(counts)]
    model = fused(sync(make()))
    found = penalised(model, *(t[share_of(counts)] for t in batch(sum(counts))))
    sum_gradients(model)
    gradients = [{n: p.grad for n, p in m.named_parameters() if p.grad is not None} for m in (model, expected)]
    assert_close(gradients[0] | {"x": found}, gradients[1] | {"x": of_x})


@check
def compiled():
    for images in (UNEQUAL, EMPTY):
        counts = images[dist.get_world_size()]
        x, weight = (t[share_of(counts)] for t in batch(sum(counts)))
        model = fused(sync(make()))
        model.bottleneck.compile(fullgraph=True, backend="aot_eager")
        with gathered() as seen:
            found = train(model, model, x, weight, reduce=sum_gradients)
        assert_close(found, in_one_process(counts))
        assert seen == {3: 2 * (8 + 6), 5: 2}


@check
def compiled_with_another_group():
    """What was compiled does not keep the group that it was compiled with."""
    block, x = rf.ConvBNAct2d(3, 4, 1, norm_layer=nn.SyncBatchNorm), torch.randn(2, 3, 4, 4)
    run = torch.compile(block, fullgraph=True, backend="aot_eager")
    for ranks in (None, [[r] for r in range(dist.get_world_size())], None):
        if ranks is not None:
            block.bn.process_group = [dist.new_group(own) for own in ranks][dist.get_rank()]
        else:
            block.bn.process_group = None
        with gathered() as seen:
            run(x)
        assert seen == ({3: 1} if ranks is None else {}), (ranks, seen)


@check
def checkpointed():
    """Forward runs again in backward, and the exchange with it, in all processes."""

    for reentrant in (False, True):
        around = functools.partial(functools.partial, checkpoint, use_reentrant=reentrant)
        counts = UNEQUAL[dist.get_world_size()]
        x, weight = (t[share_of(counts)] for t in batch(sum(counts)))
        model = fused(sync(make()))
        found = train(model, around(model), x, weight, reduce=sum_gradients)
        assert_close(found, in_one_process(counts, around=around))


@check
def engines_that_differ_between_processes():
    """What is native depends on a process's own shapes; what is exchanged, and in which order, does not."""
    counts = UNEQUAL[dist.get_world_size()]
    reference, eager = (in_one_process(counts, dtype=t, steps=1) for t in (torch.float64, torch.float32))
    model = fused(sync(make(dtype=torch.float32)))
    x, weight = (t[share_of(counts)] for t in batch(sum(counts), torch.float32))
    with rf.engine("native" if dist.get_rank() else "library"):
        found = train(model, model, x, weight, reduce=sum_gradients, steps=1)
    assert_passed(compare_observations(found, eager, reference, precision=torch.float32))
    assert_same_bits({k: v for k, v in found.items() if k.startswith(("parameter", "buffer"))})


@check
def planned_by_one_process():
    """And measured on first use by each; eager execution, which a plan may ask for, would exchange nothing."""
    model, (x, _) = fused(sync(make(dtype=torch.float32))), batch(2, torch.float32)
    with gathered() as seen:
        if dist.get_rank() == 0:
            report = rf.plan(model, x)
            for planned in report.blocks:
                decide.decide(planned.key, dataclasses.replace(planned.entry, choices=EAGER))
        dist.barrier()
        assert not any(b.any() for name, b in model.named_buffers() if name.endswith("running_mean"))
        model(x).sum().backward()
    decide.forget(plans=True)
    assert seen == {3: 8 + 6, 5: 1}, seen
    with mock.patch.dict(os.environ, RESNET_FUSED_PLAN="measure"), gathered() as seen:
        model(x).sum().backward()
    decide.forget(plans=True)
    assert seen == {3: 8 + 6, 5: 1}, seen


@check
def what_looks_at_a_model():
    """explain measures one process alone; copies share a model's process groups."""
    group = dist.new_group(list(range(dist.get_world_size())))
    model, x = fused(sync(make(), group)), batch(2)[0]
    raises(ValueError, "got 'stem.1', an nn.SyncBatchNorm of several processes", rf.explain, model, x)
    rf.explain(model, x, training=False, rounds=1)
    with torch.no_grad():
        assert_close({"": rf.fold(model)(x)}, {"": make().eval()(x)})


@check
def subclasses():
    """One that changes nothing is fused; one with a forward of its own is called, in the midst of what is fused."""

    class Renamed(nn.SyncBatchNorm):
        pass

    class Own(nn.SyncBatchNorm):
        def forward(self, x):
            return x * self.weight.view(1, -1, 1, 1)

    counts = UNEQUAL[dist.get_world_size()]
    x = batch(sum(counts))[0]
    for cls, exchanged in ((Renamed, 8), (Own, 7)):
        model, expected = sync(make()), make()
        model.basic.bn2.__class__ = cls
        if cls is Own:
            expected.basic.bn2.forward = functools.partial(cls.forward, expected.basic.bn2)
        report = rf.fuse(model)
        assert (report.batch_norms.training, report.batch_norms.total) == (exchanged, 8), report
        with torch.no_grad(), gathered() as seen:
            assert_close({"": model(x[share_of(counts)])}, {"": expected(x)[share_of(counts)]})
        assert seen == {3: exchanged}


@check
def timm_batch_norms_with_an_activation():
    import timm

    torch.manual_seed(0)
    expected = timm.create_model("efficientnet_b0", num_classes=4, drop_rate=0.0, drop_path_rate=0.0)
    blocks = nn.Sequential(expected.conv_stem, expected.bn1, *expected.blocks[:2]).double()
    model = timm.layers.convert_sync_batchnorm(copy.deepcopy(blocks))
    kinds = Counter(type(m).__name__ for m in model.modules() if isinstance(m, nn.SyncBatchNorm))
    assert kinds["SyncBatchNormAct"] == kinds.total()
    fused(model)
    counts = UNEQUAL[dist.get_world_size()]
    x = torch.randn(sum(counts), 3, 16, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    results = []
    for module, mine in ((model, x[share_of(counts)]), (blocks, x)):
        with gathered() as seen:
            out = module(mine)
            out.square().sum().backward()
        if module is model:
            assert seen == {3: 2 * kinds.total()}
            sum_gradients(model)
        results.append({n: p.grad for n, p in module.named_parameters()} | dict(module.named_buffers()))
        results[-1]["output"] = out.detach() if module is model else out.detach()[share_of(counts)]
    assert_close(*results)


@check
def fsdp2_before_fuse():
    def shard_first(model):
        sync(model.to(memory_format=torch.contiguous_format))
        for child in (model.basic, model.bottleneck, model):
            fully_shard(child)
        return fused(model)

    equals_one_process(UNEQUAL[dist.get_world_size()], wrap=shard_first)


@check
def fsdp2_runs_fused():
    model = fsdp(make())
    with recording() as noted:
        model(batch(2)[0])
    assert len(noted.calls) == 4, "the stem, two blocks and the batch norm at the end"


def raises(error, match, function, *args):
    try:
        function(*args)
    except error as e:
        assert match in str(e), e
    else:
        raise AssertionError(f"no {error.__name__}: {match}")


@check
def too_few_values():
    """One value in all processes together has no variance; one in each has."""
    block = rf.ConvBNAct2d(3, 4, 1, norm_layer=nn.SyncBatchNorm)
    x = torch.ones(int(dist.get_rank() == 0), 3, 1, 1)
    raises(ValueError, "got 1 in all processes", block, x)
    assert block(torch.ones(1, 3, 1, 1)).shape == (1, 4, 1, 1)


@check
def batches_of_gradients():
    block = rf.ConvBNAct2d(3, 4, 1, norm_layer=nn.SyncBatchNorm)
    x = torch.randn(2, 3, 4, 4, requires_grad=True)
    z = block(x)
    grads = torch.ones(5, *z.shape)
    raises(NotImplementedError, "is_grads_batched",
           functools.partial(torch.autograd.grad, z, x, grads, is_grads_batched=True))  # fmt: skip


@check
def outside_of_the_group():
    """By itself, as in eager."""
    group = dist.new_group([0])
    if dist.get_rank() != 0:
        assert group is dist.GroupMember.NON_GROUP_MEMBER
    model = fused(sync(make(), group))
    with gathered() as seen:
        found = model(batch(2)[0])
    assert not seen
    assert_close({"": found}, {"": make()(batch(2)[0])})


@check
def a_group_that_is_gone():
    group = dist.new_group(list(range(dist.get_world_size())))
    model = fused(sync(make(), group))
    x = batch(2)[0]
    model(x)
    dist.destroy_process_group(group)
    raises(RuntimeError, "process_group: expected a group of this process", model, x)


@check
def as_torchs():
    """PyTorch's own, which refuses the CPU. A process without images it leaves without gradients."""
    if device == "cpu":
        hooked = fused(sync(make()))
        hooked.stem[1].register_forward_hook(lambda *_: None)  # whose layer is called
        for model in (sync(make()), hooked):
            raises(ValueError, "SyncBatchNorm expected input tensor to be on GPU", model, batch(2)[0])
        return
    counts = UNEQUAL[dist.get_world_size()]
    for dtype in (torch.float64, torch.float32):
        x, weight = (t[share_of(counts)] for t in batch(sum(counts), dtype))
        eager, model = sync(make(dtype=dtype)), fused(sync(make(dtype=dtype)))
        expected, found = (train(m, m, x, weight, reduce=sum_gradients, steps=1) for m in (eager, model))
        if dtype == torch.float64:
            assert_close(found, expected)
        else:
            reference = in_one_process(counts, steps=1)
            assert_passed(compare_observations(found, expected, reference, precision=dtype))


def main(where, folder, store, rank, world):
    global device
    device = where
    torch.set_num_threads(1)
    timeout = datetime.timedelta(minutes=5)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=world, timeout=timeout)
    seen = {}
    for name, function in CHECKS.items():
        if missing(*NEEDS.get(name, ())) or (device != "cpu" and name not in ON_A_GPU):
            continue
        try:
            function()
            seen[name] = None
        except Exception:
            seen[name] = traceback.format_exc()
        (Path(folder) / f"{rank}.json").write_text(json.dumps(seen))
        if seen[name] is not None:
            break  # the others may be waiting for what this process did not send
    dist.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:4], *map(int, sys.argv[4:]))
