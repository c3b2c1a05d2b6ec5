# SPDX-License-Identifier: BSD-3-Clause
# Copyright (c) the resnet_fused authors
"""Fused models in other people's training loops: the weights of a loop by hand, to the bit."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch.utils.data import DataLoader, TensorDataset
from user_models import classifier, fused_copy, nontrivial, switched


@pytest.fixture
def fused():
    return fused_copy(nontrivial(classifier()).to(memory_format=torch.channels_last))[0]


@pytest.fixture
def loader():
    return DataLoader(TensorDataset(torch.randn(8, 3, 32, 32), torch.arange(8) % 4), 4)


def by_hand(model, loader):
    """Two steps with autocast; the state."""
    model = copy.deepcopy(model).train()
    optimizer = torch.optim.SGD(model.parameters(), 0.01)
    for x, labels in loader:
        optimizer.zero_grad()
        with torch.autocast("cpu", torch.bfloat16):
            loss = F.cross_entropy(model(x), labels)
        loss.backward()
        optimizer.step()
    return model.state_dict()


def assert_same_state(found, expected):
    assert found.keys() == expected.keys()
    assert not [name for name, t in found.items() if not torch.equal(t, expected[name])]


def test_accelerate(fused, loader):
    accelerate = pytest.importorskip("accelerate", reason="accelerate is not installed")
    expected = by_hand(fused, loader)
    running = switched(fused)
    accelerator = accelerate.Accelerator(cpu=True, mixed_precision="bf16")
    optimizer = torch.optim.SGD(fused.parameters(), 0.01)
    model, optimizer, loader = accelerator.prepare(fused, optimizer, loader)
    for x, labels in loader:
        optimizer.zero_grad()
        loss = F.cross_entropy(model(x), labels)
        accelerator.backward(loss)
        optimizer.step()
    unwrapped = accelerator.unwrap_model(model, keep_fp32_wrapper=False)
    assert_same_state(unwrapped.state_dict(), expected)
    assert running <= switched(unwrapped)


def test_lightning(fused, loader, tmp_path):
    lightning = pytest.importorskip("lightning", reason="lightning is not installed")
    expected = by_hand(fused, loader)

    class Task(lightning.LightningModule):
        def __init__(self):
            super().__init__()
            self.model = fused

        def training_step(self, batch, index):
            return F.cross_entropy(self.model(batch[0]), batch[1])

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), 0.01)

    trainer = lightning.Trainer(
        max_epochs=1, accelerator="cpu", devices=1, precision="bf16-mixed", default_root_dir=tmp_path, logger=False,
        enable_progress_bar=False, enable_model_summary=False, enable_checkpointing=False,
    )
    running = switched(fused)
    trainer.fit(Task(), loader)
    assert_same_state(fused.state_dict(), expected)
    assert running == switched(fused)
