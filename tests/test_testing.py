# SPDX-License-Identifier: BSD-3-Clause
# Copyright (c) the resnet_fused authors
"""The tolerance policy itself: it has to fail when it should, and only then."""

import copy
import math

import pytest
import torch
from torch import nn

from resnet_fused import testing

REFERENCE = torch.linspace(-2.0, 4.0, 13, dtype=torch.float64)


def shifted(amount, dtype=torch.float64):
    """REFERENCE with `amount` added to its last and largest element."""
    values = REFERENCE.clone()
    values[-1] += amount
    return values.to(dtype)


def passes(fused, eager, reference=REFERENCE, **options):
    return testing.compare("t", fused, eager, reference, **options).passed


def unit():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU())


def images(dtype=torch.float32):
    return torch.randn(4, 3, 9, 9, generator=torch.Generator().manual_seed(1)).to(dtype)


def test_errors_are_relative_to_the_reference():
    found = testing.errors(shifted(0.4), REFERENCE)
    assert found.maximum == pytest.approx(0.1)
    assert found.two_norm == pytest.approx(0.4 / REFERENCE.norm().item())


def test_twice_eagers_error_passes_and_more_does_not():
    eager = shifted(0.01)
    assert passes(shifted(0.02), eager)
    assert not passes(shifted(0.0201), eager)


def test_each_norm_can_fail_alone():
    everywhere = REFERENCE + 0.02
    assert not passes(everywhere, shifted(0.02))
    spread = REFERENCE + 0.01
    assert not passes(shifted(0.03), spread)


@pytest.mark.parametrize("precision", testing.FLOORS)
def test_floor_holds_where_eager_is_exact(precision):
    floor = 4.0 * testing.FLOORS[precision]
    assert passes(shifted(0.5 * floor), REFERENCE, precision=precision)
    assert not passes(shifted(2.0 * floor), REFERENCE, precision=precision)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_special_values_have_to_be_where_the_reference_has_them(value):
    special = shifted(value)
    assert passes(special, special, special)
    assert not passes(special, REFERENCE)
    assert not passes(REFERENCE, special, special)
    assert not passes(shifted(math.nan if value == math.inf else math.inf), special, special)
    assert not passes(shifted(0.1), special), "eager's failure is no licence"


def test_shape_dtype_and_presence_have_to_be_eagers():
    eager = REFERENCE.float()
    assert passes(eager.clone(), eager)
    assert not passes(eager.double(), eager)
    assert not passes(eager[None], eager)
    assert not passes(None, eager)


def test_integers_have_to_be_equal():
    count = torch.tensor(3)
    assert passes(torch.tensor(3), count, count)
    assert not passes(torch.tensor(4), count, count)


def test_a_gradient_that_is_zero_is_measured_against_the_scale():
    reference = torch.full((4,), 1e-17, dtype=torch.float64)
    eager, fused = torch.full((4,), 1e-9), torch.full((4,), 3e-7)
    assert not passes(fused, eager, reference)
    assert passes(fused, eager, reference, scale=1.0)
    assert not passes(fused * 100, eager, reference, scale=1.0)


def test_empty_tensors_pass():
    empty = torch.empty(0)
    assert passes(empty, empty, empty.double())


def test_assertions_name_the_worst_first():
    eager = shifted(0.01)
    comparisons = [
        testing.compare(name, shifted(amount), eager, REFERENCE)
        for name, amount in [("good", 0.0), ("bad", 0.1), ("worst", 1.0)]
    ]
    with pytest.raises(AssertionError, match=r"(?s)2 of 3 .*worst: FAILED.*bad: FAILED"):
        testing.assert_passed(comparisons)
    testing.assert_passed(comparisons[:1])
    with pytest.raises(AssertionError, match="bad"):
        testing.assert_close("bad", shifted(0.1), eager, REFERENCE)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("autocast", [None, torch.bfloat16])
def test_a_module_compares_equal_to_its_copy(training, autocast):
    eager = unit().train(training)
    comparisons = testing.compare_modules(copy.deepcopy(eager), eager, images(), autocast=autocast)
    testing.assert_passed(comparisons)
    names = [c.name for c in comparisons]
    assert names == [
        "output",
        "gradient of input",
        *(f"gradient of {name}" for name, _ in eager.named_parameters()),
        *(f"buffer {name}" for name, _ in eager.named_buffers()),
    ]


def test_comparing_leaves_the_modules_alone():
    eager = unit()
    before = copy.deepcopy(eager.state_dict())
    testing.compare_modules(copy.deepcopy(eager), eager, images())
    assert all(torch.equal(before[name], tensor) for name, tensor in eager.state_dict().items())
    assert all(parameter.grad is None for parameter in eager.parameters())


@pytest.mark.parametrize(
    ("damage", "noticed"),
    [
        (lambda m: m[1].weight.data.mul_(1.001), "output"),
        (lambda m: m[1].running_mean.add_(0.01), "buffer 1.running_mean"),
        (lambda m: m[1].num_batches_tracked.add_(1), "buffer 1.num_batches_tracked"),
        (
            lambda m: m[0].register_full_backward_hook(lambda _, inputs, __: (inputs[0] * 1.001,)),
            "gradient of input",
        ),
        (lambda m: m[1].bias.requires_grad_(False), "gradient of 1.bias"),
    ],
)
def test_damage_is_noticed(damage, noticed):
    eager = unit()
    fused = copy.deepcopy(eager)
    damage(fused)
    comparisons = testing.compare_modules(fused, eager, images())
    assert noticed in [c.name for c in comparisons if not c.passed]


def test_inference_in_16_bit_has_outputs_and_buffers_only():
    eager = unit().eval().bfloat16()
    x = images(torch.bfloat16)
    comparisons = testing.compare_modules(copy.deepcopy(eager), eager, x, gradients=False)
    testing.assert_passed(comparisons)
    assert not any(c.name.startswith("gradient") for c in comparisons)


def test_cotangents_are_exact_in_every_precision():
    like = torch.empty(1000, dtype=torch.float64)
    exact = testing.cotangent_like(like)
    for precision in testing.FLOORS:
        assert torch.equal(testing.cotangent_like(like.to(precision)).double(), exact)
