# SPDX-License-Identifier: BSD-3-Clause
# Copyright (c) the resnet_fused authors
"""Train a residual network of torchvision or timm on images, fused or eager, in one process or many.

    python examples/train.py                                              # resnet18 on scikit-learn's digits
    python examples/train.py --data /data/imagenet --model resnet50 --amp bfloat16 --channels-last --batch 64
    torchrun --nproc-per-node 8 examples/train.py --data /data/imagenet --model timm:resnet50d --resume

A folder of images has train/CLASS/*.jpg and val/CLASS/*.jpg. `--output` receives a checkpoint after each epoch, and at
the end history.json and curves.png. With `--resume` a run that was killed goes on after its last whole epoch, to the
very bits that it would have reached, on a GPU as far as the library's kernels repeat theirs: an epoch's order and
augmentation follow from the seed and the epoch alone.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import time
from itertools import islice
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils.data import DataLoader, Dataset, DistributedSampler, Subset, TensorDataset
from torchvision import datasets, models
from torchvision.transforms import v2 as transforms

import resnet_fused as rf

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # ImageNet's, of each colour


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Train a residual network, fused or eager.")
    parser.add_argument("--data", default="digits", help="a folder with train/ and val/, or 'digits'")
    parser.add_argument("--model", default="resnet18", help="torchvision's name, or timm:NAME")
    how = parser.add_mutually_exclusive_group()
    how.add_argument("--fused", action="store_true", default=True, help="with resnet_fused (default)")
    how.add_argument("--eager", dest="fused", action="store_false", help="without")
    parser.add_argument("--memory", choices=["default", "minimal"], default="default", help="of a fused model")
    parser.add_argument("--sync-bn", action="store_true", help="batch norms over the batches of all processes")
    parser.add_argument("--amp", choices=["off", "bfloat16", "float16"], default="off")
    parser.add_argument("--channels-last", action="store_true")
    parser.add_argument("--size", type=positive, help="pixels per side (default: digits 32, folder 224)")
    parser.add_argument("--batch", type=positive, default=64, help="images per process and forward")
    parser.add_argument("--accumulate", type=positive, default=1, help="forwards per step of the optimiser")
    parser.add_argument("--epochs", type=positive, default=5)
    parser.add_argument("--warmup", type=float, default=0.1, help="share of the steps in which the rate rises")
    parser.add_argument("--rate", type=float, default=0.05, help="highest learning rate")
    parser.add_argument("--weight-decay", type=float, default=1e-4)
    parser.add_argument("--label-smoothing", type=float, default=0.1)
    parser.add_argument("--ema", type=float, default=0.0, help="decay of averaged weights, such as 0.999; 0: none")
    parser.add_argument("--workers", type=int, default=0, help="processes that load images, per process")
    parser.add_argument("--limit", type=positive, help="train on this many images only")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, default=Path("run"))
    parser.add_argument("--resume", action="store_true", help="go on from the checkpoint in --output, if there is one")
    return parser.parse_args(arguments)


def positive(text: str) -> int:
    if int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected at least 1, got {text}")
    return int(text)


def load_digits(size: int) -> tuple[Dataset, Dataset, int]:
    """scikit-learn's 1797 handwritten digits as images [3, size, size], every fifth to validate on."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    images = torch.tensor(digits.images, dtype=torch.float32)[:, None] / 8 - 1
    images = nn.functional.interpolate(images, size=(size, size), mode="bilinear").expand(-1, 3, -1, -1)
    whole = TensorDataset(images, torch.tensor(digits.target))
    training = [i for i in range(len(whole)) if i % 5]
    return Subset(whole, training), Subset(whole, range(0, len(whole), 5)), 10


def load_folder(folder: Path, size: int) -> tuple[Dataset, Dataset, int]:
    to_tensor = [transforms.PILToTensor(), transforms.ToDtype(torch.float32, scale=True)]
    normalize = transforms.Normalize(MEAN, STD)
    augment = [transforms.RandomResizedCrop(size), transforms.RandomHorizontalFlip()]
    crop = [transforms.Resize(size * 8 // 7), transforms.CenterCrop(size)]
    train = datasets.ImageFolder(folder / "train", transforms.Compose([*augment, *to_tensor, normalize]))
    validation = datasets.ImageFolder(folder / "val", transforms.Compose([*crop, *to_tensor, normalize]))
    if train.classes != validation.classes:
        raise SystemExit(f"--data: {folder}/train and {folder}/val have different classes")
    return train, validation, len(train.classes)


def build_model(name: str, classes: int) -> nn.Module:
    if name.startswith("timm:"):
        import timm

        return timm.create_model(name.removeprefix("timm:"), num_classes=classes)
    return models.get_model(name, num_classes=classes)


def synchronize(model: nn.Module, name: str) -> None:
    """Makes the batch norms in ``model`` synchronised ones, in place."""
    if name.startswith("timm:"):  # some of timm's have an activation, which torch's conversion would drop
        import timm

        timm.layers.convert_sync_batchnorm(model)
    else:
        nn.SyncBatchNorm.convert_sync_batchnorm(model)


class Trainer:
    """Model, optimiser and all else that a checkpoint holds."""

    def __init__(self, options: argparse.Namespace):
        self.options = options
        self.rank = dist.get_rank() if dist.is_initialized() else 0
        self.world = dist.get_world_size() if dist.is_initialized() else 1
        self.device = torch.device("cpu")
        if torch.cuda.is_available():
            self.device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
            torch.cuda.set_device(self.device)

        if options.data == "digits":
            train, validation, classes = load_digits(options.size or 32)
        else:
            train, validation, classes = load_folder(Path(options.data), options.size or 224)
        train = Subset(train, range(min(options.limit or len(train), len(train))))
        self.sampler = DistributedSampler(train, self.world, self.rank, seed=options.seed)
        self.order = torch.Generator()  # of the workers' seeds
        pin = self.device.type == "cuda"
        self.batches = DataLoader(
            train, options.batch, sampler=self.sampler, num_workers=options.workers, generator=self.order,
            drop_last=True, pin_memory=pin,
        )  # fmt: skip
        # Each process validates on images of its own; a sampler would repeat some.
        mine = Subset(validation, range(self.rank, len(validation), self.world))
        self.validation = DataLoader(mine, options.batch, num_workers=options.workers, pin_memory=pin)
        self.steps = len(self.batches) // options.accumulate
        if self.steps == 0:
            raise SystemExit(f"--batch, --accumulate: {len(train)} images are too few for one step")

        torch.manual_seed(options.seed)
        self.layout = torch.channels_last if options.channels_last else torch.contiguous_format
        self.model = build_model(options.model, classes).to(self.device, memory_format=self.layout)
        if options.fused:
            report = rf.fuse(self.model)
            rf.set_memory(self.model, options.memory)
            self.say(report)
        self.trained = DistributedDataParallel(self.model) if dist.is_initialized() else self.model
        if options.sync_bn:  # behind DDP, which refuses them on the CPU
            synchronize(self.model, options.model)
        self.averaged = None
        if options.ema:
            average = get_ema_multi_avg_fn(options.ema)
            self.averaged = AveragedModel(self.model, multi_avg_fn=average, use_buffers=True)
        self.loss = nn.CrossEntropyLoss(label_smoothing=options.label_smoothing)
        self.optimizer = torch.optim.SGD(
            self.model.parameters(), options.rate, momentum=0.9, nesterov=True, weight_decay=options.weight_decay
        )
        self.schedule = torch.optim.lr_scheduler.OneCycleLR(
            self.optimizer, options.rate, total_steps=options.epochs * self.steps, pct_start=options.warmup,
            cycle_momentum=False,
        )  # fmt: skip
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=options.amp == "float16")
        self.history: list[dict[str, float]] = []

    def say(self, what: object) -> None:
        if self.rank == 0:
            print(what, flush=True)

    def autocast(self) -> torch.autocast:
        dtype = torch.float16 if self.options.amp == "float16" else torch.bfloat16
        return torch.autocast(self.device.type, dtype=dtype, enabled=self.options.amp != "off")

    def to_device(self, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        images = images.to(self.device, memory_format=self.layout, non_blocking=True)
        return images, labels.to(self.device, non_blocking=True)

    def sum_over_processes(self, values: Tensor) -> list[float]:
        if dist.is_initialized():
            dist.all_reduce(values)
        return values.tolist()

    def train_epoch(self) -> dict[str, float]:
        epoch, accumulate = len(self.history), self.options.accumulate
        seed = (self.options.seed * 1_000_003 + epoch) * self.world + self.rank
        torch.manual_seed(seed)
        self.order.manual_seed(seed)
        self.sampler.set_epoch(epoch)
        self.trained.train()
        total = torch.zeros(2, dtype=torch.float64, device=self.device)  # the sum of the losses, images
        start = time.perf_counter()
        for i, batch in enumerate(islice(self.batches, self.steps * accumulate), 1):
            images, labels = self.to_device(*batch)
            step = i % accumulate == 0  # an epoch is whole steps, of batches of one size
            # Before the last backward of a step gradients add up in each process, and nothing is exchanged but the
            # statistics of synchronised batch norms.
            with self.trained.no_sync() if dist.is_initialized() and not step else contextlib.nullcontext():
                with self.autocast():
                    loss = self.loss(self.trained(images), labels)
                self.scaler.scale(loss / accumulate).backward()
            total += torch.stack([loss.detach().double() * len(labels), loss.new_tensor(len(labels)).double()])
            if step:
                self.scaler.step(self.optimizer)
                self.scaler.update()
                self.optimizer.zero_grad()
                self.schedule.step()
                if self.averaged is not None:
                    self.averaged.update_parameters(self.model)
        losses, images = self.sum_over_processes(total)
        return {"loss": losses / images, "images_per_second": images / (time.perf_counter() - start)}

    @torch.no_grad()
    def validate(self) -> dict[str, float]:
        for module in filter(None, (self.model, self.averaged)):
            if dist.is_initialized():  # running statistics are each process's own, and the checkpoint rank 0's
                for buffer in module.buffers():
                    dist.broadcast(buffer, 0)
        model = (self.averaged or self.model).eval()
        total = torch.zeros(2, dtype=torch.float64, device=self.device)  # right answers, images
        for batch in self.validation:
            images, labels = self.to_device(*batch)
            with self.autocast():
                hits = (model(images).argmax(1) == labels).sum()
            total += torch.stack([hits.double(), hits.new_tensor(len(labels)).double()])
        hits, images = self.sum_over_processes(total)
        return {"accuracy": hits / images}

    def state(self) -> dict[str, object]:
        """The parts of a checkpoint that have a state_dict."""
        parts = {"model": self.model, "optimizer": self.optimizer, "schedule": self.schedule, "scaler": self.scaler}
        return parts | ({"averaged": self.averaged} if self.averaged is not None else {})

    @property
    def settings(self) -> dict[str, object]:
        """What a run and the one that it goes on from have to share."""
        free = {"output", "resume", "workers", "memory"}
        return {k: v for k, v in vars(self.options).items() if k not in free} | {"processes": self.world}

    def save(self) -> None:
        """By way of another file, so that a run killed meanwhile leaves the last one whole."""
        path = self.options.output / "checkpoint.pt"
        checkpoint = {name: part.state_dict() for name, part in self.state().items()}
        torch.save(checkpoint | {"history": self.history, "settings": self.settings}, path.with_suffix(".new"))
        os.replace(path.with_suffix(".new"), path)

    def resume(self) -> None:
        path = self.options.output / "checkpoint.pt"
        if not path.exists():
            return
        checkpoint = torch.load(path, map_location=self.device, weights_only=True)
        then, now = checkpoint["settings"], self.settings
        if then != now:
            differ = ", ".join(f"{k} {then.get(k)!r}, now {v!r}" for k, v in now.items() if then.get(k) != v)
            raise SystemExit(f"--resume: {path} was trained with other settings: {differ}")
        for name, part in self.state().items():
            part.load_state_dict(checkpoint[name])
        self.history = checkpoint["history"]

    def run(self) -> None:
        if self.rank == 0:
            self.options.output.mkdir(parents=True, exist_ok=True)
        if self.options.resume:
            self.resume()
        while len(self.history) < self.options.epochs:
            rate = self.schedule.get_last_lr()[0]
            self.history.append({"rate": rate, **self.train_epoch(), **self.validate()})
            if self.rank == 0:
                self.save()
            epoch = "epoch {:3}: loss {loss:.4f}, accuracy {accuracy:.4f}, {images_per_second:.1f} images/s"
            self.say(epoch.format(len(self.history), **self.history[-1]))
        if self.rank == 0:
            result = {"settings": self.settings, "history": self.history}
            (self.options.output / "history.json").write_text(json.dumps(result, indent=2) + "\n")
            plot(self.history, self.options.output / "curves.png")


def plot(history: list[dict[str, float]], path: Path) -> None:
    figure, axes = plt.subplots(1, 3, figsize=(12, 3.5), layout="constrained")
    epochs = range(1, len(history) + 1)
    for axis, (key, label) in zip(
        axes,
        {"loss": "training loss", "accuracy": "validation accuracy", "images_per_second": "images/s"}.items(),
        strict=True,
    ):
        axis.plot(epochs, [epoch[key] for epoch in history], "o-")
        axis.set(xlabel="epoch", ylabel=label)
    figure.savefig(path, dpi=150)
    plt.close(figure)


def main(arguments: list[str] | None = None) -> None:
    options = parse(arguments)
    if "RANK" in os.environ:  # under torchrun
        dist.init_process_group()
    try:
        Trainer(options).run()
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


if __name__ == "__main__":
    main()
