# SPDX-License-Identifier: BSD-3-Clause
# Copyright (c) the resnet_fused authors
"""How people serve a model: from several threads, in child processes, quantised."""

import copy
import subprocess
import sys
import textwrap
import threading
import warnings
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from scripts import environment
from thinning import slow_but
from torch import nn
from user_models import classifier, fused_copy, nontrivial

import resnet_fused as rf


def images(batch):
    return torch.randn(batch, 3, 32, 32).to(memory_format=torch.channels_last)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("make", [lambda m: fused_copy(m)[0], rf.fold], ids=["fused", "folded"])
def test_threads_that_call_for_the_first_time_together(make, dtype):
    """Inputs of different sizes, a thread that differentiates among those that don't: all get their own answers."""
    model = nontrivial(classifier()).eval().to(memory_format=torch.channels_last)
    inputs = [images(1 + i) for i in range(4)]

    def answer(model, i):
        with torch.set_grad_enabled(i == 3), torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
            return model(inputs[i]).detach()

    alone = make(copy.deepcopy(model))
    expected = [answer(alone, i) for i in range(4)]
    served, barrier = make(model), threading.Barrier(4)

    def serve(i):
        barrier.wait(60)
        return [answer(served, i) for _ in range(8)]

    with ThreadPoolExecutor(4) as pool:
        for i, answers in enumerate(pool.map(serve, range(4))):
            assert all(torch.equal(a, expected[i]) for a in answers)


def test_engines_are_a_threads_own():
    inside, looked = threading.Event(), threading.Event()
    block = rf.BasicBlock(8, 8)
    x = torch.randn(2, 8, 6, 6)

    def hold():
        with rf.engine("reference"):
            inside.set()
            return looked.wait(60) and type(block(x).grad_fn).__name__

    with ThreadPoolExecutor(1) as pool:
        held = pool.submit(hold)
        assert inside.wait(60)
        here = type(block(x).grad_fn).__name__
        looked.set()
        assert held.result() != "_BlockBackward" == here


@pytest.mark.parametrize("method", slow_but(["fork"], ["fork", "spawn"], "the child imports torch, as its parent does"))
def test_child_processes(method, tmp_path):
    """A model that the parent ran is run by a DataLoader's worker, which sets its threads to one: it doesn't hang."""
    script = tmp_path / "script.py"
    script.write_text(
        textwrap.dedent("""
        import sys
        import torch
        from torch.utils.data import DataLoader, Dataset
        import resnet_fused as rf

        class Embedded(Dataset):
            def __init__(self, model, x):
                self.model, self.x = model, x

            def __len__(self):
                return len(self.x)

            def __getitem__(self, i):
                self.model(self.x[i][None]).square().sum().backward()  # a worker may train as well
                with torch.no_grad():
                    return self.model(self.x[i][None])[0]

        if __name__ == "__main__":
            torch.set_num_threads(2)
            model = torch.nn.Sequential(rf.ConvBNAct2d(3, 16), rf.BasicBlock(16, 16), rf.ResBlk(16, 32, 2)).eval()
            x = torch.randn(4, 3, 64, 64)
            model(x).sum().backward()
            with torch.no_grad():
                expected = model(x)
            loader = DataLoader(Embedded(model, x), 2, num_workers=1, multiprocessing_context=sys.argv[1], timeout=120)
            torch.testing.assert_close(torch.cat(list(loader)), expected)
        """)
    )
    subprocess.run([sys.executable, script, method], check=True, timeout=180, env=environment())


def calibrated(prepare, convert, model, x):
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        prepared = prepare(model)
        prepared(x)
        return convert(prepared)


def test_fx_quantisation_of_a_folded_model():
    """A folded model quantises to the answers of one whose batch norms torch folded."""
    quantization = pytest.importorskip("torch.ao.quantization.quantize_fx", reason="torch has no FX quantisation")
    from torch.ao.quantization import get_default_qconfig_mapping
    from torch.nn.utils.fusion import fuse_conv_bn_eval

    if "x86" not in torch.backends.quantized.supported_engines:
        pytest.skip("torch has no quantised convolutions for this processor")
    x = torch.randn(4, 3, 32, 32)
    model = nontrivial(classifier()).eval()
    eager = copy.deepcopy(model)
    for parent in eager.modules():
        for conv, norm in (("0", "1"), ("conv1", "bn1"), ("conv2", "bn2")):
            pair = getattr(parent, conv, None), getattr(parent, norm, None)
            if isinstance(pair[0], nn.Conv2d) and isinstance(pair[1], nn.BatchNorm2d):
                setattr(parent, conv, fuse_conv_bn_eval(*pair))
                setattr(parent, norm, nn.Identity())

    def quantise(model):
        return calibrated(
            lambda m: quantization.prepare_fx(m, get_default_qconfig_mapping("x86"), (x,)),
            quantization.convert_fx, model, x,
        )

    answers = []
    for m in (rf.fold(model), eager):
        quantised = quantise(m)
        kinds = {type(layer).__module__ for layer in quantised.modules()}
        assert any("quantized" in kind for kind in kinds)
        answers.append(quantised(x))
    torch.testing.assert_close(*answers, rtol=0, atol=0.02 * model(x).abs().max().item())


def test_torchao_quantises_a_folded_model():
    quantization = pytest.importorskip("torchao.quantization", reason="torchao is not installed")
    x = images(4)
    model = nontrivial(classifier()).eval()
    folded = rf.fold(model)
    exact = folded(x).detach()
    expected = rf.unfuse(copy.deepcopy(folded))
    for m in (folded, expected):
        quantization.quantize_(m, quantization.Int8WeightOnlyConfig())
    with torch.no_grad():
        assert type(folded[-1].weight) is type(expected[-1].weight) is not nn.Parameter
        torch.testing.assert_close(folded(x), expected(x), rtol=1e-4, atol=1e-4)
        assert not torch.equal(folded(x), exact)
