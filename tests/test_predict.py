# SPDX-License-Identifier: BSD-3-Clause
# Copyright (c) the resnet_fused authors
"""The model of training on GPUs that aren't here: it runs without any, says what it is, and follows its inputs."""

from dataclasses import replace

import pytest
import torchvision
from torch import nn

from benchmarks import predict
from benchmarks.__main__ import main

A100, H100, RTX4090 = predict.CARDS


def test_everything_printed_is_called_predicted(capsys):
    assert main(["--predict"]) == 0
    printed = capsys.readouterr().out
    assert printed.startswith("PREDICTED, not measured") and f"{predict.ERROR:.0%}" in printed
    for card in ("A100", "H100", "RTX 4090"):
        for network in ("resnet18", "resnet50"):
            for variant in predict.VARIANTS:
                assert f"{network}, {card}, {variant}" in printed
    assumed = ("NORM", "OVERLAP", "LAUNCH", "SHARE", "TAIL", "AROUND", "CUDNN", "STEM", "PASSES", "BYTES", "SMALL")
    copied = {"COUNTS", "STAGES", "ROW_BYTES", "BANKS_BYTES"}  # of the kernels
    for name in vars(predict).keys() - copied:
        if name.isupper() and any(word in name for word in assumed):
            assert f"{name} " in printed, name
    for *_, rate, source in predict.PUBLISHED:
        assert str(rate) in printed and source in printed


def test_predictions_stand_alone():
    with pytest.raises(SystemExit):
        main(["--predict", "--blocks"])


def test_published_results_are_within_the_error():
    for card in (A100, H100):
        found = predict.predicted(card, "resnet50")
        for name, variant, rate, _ in predict.PUBLISHED:
            if name == card.name:
                assert predict.BATCH / found[variant].total == pytest.approx(rate, rel=predict.ERROR), (name, variant)


@pytest.mark.parametrize("name", ["resnet18", "resnet50"])
def test_the_shapes_are_the_network_s(name):
    model = getattr(torchvision.models, name)()
    convolutions = [m for layer in (model.layer1, model.layer2, model.layer3, model.layer4) for m in layer.modules()]
    expected = sorted(
        (m.in_channels, m.out_channels, m.kernel_size[0], m.stride[0]) for m in convolutions if isinstance(m, nn.Conv2d)
    )
    blocks = predict.network(name)
    found = sorted((c.channels, c.filters, c.taps, c.stride) for b in blocks for c in b.units)
    assert found == expected
    assert blocks[-1].units[-1].output_side == 7


@pytest.mark.parametrize("card", predict.CARDS, ids=lambda card: card.name)
def test_the_best_mix_is_no_worse_than_either(card):
    for name in ("resnet18", "resnet50"):
        found = predict.predicted(card, name)
        assert found["best mix"].total <= min(found["library"].total, found["native"].total)
        assert found["library"].convolutions == pytest.approx(found["eager"].convolutions)


def test_more_work_for_a_pipe_takes_longer(monkeypatch):
    conv = predict.Convolution(256, 64, 1, 56, 1, False)
    before = predict.native_seconds(A100, conv, "fprop")
    slower = {
        which: [replace(k, loop=replace(k.loop, instructions=4 * k.loop.instructions)) for k in kernels]
        for which, kernels in predict.instances("sm_80")[1].items()
    }
    monkeypatch.setattr(predict, "instances", lambda arch: ("sm_80", slower))
    assert predict.native_seconds(A100, conv, "fprop") > before
    assert predict.native_seconds(replace(A100, dram=A100.dram / 2), conv, "fprop") > before


def test_shared_memory_limits_the_blocks():
    """csrc/cuda/README.md says how much the largest tile with two sources takes, and what holds one of them only."""
    conv = predict.Convolution(256, 128, 1, 56, 1, True)
    (k,) = (
        k
        for k in predict.instances("sm_80")[1]["dgrad"]
        if (k.rows, k.columns, k.prologues, k.flags) == (128, 128, ("BackwardAffine",), (False,))
    )
    shared = predict.shared_bytes(k, conv, "dgrad")
    assert 72 << 10 <= shared < 74 << 10
    assert [predict.resident(card, k, shared) for card in predict.CARDS] == [2, 2, 1]


def test_splits_are_of_what_wgrad_reads():
    """The stride leaves out three of four pixels of x: operands of 192 channels per output pixel, 65536 partials."""
    conv = predict.Convolution(128, 32, 1, 28, 2, False)
    assert conv.output_pixels == 256 * 14 * 14
    assert predict.wgrad_splits(conv, 1, large=False) == 50176 // 512
    wide = predict.Convolution(512, 1024, 1, 28, 2, False)
    # 512 blocks fill a card once already; 50176 * (2*1024 + 512) // (4 * 512 * 1024) = 61 splits would be cheap.
    assert predict.wgrad_splits(wide, 512, large=True) == 2


def test_narrow_filters_are_read_once():
    """Their dgrad and wgrad are one kernel, 10 passes over x, where y is four times as large, instead of 19."""
    narrow = predict.Convolution(64, 256, 1, 56, 1, True)
    others = [(64, 64, 3, 56, 1, True), (256, 512, 1, 56, 2, False), (128, 512, 1, 28, 1, True)]
    for card in predict.CARDS:

        def apart(c, card=card):
            return sum(predict.native_seconds(card, c, which) for which in ("dgrad", "wgrad"))

        assert predict.native_backward_seconds(card, narrow) < 0.7 * apart(narrow)
        for c in (predict.Convolution(*arguments) for arguments in others):
            assert predict.native_backward_seconds(card, c) == apart(c)


def test_a_card_without_counts_is_served_by_older_ones():
    served, kernels = predict.instances("sm_89")
    assert served in ("sm_80", "sm_86", "sm_89") and all(kernels.values())
    with pytest.raises(SystemExit, match="no kernels of sm_70"):
        predict.instances("sm_70")
