# SPDX-License-Identifier: BSD-3-Clause
# Copyright (c) the resnet_fused authors
"""The tolerance policy, shared by the tests and the benchmarks.

Fused code rounds in other places than eager PyTorch, so the two never agree to the last bit, and a
fixed tolerance is either too tight for a deep network or too loose for a single block. The bar is
eager PyTorch's own error instead. For every tensor that comes out,

    err(fused) <= SLACK * err(eager at the same precision) + FLOORS[precision]

where both errors are taken against the same computation in float64, once in the maximum norm and
once in the 2-norm, each relative to the reference's norm.
"""

import contextlib
import copy
import dataclasses
import math

import torch

SLACK = 2.0

# What is allowed on top of eager's error, relative to the reference. It matters where eager happens
# to be exact or nearly so. 16-bit types: one unit roundoff. float32: 16 of them. float64: eager *is*
# the reference and its error is zero, so the floor alone has to hold what rounding adds up to.
FLOORS = {
    torch.float64: 1e-12,
    torch.float32: 2.0**-20,
    torch.float16: 2.0**-11,
    torch.bfloat16: 2.0**-8,
}

# A reference below this fraction of its scale is zero but for float64's own rounding.
_ZERO = 1e-10


@dataclasses.dataclass(frozen=True)
class Errors:
    """Distance from the float64 reference, relative to the reference's size (no unit)."""

    maximum: float
    two_norm: float

    def bound(self, floor):
        """What the policy allows another implementation when eager's errors are these.

        Where eager's result is not finite although the reference is, only the floor is allowed.
        """
        return Errors(*(SLACK * e + floor if math.isfinite(e) else floor for e in dataclasses.astuple(self)))

    def within(self, bound):
        """Whether neither norm exceeds `bound`; false for NaN."""
        return self.maximum <= bound.maximum and self.two_norm <= bound.two_norm


@dataclasses.dataclass(frozen=True)
class Comparison:
    """One tensor's verdict: both errors, what was allowed, and why if it failed for another reason."""

    name: str
    fused: Errors
    eager: Errors
    bound: Errors
    passed: bool
    reason: str = ""

    @property
    def severity(self):
        """The fused error as a multiple of what is allowed, the worse of both norms; <= 1 passes."""
        if self.reason:
            return math.inf
        return max(self.fused.maximum / self.bound.maximum, self.fused.two_norm / self.bound.two_norm)

    def __str__(self):
        verdict = "ok" if self.passed else "FAILED"
        if self.reason:
            return f"{self.name}: {verdict}: {self.reason}"
        return (
            f"{self.name}: {verdict}: max norm {self.fused.maximum:.2e} (eager "
            f"{self.eager.maximum:.2e}, allowed {self.bound.maximum:.2e}), 2-norm "
            f"{self.fused.two_norm:.2e} (eager {self.eager.two_norm:.2e}, allowed "
            f"{self.bound.two_norm:.2e})"
        )


_NO_ERRORS = Errors(0.0, 0.0)


def errors(actual, reference, scale=None):
    """Return the `Errors` of `actual` against the float64 tensor `reference`.

    `scale` is the magnitude that counts as large; left out, it is the reference's own maximum. It is
    used only where the reference is zero but for rounding, such as the gradient of a bias in front of
    a batch norm: relative to such a reference any error would be infinite. NaN and infinities have to
    be where the reference has them; the error is infinite otherwise.
    """
    actual, reference = (t.detach().cpu().double() for t in (actual, reference))
    finite = reference.isfinite()
    special = torch.equal(
        actual[~finite].nan_to_num(nan=0.5, posinf=math.inf, neginf=-math.inf),
        reference[~finite].nan_to_num(nan=0.5, posinf=math.inf, neginf=-math.inf),
    )
    actual, reference = actual[finite], reference[finite]
    if not special or not actual.isfinite().all():
        return Errors(math.inf, math.inf)
    if reference.numel() == 0:
        return _NO_ERRORS
    difference = actual - reference
    maximum, two_norm = reference.abs().max().item(), reference.norm().item()
    if scale is not None and maximum < _ZERO * scale:
        maximum, two_norm = scale, scale * math.sqrt(reference.numel())
    if maximum == 0.0:
        maximum = two_norm = 1.0
    return Errors(difference.abs().max().item() / maximum, difference.norm().item() / two_norm)


def compare(name, fused, eager, reference, *, precision=None, scale=None):
    """Return the `Comparison` of one tensor under the policy.

    `precision` selects the floor and is the dtype that was computed in (under autocast: autocast's);
    left out, it is `eager.dtype`. `scale` is explained at `errors`. Shape and dtype have to be eager's;
    tensors that are not floating-point have to be equal.
    """

    def failed(reason):
        return Comparison(name, _NO_ERRORS, _NO_ERRORS, _NO_ERRORS, False, reason)

    if fused is None:
        return failed("missing")
    if fused.shape != eager.shape:
        return failed(f"shape {tuple(fused.shape)}, eager has {tuple(eager.shape)}")
    if fused.dtype != eager.dtype:
        return failed(f"dtype {fused.dtype}, eager has {eager.dtype}")
    if not eager.is_floating_point():
        if not torch.equal(fused, eager):
            return failed("differs from eager; not a floating-point tensor, so it has to be equal")
        return Comparison(name, _NO_ERRORS, _NO_ERRORS, Errors(1.0, 1.0), True)
    fused_errors, eager_errors = (errors(t, reference, scale) for t in (fused, eager))
    bound = eager_errors.bound(FLOORS[precision or eager.dtype])
    return Comparison(name, fused_errors, eager_errors, bound, fused_errors.within(bound))


def assert_passed(comparisons):
    """Raise AssertionError, worst first, unless every one of `comparisons` passed."""
    failures = sorted((c for c in comparisons if not c.passed), key=lambda c: -c.severity)
    if failures:
        raise AssertionError(
            f"{len(failures)} of {len(comparisons)} outside the tolerance policy:\n  "
            + "\n  ".join(str(c) for c in failures)
        )


def assert_close(name, fused, eager, reference, *, precision=None, scale=None):
    """Raise AssertionError unless one tensor is within the policy; arguments as for `compare`."""
    assert_passed([compare(name, fused, eager, reference, precision=precision, scale=scale)])


def cotangent_like(output, seed=0):
    """Return a random gradient for `output` that every floating-point type represents exactly."""
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(output.shape, generator=generator).mul(8).round().div(8)
    return torch.empty_like(output).copy_(values)


def observe(module, x, *, autocast=None, gradients=True):
    """Run a copy of `module` on `x`; return every tensor that comes out, by name.

    These are "output", and with `gradients` "gradient of input" and "gradient of <parameter>" for a
    fixed random `cotangent_like` the output, and "buffer <name>" after the run. `module` itself, its
    gradients and its running statistics are left as they are. `autocast` is a dtype or None.
    """
    module = copy.deepcopy(module)
    module.zero_grad(set_to_none=True)
    x = x.detach().clone().requires_grad_(gradients)
    casting = torch.autocast(x.device.type, autocast) if autocast is not None else contextlib.nullcontext()
    with torch.set_grad_enabled(gradients):
        with casting:
            output = module(x)
        seen = {"output": output.detach()}
        if gradients:
            output.backward(cotangent_like(output))
            seen["gradient of input"] = x.grad
            for name, parameter in module.named_parameters():
                if parameter.grad is not None:
                    seen[f"gradient of {name}"] = parameter.grad
    for name, buffer in module.named_buffers():
        seen[f"buffer {name}"] = buffer
    return seen


def observe_reference(module, x, *, gradients=True):
    """Run a float64 copy of `module` on `x` in float64, both on the CPU; see `observe`."""
    return observe(copy.deepcopy(module).cpu().double(), x.cpu().double(), gradients=gradients)


def compare_observations(fused, eager, reference, *, precision):
    """Compare what `observe` returned for three runs; return one `Comparison` per tensor of eager's.

    A gradient that is zero but for rounding is measured against the largest gradient there is.
    """
    gradients = [t for name, t in reference.items() if name.startswith("gradient")]
    largest = max((g.abs().max().item() for g in gradients if g.numel()), default=None)
    return [
        compare(
            name,
            fused.get(name),
            tensor,
            reference[name],
            precision=precision,
            scale=largest if name.startswith("gradient") else None,
        )
        for name, tensor in eager.items()
    ]


def compare_modules(fused, eager, x, *, autocast=None, gradients=True, reference=None):
    """Compare two modules of equal parameters on the input `x`; return one `Comparison` per tensor.

    `reference` is what `observe_reference(eager, x)` returns, for callers that use it repeatedly.
    Both modules run in the mode (training or evaluation) and dtype that they are in.
    """
    if reference is None:
        reference = observe_reference(eager, x, gradients=gradients)
    of_fused, of_eager = (observe(m, x, autocast=autocast, gradients=gradients) for m in (fused, eager))
    return compare_observations(of_fused, of_eager, reference, precision=autocast or x.dtype)
