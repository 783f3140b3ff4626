"""Classify the 102 flower species of Oxford Flowers-102 with EfficientNet-B3, by two-stage transfer learning.

    python efficientnet_b3.py                        train (or continue), evaluate, report
    python efficientnet_b3.py --epochs-stage2 10     any constant, by its name in lower case with dashes
    python efficientnet_b3.py --fresh                start anew; the files of an earlier run are moved aside
    python efficientnet_b3.py --demo                 the whole run on drawn flowers: no download, a minute
    python efficientnet_b3.py --predict rose.jpg d/  the five likeliest names for each image
    ... --predict rose.jpg --checkpoint FILE         the same by another checkpoint than the run's best

Stage 1 trains the classifier head on a frozen backbone; stage 2 fine-tunes the last feature blocks as well.
"""

import os
import signal
import sys

os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # threads that spin at barriers stall on a busy machine
as_script = __name__ == "__main__" and "__file__" in globals()  # neither imported nor pasted into a notebook
if as_script:
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C while the libraries load needs no traceback
    os.environ["MPLBACKEND"] = "agg"  # a notebook's backend, inherited, may be missing here

import argparse
import copy
import glob
import hashlib
import inspect
import io
import json
import math
import shutil
import socket
import time
import warnings
from collections import Counter, namedtuple
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path

import numpy as np
import pandas as pd
import seaborn as sns
import torch
import torch.nn.functional as F
from filelock import FileLock, Timeout
from joblib import cpu_count  # cores that this process may use, limits of a container included
from matplotlib import font_manager, rc_context
from matplotlib.colors import PowerNorm, hsv_to_rgb
from matplotlib.figure import Figure
from PIL import Image, ImageOps
from scipy.optimize import minimize_scalar
from scipy.stats import binomtest
from sklearn.metrics import classification_report, confusion_matrix
from torch import nn
from torch.optim.lr_scheduler import PolynomialLR
from torch.utils.data import DataLoader
from torchvision.datasets import Flowers102
from torchvision.datasets.utils import check_integrity, download_and_extract_archive
from torchvision.models.efficientnet import EfficientNet_B3_Weights, MBConv, efficientnet_b3
from torchvision.ops import Conv2dNormActivation, StochasticDepth
from torchvision.transforms import v2
from tqdm import tqdm

# Names in capitals that are no constants; in a notebook that runs this twice, also those from further down.
others = {name for name in globals() if name.isupper() and name.lower() not in globals().get("CONSTANTS", ())}

# ---- Configuration ---------------------------------------------------------------------------------------

# Data
DATA_DIR = "data"  # Flowers-102 (downloaded if missing or empty), or own images in one folder per class
IMG_SIZE = (300, 300)  # height and width in pixels
CROP = 0.0  # training views are random crops of at least this share of an image; 0: whole images
VIEWS = 8  # augmented views of each training image; epoch e trains on view (e - 1) mod VIEWS
VAL_FRACTION = 0.2  # of own images without a folder val, the share of each class drawn for validation
SKIP_UNREADABLE = False  # go on without images that cannot be read
EVAL_SPLITS = ("val", "test")  # splits that the report covers, where there are images: val, test or both
NUM_WORKERS = -1  # processes that work on images; -1: one per core, at most 16; 0: none but the main one

# Model
WEIGHTS = "IMAGENET1K_V1"  # pretrained weights: IMAGENET1K_V1, the path of a state dict, or none
UNFREEZE_LAST_BLOCKS = 2  # of the 9 feature blocks, how many stage 2 trains; 0: the head alone
HEAD_INIT = "lda"  # the head's start: lda, linear discriminant analysis in closed form, or random
SHRINKAGE = 0.3  # of lda's covariance matrix: near 0 as measured, 1 a multiple of the identity
FOLDS = 5  # parts of the training images for cross-fitting and for the temperature

# Stage 1: the head on the frozen backbone
EPOCHS_STAGE1 = 8  # passes over the training images
LR_STAGE1 = 1e-3  # learning rate of the first epoch; it falls to 0 in a straight line

# Stage 2: fine-tuning
EPOCHS_STAGE2 = 5  # passes over the training images
LR_STAGE2 = 1e-4  # learning rate of the head in the stage's first epoch; it falls alike
BLOCKS_LR_FACTOR = 10.0  # the last block's learning rate is this times LR_STAGE2 ...
LAYER_DECAY = 1.0  # ... and each earlier block's is this times that of the block after it
TRAIN_DEPTHWISE = True  # off: unfrozen blocks keep their depthwise kernels, whose gradients are slow on a CPU
CROSS_FIT = True  # blocks learn from, and training figures tell of, a head that has not seen the image
CLIP_NORM = 1.0  # longer gradients of the unfrozen blocks are shortened to this norm
REFIT_HEAD = True  # end on the mean of the trained head and lda's on the fine-tuned features

# Run
BATCH_SIZE = 32  # training images per step; on a GPU, also images per inference pass
SEED = 0  # of views, folds, order and noise: the same seed gives the same run
DEVICE = "auto"  # auto, cpu, cuda, cuda:1, mps, ...
AMP = True  # half precision: float16 on CUDA, bfloat16 on processors that have it
RUN_NAME = "effb3_flowers102_finetune"  # first part of the names of all files of the run
OUT_DIR = "runs"  # folder of those files

CONSTANTS = {name.lower(): value for name, value in globals().items()
             if name.isupper() and name not in others}

# ---- Data ------------------------------------------------------------------------------------------------

Transforms = namedtuple("Transforms", "resize augment centre normalize")


def make_transforms(cfg):
    """What an image goes through; an edit starts a new run.

    `resize` once, then `augment` for a training view or `centre` for all else (PIL images); last, on the
    device, `normalize` (uint8 [B, 3, H, W] to float32).
    """
    # With crops, 320 pixels, of which validation sees the middle 300, as in torchvision's preset for B3.
    resize = v2.Resize(max(cfg.img_size) * 16 // 15 if cfg.crop else cfg.img_size)
    crop = [v2.RandomResizedCrop(cfg.img_size, scale=(cfg.crop, 1))] if cfg.crop else []
    augment = v2.Compose([*crop, v2.RandomHorizontalFlip(), v2.RandomRotation(15),
                          v2.ColorJitter(brightness=0.2, contrast=0.2, saturation=0.2, hue=0.2)])
    normalize = v2.Compose([v2.ToDtype(torch.float32, scale=True),
                            v2.Normalize(mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225))])
    return Transforms(resize, augment, v2.CenterCrop(cfg.img_size), normalize)


def load_views(path, index, num_views, cfg):
    """A file, decoded once, as `num_views` augmented views, or, if 0, as one that is not: uint8 [V, H, W, 3].

    View v of image i is a function of (SEED, v, i) alone: the same in any process, order and continued run.
    """
    transforms, images = make_transforms(cfg), []
    image = transforms.resize(load_image(path))
    for view in range(max(1, num_views)):
        torch.default_generator.manual_seed(mix_seed(cfg.seed, "view", view, index))
        images.append(transforms.augment(image) if num_views else transforms.centre(image))
    return np.stack(images)


# ---- Model -----------------------------------------------------------------------------------------------


def build_model(num_classes, state=None, seed=0):
    """torchvision's EfficientNet-B3 in eval mode; `state`: weights, perhaps without a classifier."""
    torch.manual_seed(seed)
    model = efficientnet_b3(num_classes=num_classes).eval().requires_grad_(False)
    if state is not None:
        model.load_state_dict({**model.classifier.state_dict(prefix="classifier."), **state})
    return model


def split_model(model, blocks):
    """The model's own layers up to the pooled features in two sequences, cut before its last `blocks` blocks.

    The pooling ends the second one, or, if that has no blocks, the first: what comes out is [B, 1536].
    """
    layers = nn.Sequential(*model.features, model.avgpool, nn.Flatten())
    cut = len(model.features) - blocks if blocks else len(layers)
    return layers[:cut], layers[cut:]


# ---- Frozen activations ----------------------------------------------------------------------------------
#
# A frozen network is a fixed function: what it says about an image need be computed once, not in every epoch.
#
#     image file --once--> decoded --once per view--> augmented --> frozen part --> activations, a file
#     activations (232x10x10, 46 kB in half precision) --in every step--> unfrozen blocks --> head --> loss
#
# With 8 views, 13 epochs and a last evaluation cost 9,180 passes through the frozen part instead of 27,540,
# each in a sixth of the time ("Fast passes" below). The next run, with other epochs or learning rates, finds
# the file and computes none.

Inputs = namedtuple("Inputs", "tensor labels depends")  # activations or features [N, V, ...], int64 [N], ...


def activations_once(name, split, frozen, cfg):
    """Inputs of a split: what a Frozen backbone says of VIEWS views of each training image, or of others."""
    num_views, seed = (cfg.views, cfg.seed) if name == "train" else (0, None)  # no draw decides the others
    depends = [source_of(make_transforms), cfg.img_size, cfg.crop, num_views, seed, split.digest,
               frozen.digest, str(cfg.dtype), cfg.device.type]
    one = frozen(torch.zeros(1, 1, *cfg.img_size, 3, dtype=torch.uint8))
    shape = (len(split.paths), max(1, num_views), *one.shape[2:])
    batches = frozen_pass(frozen, split.paths, num_views, cfg)
    return Inputs(compute_once(name, depends, shape, batches, cfg), split.labels, depends)


def features_once(name, blocks, inputs, cfg):
    """Inputs of pooled features [N, V, D]: what the last blocks, a Frozen copy, say of activations."""
    depends = [inputs.depends, blocks.digest]
    batches = map(blocks, progress(inputs.tensor.split(64), len(inputs.tensor), "last blocks"))
    shape = (*inputs.tensor.shape[:2], *blocks(inputs.tensor[:1, :1]).shape[2:])
    return Inputs(compute_once(name, depends, shape, batches, cfg), inputs.labels, depends)


# ---- Heads -----------------------------------------------------------------------------------------------
#
# Ten images per class are few: a head soon knows its training images by heart, and its loss on them says
# nothing of other images. So FOLDS + 1 heads are trained side by side: head k never sees the images of fold
# k, the last one sees all and goes into the model. What a head says of images that it has not seen sets the
# temperature, and the unfrozen blocks learn from it (cross-fitting, Chernozhukov et al., 2018). On a frozen
# backbone that is as honest as validation; blocks that are trained have seen those images themselves.


class Heads(nn.Module):
    """FOLDS + 1 linear heads on the same features float32 [B, D], all of which start as `linear`."""

    def __init__(self, linear, labels, cfg):
        super().__init__()
        generator = torch.Generator().manual_seed(mix_seed(cfg.seed, "folds"))
        order = torch.randperm(len(labels), generator=generator)
        dealt = order[labels[order].argsort(stable=True)]  # class by class, as one deals cards
        folds = torch.empty_like(labels)
        folds[dealt] = torch.arange(len(labels)) % cfg.folds
        folds[labels.bincount()[labels] == 1] = cfg.folds  # every head needs a class's only image
        may_see = folds != torch.arange(cfg.folds + 1)[:, None]
        targets = labels.where(may_see, -100)  # which cross_entropy ignores
        targets[-1] = labels
        self.labels, self.folds, self.targets = (part.to(cfg.device) for part in (labels, folds, targets))
        self.judges = self.folds if cfg.cross_fit else torch.full_like(self.folds, cfg.folds)
        self.weight = nn.Parameter(linear.weight.detach().repeat(cfg.folds + 1, 1, 1))
        self.bias = nn.Parameter(linear.bias.detach().repeat(cfg.folds + 1, 1))
        self.register_buffer("sharpest", torch.tensor(0.0))  # log of the largest factor that `solve` may take

    def loss(self, features, images):
        """The loss of the heads: the cross-entropy of each on those images that it may see, summed."""
        logits = torch.einsum("bd,kcd->kbc", features.detach(), self.weight) + self.bias[:, None]
        targets = self.targets[:, images]
        return F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="sum") / len(images)

    def judge(self, features, which):
        """For the loss of the blocks: logits [B, classes], where head number which[i] judges image i."""
        logits = torch.einsum("bd,kcd->kbc", features, self.weight.detach()) + self.bias.detach()[:, None]
        return logits[which, torch.arange(len(which))]

    def judge_all(self, features, which):
        """The same for one view of each image of features [N, V, D]: logits [N, classes] on the CPU."""
        parts = torch.arange(len(features)).split(512)
        views = (features[images, images % features.shape[1]].to(self.weight) for images in parts)
        return torch.cat([self.judge(view, which[images]) for view, images in zip(views, parts)]).cpu()

    @torch.no_grad()
    def solve(self, features, shrinkage):
        """Set all heads in closed form: discriminant analysis of the features [N, V, D], and one temperature.

        As such heads are too confident, their logits are scaled by the factor that gives the lowest
        cross-entropy on left-out images (temperature scaling: Guo et al., 2017). Blocks that are fine-tuned
        have seen those images, and may get all of them right: the first factor, of frozen ones, is a limit.
        """
        last, classes = len(self.bias) - 1, self.bias.shape[1]
        parts = [moments(features, self.labels, (self.folds == fold).nonzero()[:, 0], classes)
                 for fold in range(last + 1)]
        total = [sum(part) for part in zip(*parts)]
        for head, left_out in enumerate([*parts[:-1], (0, 0, 0)]):
            seen = [whole - part for whole, part in zip(total, left_out)]
            self.weight[head], self.bias[head] = discriminant(*seen, shrinkage)
        logits = self.judge_all(features, self.folds)
        targets = self.labels.where(self.folds < last, -100).cpu()  # those that a head has not seen
        best = minimize_scalar(
            lambda log: F.cross_entropy(logits * math.exp(log), targets, reduction="sum").item(),
            bounds=(-10, self.sharpest.item()), method="bounded")
        self.sharpest.fill_(best.x)
        for parameter in self.parameters():
            parameter.mul_(math.exp(best.x))


def discriminant(counts, sums, products, shrinkage):
    """Linear discriminant analysis (Fisher, 1936), shrunk covariance: weights [classes, D], bias [classes].

    From `moments` it makes what scikit-learn's LinearDiscriminantAnalysis(solver="lsqr", shrinkage=...) makes
    many times slower, with all features in memory and one covariance per class.
    """
    means = sums / counts[:, None].clamp_min(1)
    covariance = (products - means.T @ sums) / counts.sum()
    alike = covariance.diagonal().mean().clamp_min(1e-9) * torch.eye(len(covariance))
    weight = torch.linalg.solve((1 - shrinkage) * covariance + shrinkage * alike, means.T).T
    return weight, (counts / counts.sum()).log() - (weight * means).sum(1) / 2


# ---- Training --------------------------------------------------------------------------------------------


def train(blocks, inputs, run, cfg):
    """Train both stages, from the beginning or from where `run` stands; `blocks` are its model's last."""
    heads = Heads(run.model.classifier[1], inputs["train"].labels, cfg)
    if run.trainer:
        heads.load_state_dict(run.trainer["heads"])

    # Stage 1. The last blocks stand still too: what they say is computed once, and the heads learn from it.
    if len(run.history) <= cfg.epochs_stage1:
        frozen = Frozen(blocks, cfg)
        features = {split: features_once(f"features_{split}", frozen, inputs[split], cfg)
                    for split in ("train", "val")}
        if not run.history and cfg.head_init == "lda":
            heads.solve(features["train"].tensor, cfg.shrinkage)
        train_stage(1, nn.Sequential(), heads, features, run, cfg)

    # Stage 2. The last blocks learn as well.
    train_stage(2, blocks, heads, inputs, run, cfg)


def train_stage(stage, blocks, heads, inputs, run, cfg):
    """Train the heads and `blocks` on `inputs` for the epochs of a stage that `run` has not had."""
    first, epochs, rate = ((1, cfg.epochs_stage1, cfg.lr_stage1) if stage == 1 else
                           (1 + cfg.epochs_stage1, cfg.epochs_stage2, cfg.lr_stage2))
    # Each stage has an optimizer of its own: Adam's averages of stage 1 say nothing of stage 2.
    optimizer = torch.optim.Adam(parameter_groups(blocks, heads, rate, cfg))
    scheduler = PolynomialLR(optimizer, max(1, epochs))  # of power 1: a straight line to 0
    # The usual first scale of 65,536 overflows at first, and stage 2 has no steps to lose.
    scaler = torch.amp.GradScaler(cfg.device.type, init_scale=1024, enabled=cfg.dtype == torch.float16)
    trainer = {"heads": heads, "optimizer": optimizer, "scheduler": scheduler, "scaler": scaler}
    if len(run.history) > first:
        for name, part in trainer.items():
            part.load_state_dict(run.trainer[name])
    for epoch in range(len(run.history), first + epochs):
        if epoch == 0:  # the heads as they start, before any gradient
            rates, logits = [0.0], heads.judge_all(inputs["train"].tensor, heads.judges)
            result = scores("train", logits, inputs["train"].labels)
        else:
            rates = scheduler.get_last_lr()  # the heads', then the blocks'
            result = train_one_epoch(blocks, heads, inputs["train"].tensor, optimizer, scaler, epoch, cfg)
            scheduler.step()
        if epoch == cfg.epochs_stage1 + cfg.epochs_stage2 and len(blocks) and cfg.refit_head:
            refit(heads, blocks, inputs["train"], cfg)
        # The head of all images goes into the model.
        run.model.classifier[1].load_state_dict({"weight": heads.weight[-1], "bias": heads.bias[-1]})
        logits = predict_logits(blocks, run.model.classifier, inputs["val"].tensor, cfg)
        row = {"stage": stage, "epoch": epoch, "lr_head": rates[0], "lr_blocks": max(rates[1:], default=0.0)}
        run.add_epoch(row | result | scores("val", logits, inputs["val"].labels), trainer)


def parameter_groups(blocks, heads, rate, cfg):
    """What learns, with its learning rate: the heads, then the blocks from the last to the first."""
    groups = [{"params": list(heads.parameters()), "lr": rate}]
    for block in reversed(blocks):
        # Of all parameters, depthwise kernels alone are [channels, 1, height, width].
        learning = [p for p in block.parameters() if cfg.train_depthwise or p.shape[1:2] != (1,)]
        if learning:  # pooling has none
            factor = cfg.blocks_lr_factor * cfg.layer_decay ** (len(groups) - 1)
            groups.append({"params": [p.requires_grad_() for p in learning], "lr": rate * factor})
    return groups


def train_one_epoch(blocks, heads, views, optimizer, scaler, epoch, cfg):
    """One pass over one view of each image, in random order; returns the training loss and accuracy."""
    for module in blocks.modules():  # BatchNorm keeps its statistics: a batch of 32 would estimate worse ones
        module.training = isinstance(module, StochasticDepth)
    torch.manual_seed(mix_seed(cfg.seed, "epoch", epoch))  # an epoch is the same after an interruption
    batches, all_logits, skipped = torch.randperm(len(views)).split(cfg.batch_size), [], 0
    for number, images in enumerate(progress(batches, len(views), f"epoch {epoch}"), 1):
        activations, images = views[images, (epoch - 1) % views.shape[1]], images.to(cfg.device)
        with torch.autocast(cfg.device.type, cfg.dtype, enabled=cfg.dtype != torch.float32):
            features = blocks(activations.to(cfg.device)).float()
        logits = heads.judge(features, heads.judges[images])
        # The blocks' loss, and the heads' own; in stage 1 the former has nothing to teach.
        loss = F.cross_entropy(logits, heads.labels[images]) + heads.loss(features, images)
        if not torch.isfinite(loss):
            raise RunError(f"the loss is {loss.item()} in epoch {epoch}, batch {number}: lower LR_STAGE1, "
                           "LR_STAGE2 or BLOCKS_LR_FACTOR, or set AMP to False; earlier epochs are saved")
        optimizer.zero_grad()
        scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        # Adam makes long steps of short gradients too; clipping keeps odd batches from shaping its averages.
        nn.utils.clip_grad_norm_(list(blocks.parameters()), cfg.clip_norm)
        scaler.step(optimizer)
        scale = scaler.get_scale()
        scaler.update()
        skipped += scaler.get_scale() < scale  # in float16, a gradient has overflowed
        all_logits.append(logits.detach())
    if skipped:
        print(f"epoch {epoch}: {skipped} of {len(batches)} steps skipped, as gradients overflow in float16")
    if skipped == len(batches):
        raise RunError(f"no step of epoch {epoch} counts: set AMP to False; earlier epochs are saved")
    return scores("train", torch.cat(all_logits), heads.labels[torch.cat(batches).to(cfg.device)])


def scores(split, logits, labels):
    """Loss and accuracy on a split, for a row of the history."""
    return {f"{split}_loss": F.cross_entropy(logits, labels).item(),
            f"{split}_acc": (logits.argmax(1) == labels).float().mean().item()}


@torch.no_grad()
def refit(heads, blocks, inputs, cfg):
    """Solve the heads on the features of the fine-tuned blocks and take the mean with the trained heads.

    Both classify the same features; the mean of two linear heads is a linear head, here a better one.
    """
    solved = copy.deepcopy(heads)
    solved.solve(features_once("refit", Frozen(blocks, cfg), inputs, cfg).tensor, cfg.shrinkage)
    for trained, other in zip(heads.parameters(), solved.parameters()):
        trained.lerp_(other, 0.5)


@torch.no_grad()
def predict_logits(blocks, head, activations, cfg):
    """Logits float32 [N, classes], on the CPU, of the first view of each of the activations [N, V, ...]."""
    features = map(Frozen(blocks, cfg), activations[:, :1].split(64))
    return torch.cat([head(part[:, 0].float().to(cfg.device)).cpu() for part in features])


# ---- Fast passes through frozen layers -------------------------------------------------------------------
#
# As the weights are fixed, a pass takes a sixth of the plain time: BatchNorm folded into the convolutions,
# channels_last, half precision, few images at a time so that they stay in a processor's cache, and one
# process per core.


class Frozen:
    """A copy, in its fastest form, of layers that stand still."""

    def __init__(self, layers, cfg):
        self.digest = digest(layers.state_dict())
        layers = copy.deepcopy(layers).eval()
        for module in layers.modules():
            if isinstance(module, Conv2dNormActivation):
                conv, norm, *_ = module
                module[0], module[1] = nn.utils.fusion.fuse_conv_bn_eval(conv, norm), nn.Identity()
            if isinstance(module, nn.AdaptiveAvgPool2d) and cfg.device.type == "cpu":
                module.forward = average_pool
        self.layers = layers.to(cfg.device, cfg.dtype, memory_format=torch.channels_last)
        self.device, self.dtype, self.normalize = cfg.device, cfg.dtype, make_transforms(cfg).normalize
        self.batch_size = 4 if cfg.device.type == "cpu" else cfg.batch_size

    @torch.no_grad()
    def __call__(self, views):
        """Outputs [B, V, ...], on the CPU, of activations [B, V, C, h, w] or images uint8 [B, V, H, W, 3]."""
        outputs, size = [], self.batch_size if views.dtype == torch.uint8 else 4 * self.batch_size
        for part in views.flatten(0, 1).split(size):
            part = part.to(self.device)
            if part.dtype == torch.uint8:
                part = self.normalize(part.permute(0, 3, 1, 2))  # is channels_last
            outputs.append(self.layers(part.to(self.dtype)))
        outputs = torch.cat(outputs).cpu().clone(memory_format=torch.contiguous_format)
        return outputs.unflatten(0, views.shape[:2])


def average_pool(maps):
    """What pooling to one value per channel says, in half precision on a CPU up to 30 times faster."""
    return F.avg_pool2d(maps, maps.shape[2:])


def frozen_pass(frozen, paths, num_views, cfg):
    """Send image files through `frozen`: yields outputs [B, V, ...]."""
    # A GPU is fed by all processes; processors are busiest when each one takes its images all the way.
    on_cpu, size = cfg.device.type == "cpu", max(1, frozen.batch_size // max(1, num_views))
    work = partial(batch_of_views, num_views=num_views, frozen=frozen if on_cpu else None, cfg=cfg)
    for batch in progress(map_batches(work, list(enumerate(paths)), size, cfg), len(paths), "frozen part"):
        if isinstance(batch, str):
            raise RunError(f"cannot read {batch}: mend or remove it, and run the same command again")
        yield torch.from_numpy(batch).view(cfg.dtype) if on_cpu else frozen(torch.from_numpy(batch))


def batch_of_views(items, num_views, frozen, cfg):
    """Views of files, (index, path), or what `frozen` says of them, as bytes; or why one cannot be read."""
    try:
        batch = np.stack([load_views(path, index, num_views, cfg) for index, path in items])
    except UserError as error:
        return str(error)
    # NumPy arrays go through a pipe; tensors would need shared memory, which containers are short of.
    return frozen(torch.from_numpy(batch)).view(torch.uint8).numpy() if frozen else batch


def map_batches(work, items, batch_size, cfg):
    """work(batch) for all batches of a list, in order, done by worker processes if there are enough."""
    # Forked workers share network and lists. Elsewhere workers start afresh, which a notebook's code cannot.
    fork = sys.platform == "linux"
    workers = min(cpu_count(), 16) if cfg.num_workers < 0 else cfg.num_workers
    workers = min(workers, len(items) // batch_size) if fork or "__file__" in globals() else 0
    return DataLoader(items, batch_size, num_workers=workers, collate_fn=work, worker_init_fn=ignore_sigint,
                      multiprocessing_context="fork" if fork and workers else None)


def ignore_sigint(_worker):
    """Ctrl-C reaches every process of a terminal; only the main one answers, and ends its workers."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)


# ---- Checkpoints and files of a run ----------------------------------------------------------------------

RUN_FILES = ("best.pth", "last.pth", "loss.png", "acc.png", "confusion_matrix.png", "mistakes.png",
             "report.txt", "metrics.json", "history.csv", "predictions.csv", "config.json")
WITHOUT_EFFECT = {"data_dir", "val_fraction", "skip_unreadable", "eval_splits", "num_workers", "weights",
                  "device", "amp", "run_name", "out_dir"}  # weights, images and precision count as they are


class Run:
    """A run as it stands on the disk: configuration, model, epochs so far, the states of all that trains."""

    def __init__(self, model, data, cfg):
        """Take up this very run after its last whole epoch, or move the files of another one aside."""
        images = [(data.splits[split].digest, data.splits[split].labels) for split in ("train", "val")]
        self.config = {name: getattr(cfg, name) for name in CONSTANTS if name not in WITHOUT_EFFECT} | {
            "class_names": data.class_names, "transforms": source_of(make_transforms),
            "images": digest(images), "weights": digest(model.features.state_dict()),
            "device_type": cfg.device.type, "precision": str(cfg.dtype)}
        self.cfg, self.model, self.history, self.trainer = cfg, model, [], None
        self.epoch_start = time.perf_counter()
        try:
            last, best = (load_checkpoint(run_file(cfg, name)) for name in ("last.pth", "best.pth"))
            changed = {key for old in (last["config"], best["config"]) for key in old | self.config
                       if old.get(key) != self.config.get(key)}
            reason = f"changed: {listing(sorted(changed), 9)}" if changed else "--fresh" if cfg.fresh else ""
        except UserError as error:
            reason = error
        if not reason:
            self.history, self.trainer = last["history"], last["trainer"]
            model.load_state_dict(last["model"])
        elif files := [path for path in (run_file(cfg, name) for name in RUN_FILES) if path.exists()]:
            number = 1
            while (old := run_file(cfg, f"old{number}")).exists():
                number += 1
            old.mkdir()
            for file in files:
                file.rename(old / file.name)
            print(f"new run    {reason}; to go back, move the files in {old} back and repeat their command")
        print("\nstage epoch lr head lr blocks train loss train acc val loss val acc   secs best")
        for end in range(len(self.history)):
            print_epoch(self.history[:end + 1])

    def add_epoch(self, row, trainer):
        """Save the model and the states of the parts of `trainer` after an epoch, and tell of it."""
        self.history.append(row | {"seconds": time.perf_counter() - self.epoch_start})
        self.epoch_start = time.perf_counter()
        best = best_epoch(self.history)
        checkpoint = {"model": {key: value.cpu() for key, value in self.model.state_dict().items()},
                      "config": self.config, "history": self.history, "best_accuracy": best["val_acc"]}
        if best is self.history[-1]:  # first: a run killed in between repeats the epoch, to the same bits
            write_file(run_file(self.cfg, "best.pth"), checkpoint)
        # The last one holds all that the next epoch depends on, besides what is drawn from SEED and epoch.
        states = {name: part.state_dict() for name, part in trainer.items()}
        write_file(run_file(self.cfg, "last.pth"), checkpoint | {"trainer": states})
        print_epoch(self.history)
        draw_curves(self.history, self.cfg)


def print_epoch(history):
    """The last epoch as a line of the table, with a star if none before was better."""
    star = "    *" if best_epoch(history) is history[-1] else ""
    print("{stage:5} {epoch:5} {lr_head:7.1e} {lr_blocks:9.1e} {train_loss:10.4f} {train_acc:9.2%} "
          "{val_loss:8.4f} {val_acc:7.2%} {seconds:6.1f}{star}".format(**history[-1], star=star))


def best_epoch(history):
    """The row with the highest validation accuracy; of equals, the lowest loss, then the first."""
    return max(history, key=lambda row: (row["val_acc"], -row["val_loss"]))


def load_checkpoint(path):
    """A checkpoint of this program, on the CPU."""
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
        # Whoever has a state can rely on it: the weights fit, and there is a best epoch.
        build_model(len(state["config"]["class_names"]), state["model"])
        best_epoch(state["history"])
        return state
    except Exception as error:  # whatever a missing, foreign or truncated file makes of the unpickler
        raise UserError(f"no checkpoint in {path} ({one_line(error)}): train, or set --checkpoint") from None


def run_file(cfg, suffix):
    """The path of a file of the run, say of "best.pth"."""
    return Path(cfg.out_dir) / f"{cfg.run_name}_{suffix}"


@contextmanager
def replacing(path):
    """A file to write that takes the place of `path` when all of it is on the disk, not before."""
    unfinished = path.with_name(path.name + ".tmp")
    try:
        with open(unfinished, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(unfinished, path)
    finally:
        unfinished.unlink(missing_ok=True)


def write_file(path, content):
    """Write text, a figure or a checkpoint (plain Python and tensors), whole or not at all."""
    buffer = io.BytesIO()  # torch.save would hide what a full disk says
    if isinstance(content, Figure):
        content.savefig(buffer, format="png", bbox_inches="tight")
    elif isinstance(content, dict):
        torch.save(content, buffer)
    else:
        buffer.write(content.encode("utf-8", "backslashreplace"))
    with replacing(path) as file:
        file.write(buffer.getbuffer())


def compute_once(name, depends, shape, batches, cfg):
    """A tensor of `shape` [N, V, ...] that `batches` yield in parts, memory-mapped from a file.

    The file's name ends in a fingerprint of all that the tensor depends on; other files of that `name` are
    removed. It gets that name when it is whole on the disk, and a SHA-256 at its end proves that it still is.
    """
    path = run_file(cfg, f"activations_{name}_{digest(depends)[:20]}.bin")
    for old in set(path.parent.glob(f"{glob.escape(cfg.run_name)}_activations_{name}_{'?' * 20}.*")) - {path}:
        old.unlink()
    if not is_whole(path):
        need = math.prod(shape) * cfg.dtype.itemsize
        if need > shutil.disk_usage(path.parent).free:
            raise UserError(f"no room for {need / 1e9:.1f} GB in {cfg.out_dir}: lower VIEWS or set --out-dir")
        # Written, not mapped: on a full disk, writing raises an error, and a mapped file kills the process.
        with replacing(path) as file:
            for batch in batches:
                file.write(batch.view(torch.uint8).numpy())
            file.flush()
            file.write(hashlib.sha256(np.memmap(file.name, np.uint8, "r")).digest())
    return torch.from_numpy(np.memmap(path, np.uint8, "c")[:-32]).view(cfg.dtype).view(shape)


def is_whole(path):
    """Whether a file ends in the SHA-256 of all that comes before; after a power cut it may end in zeros."""
    content = np.memmap(path, np.uint8, "r") if path.exists() and path.stat().st_size else b""
    return bytes(content[-32:]) == hashlib.sha256(content[:-32]).digest()


# ---- Images and weights on the disk ----------------------------------------------------------------------

Data = namedtuple("Data", "class_names splits")  # list of str, {"train": Split, "val": ...}
Split = namedtuple("Split", "paths labels digest")  # N paths, int64 [N], SHA-256 of all the files' bytes

IMAGE_ENDINGS = {ending for ending, form in Image.registered_extensions().items() if form in Image.OPEN}
LITTER = {"thumbs.db", "desktop.ini", "__macosx", "@eadir", "lost+found", "$recycle.bin", "__pycache__",
          "system volume information", "demo_flowers"}
SPLITS = {"train": ("train", "training"), "val": ("val", "valid", "validation"), "test": ("test", "testing")}


def load_image(path):
    """An image file of any mode as upright RGB, on white; UserError names the file and why it is not read."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of large images, odd palettes and broken metadata
            image = Image.open(path)
            image.load()
            with suppress(Exception):  # a broken EXIF block costs the orientation, not the image
                image = ImageOps.exif_transpose(image)
            if image.mode[0] in "IF":  # deep greys: white is the lowest usual level that no pixel exceeds
                pixels = np.nan_to_num(np.asarray(image, np.float64))
                low, high = min(0, pixels.min()), pixels.max()
                white = next((level for level in (1, 255, 4095, 65535) if high <= level), high)
                image = Image.fromarray(np.interp(pixels, (low, white), (0, 255)).round().astype(np.uint8))
            if image.has_transparency_data:
                image = image.convert("RGBA")
                image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
            return image.convert("RGB")
    except Exception as error:  # decoders raise all kinds: OSError, SyntaxError, struct.error, ...
        raise UserError(f"{path}: {one_line(error)}") from None


def visible(folder):
    """What a folder holds, sorted by name, without hidden files and other systems' litter."""
    return sorted(path for path in folder.iterdir()
                  if not path.name.startswith(".") and path.name.lower() not in LITTER)


def files_below(folder):
    """All visible files in a folder and its folders."""
    return [file for path in visible(folder) for file in (files_below(path) if path.is_dir() else [path])]


def only_images(files, stream):
    """Those files that Pillow reads, by their endings; the others are counted aloud."""
    others = Counter(path.suffix.lower() for path in files if path.suffix.lower() not in IMAGE_ENDINGS)
    for ending, count in others.most_common():
        print(f"data       {count} files {ending or 'without an ending'} passed over: no images", file=stream)
    return [path for path in files if path.suffix.lower() in IMAGE_ENDINGS]


def check_files(paths):
    """Of each file, the SHA-256 of its bytes and no reason, or none and why it cannot be read as an image."""
    checked = []
    for path in paths:
        try:
            load_image(path)
            checked.append((hashlib.sha256(path.read_bytes()).hexdigest(), ""))
        except UserError as error:
            checked.append(("", str(error)))
    return checked


def find_images(cfg):
    """The images of the run, all of which can be read. UserError says what is wrong with folder or files."""
    folder = Path(cfg.data_dir)
    flowers = not folder.exists() or not visible(folder) or (folder / "flowers-102").is_dir()
    names, table = (find_flowers102 if flowers else find_class_folders)(folder, cfg)
    # All files are decoded once, in seconds, so that all broken ones are known before the first long pass.
    batches = progress(map_batches(check_files, table.path.tolist(), 16, cfg), len(table), "decoding")
    table[["sha256", "reason"]] = [checked for batch in batches for checked in batch]
    reasons = [readable(reason) for reason in table.reason if reason]
    if reasons:
        file = run_file(cfg, "unreadable.txt")
        write_file(file, "\n".join(reasons) + "\n")
        told = f"cannot read {len(reasons)} of {len(table)} images, named in {file}, such as {reasons[0]}"
        if not cfg.skip_unreadable:
            raise UserError(f"{told}: mend or remove them, or set --skip-unreadable")
        print(f"data       {told}")
    table = table[table.reason == ""]
    found = set(table.split)
    if (table.label[table.split == "train"].nunique() < len(names) or "val" not in found
            or not found & set(cfg.eval_splits)):
        raise UserError(f"{folder} has too few images left of a class or split (cannot read {len(reasons)}): "
                        "add some or change VAL_FRACTION or EVAL_SPLITS")
    splits = {name: Split(part.path.tolist(), torch.tensor(part.label.tolist()), digest(part.sha256.tolist()))
              for name, part in table.groupby("split", sort=False)}
    counts = ", ".join(f"{len(split.paths):,} {name}" for name, split in splits.items())
    print(f"data       {readable(str(folder))}: {len(names)} classes; images: {counts}")
    return Data(names, splits)


def find_class_folders(folder, cfg):
    """Class names and a table of own images: one folder per class, alone or within train, val and test."""
    matches = [(split, path) for split, names in SPLITS.items() for path in visible(folder)
               if path.is_dir() and path.name.lower() in names]
    places = dict(matches) or {"train": folder}
    if len(matches) > len(places):
        raise UserError(f"{folder} holds a split twice: {listing([path.name for _, path in matches], 9)}")
    if "test" not in cfg.eval_splits:
        places.pop("test", None)
    folders = [(split, path) for split in places for path in visible(places[split]) if path.is_dir()]
    table = pd.DataFrame([(split, path.name, file) for split, path in folders for file in files_below(path)],
                         columns=["split", "name", "path"])
    table = table[table.path.isin(only_images(table.path, sys.stdout))].copy()
    names = sorted(set(table.name[table.split == "train"]))
    if len(names) < 2:
        found = listing([path.name for path in visible(folder)], 9)
        raise UserError(f"{folder} holds {found}: expected two or more folders of images, one per class, "
                        "alone or within train/, val/ and test/")
    # A class without images in one split would never be learned, or never be measured.
    wanted = {places[split] / path.name for split in places for _, path in folders}
    if lacking := sorted(wanted - {places[split] / name for split, name in zip(table.split, table.name)}):
        raise UserError("each class needs a folder of images, with the same name in each split; missing or "
                        f"empty: {listing(lacking)}")
    if "val" not in places:
        print(f"data       no folder val: {cfg.val_fraction:.0%} of each class, by SEED, are for validation")
        seed = mix_seed(cfg.seed, "validation") % 2**32
        drawn = table[table.split == "train"].groupby("name").sample(frac=cfg.val_fraction, random_state=seed)
        table.loc[drawn.index, "split"] = "val"
    titles = {}
    for file in (folder.resolve().parent / "cat_to_name.json", folder / "cat_to_name.json"):
        try:
            titles |= json.loads(file.read_text("utf-8")) if file.is_file() else {}
        except (ValueError, TypeError):
            raise UserError(f"{file} is no JSON object of folders and names: mend or remove it") from None
    titles = [str(titles.get(name, name)) for name in names]
    titles = [f"{title} ({name})" if titles.count(title) > 1 else title for title, name in zip(titles, names)]
    return list(map(readable, titles)), table.assign(label=table.name.map(names.index))


def find_flowers102(folder, cfg):
    """Class names and a table of Flowers-102 (Nilsback & Zisserman, 2008), which is downloaded if missing."""
    base, files, missing = folder / "flowers-102", Flowers102._file_dict, []
    try:
        parts = {name: Flowers102(folder, name, download=True) for name in ("train", "val", *cfg.eval_splits)}
        rows = [(name, path, label) for name, part in parts.items()
                for path, label in zip(part._image_files, part._labels)]
        if missing := [path for _, path, _ in rows if not path.exists()]:  # an extraction was interrupted
            archive, md5 = files["image"]
            download_and_extract_archive(Flowers102._download_url_prefix + archive, str(base), md5=md5)
    except (OSError, RuntimeError) as error:
        missing += [name for name, md5 in files.values() if not check_integrity(base / name, md5)]
        raise UserError(f"cannot download Flowers-102 ({one_line(error)}), of which {base} lacks whole "
                        f"{listing(missing)}: {cure(error)}, set --data-dir, or try --demo") from None
    return Flowers102.classes, pd.DataFrame(rows, columns=["split", "path", "label"])


def cure(error):
    """What helps where files could not be fetched or loaded."""
    if "CERTIFICATE" in str(error):
        return "let Python know your proxy's certificate (SSL_CERT_FILE)"
    if isinstance(error, PermissionError) or "Read-only" in str(error):
        return f"make {error.filename} writable (for the weights' cache: TORCH_HOME)"
    if isinstance(error, FileNotFoundError):
        return "check the path"
    return "connect to the network" if isinstance(error, OSError) else "delete it if a download was cut short"


def load_pretrained(weights):
    """The backbone's state dict that WEIGHTS names, without a classifier, or None for random weights."""
    if weights in ("none", None):
        return None
    try:
        if weights == "IMAGENET1K_V1":
            official = EfficientNet_B3_Weights.IMAGENET1K_V1
            weights = os.path.join(torch.hub.get_dir(), "checkpoints", os.path.basename(official.url))
            official.get_state_dict(check_hash=True, weights_only=True)  # downloads what is missing
        state = torch.load(weights, map_location="cpu", weights_only=True)
        while not any("features." in str(key) for key in state):  # trainers wrap it in dicts ...
            state = max((value for value in state.values() if isinstance(value, dict)), key=len)
        state = {key[key.find("features."):]: value.detach().float()  # ... and put prefixes before its keys
                 for key, value in state.items() if "features." in key}
        build_model(2, state)
        return state
    except Exception as error:  # whatever the network, the disk and the unpickler make of it
        raise UserError(f"cannot load the weights {weights} ({one_line(error)}): {cure(error)}, set "
                        "--weights to a state dict of EfficientNet-B3 or to none, or try --demo") from None


# ---- Reports ---------------------------------------------------------------------------------------------


def measure(probabilities, labels):
    """Figures of a split and a table of each class's scores, from probabilities [N, classes], labels [N]."""
    (confidence, predicted), classes = probabilities.max(1), range(probabilities.shape[1])
    table = pd.DataFrame(classification_report(labels, predicted, labels=classes, output_dict=True,
                                               zero_division=0)).T.iloc[:len(classes)]
    right, present = (predicted == labels).float(), table[table.support > 0]
    low, high = binomtest(int(right.sum()), len(labels)).proportion_ci(method="wilson")
    likeliest = probabilities.topk(min(5, len(classes))).indices
    gaps, _ = np.histogram(confidence, 15, (0, 1), weights=confidence - right)  # Guo et al., 2017
    return {"images": len(labels), "accuracy": right.mean().item(), "wilson_95_low": low,
            "wilson_95_high": high,
            "balanced_accuracy": present["recall"].mean(), "macro_f1": present["f1-score"].mean(),
            "top5_accuracy": (likeliest == labels[:, None]).any(1).float().mean().item(),
            "log_loss": F.nll_loss(probabilities.clamp_min(1e-12).log(), labels).item(),
            "expected_calibration_error": np.abs(gaps).sum().item() / len(labels)}, table


def draw_curves(history, cfg, at_once=False):
    """Write history.csv, and, at most every ten seconds unless `at_once`, the curves of loss and accuracy."""
    table, best, file = pd.DataFrame(history), best_epoch(history), run_file(cfg, "acc.png")
    write_file(run_file(cfg, "history.csv"), table.to_csv(index=False))
    if file.exists() and time.time() - file.stat().st_mtime < 10 and not at_once:
        return
    blue, orange, green = sns.color_palette("colorblind")[:3]
    for key, label, scale in (("loss", "Cross-entropy loss", 1), ("acc", "Accuracy (%)", 100)):
        figure = Figure((7.5, 4.2), layout="constrained")
        axes, height = figure.subplots(), scale * best[f"val_{key}"]
        axes.plot(table.epoch, scale * table[f"train_{key}"], ".-", c=blue, lw=2,
                  label="training (by heads that have not seen the image)" if cfg.cross_fit else "training")
        axes.plot(table.epoch, scale * table[f"val_{key}"], ".-", c=orange, lw=2, label="validation")
        axes.plot(best["epoch"], height, "o", c=green, ms=10, mec="white", label=f"best: {height:.3g}")
        axes.axvline(cfg.epochs_stage1 + 0.5, color="0.35", ls="--", lw=1.2)
        axes.set_title("stage 1: head (epoch 0: before any gradient)", loc="left", size=10, color="0.35")
        axes.set_title("stage 2: fine-tuning", loc="right", size=10, color="0.35")
        axes.set(xlim=(-0.5, cfg.epochs_stage1 + cfg.epochs_stage2 + 0.5), xlabel="Epoch", ylabel=label)
        axes.grid(alpha=0.3)
        figure.legend(loc="outside lower center", ncols=3, frameon=False)
        write_file(run_file(cfg, f"{key}.png"), figure)


@contextmanager
def any_letters(names):
    """Figures within show names as they are: no formulas, and the first fonts that have all their letters."""
    fonts, lacking = [], {ord(letter) for name in names for letter in name}
    for font in sorted(font_manager.fontManager.ttflist, key=lambda font: font.name != "DejaVu Sans"):
        if not lacking:
            break
        with suppress(Exception):  # a font file that is broken or gone
            has = lacking & set(font_manager.get_font(font.fname).get_charmap())
            if has and "LastResort" not in font.fname:  # that one has boxes only
                fonts, lacking = [*fonts, font.name], lacking - has
    if lacking:
        print(f"figures    no font has {listing(sorted(map(chr, lacking)), 9)}: boxes stand for these")
    with warnings.catch_warnings(), rc_context({"text.parse_math": False, "font.family": fonts}):
        warnings.filterwarnings("ignore", "Glyph")
        yield


def plot_confusion_matrix(confusion, names, title):
    """Heat map of `confusion` (int [classes, classes], rows true); up to 150 classes are named."""
    side = max(6.5, 0.12 * min(len(names), 150))  # inches
    labels, points = names if len(names) <= 150 else False, min(12, 60 * side / len(names))
    figure = Figure((side, side))
    axes, bar = figure.add_axes((0, 0, 1, 1)), figure.add_axes((1.02, 0, 0.015, 0.4))
    norm = PowerNorm(0.5, vmin=0, vmax=1)  # the root lifts single mistakes off the white of the empty cells
    sns.heatmap(confusion / np.maximum(confusion.sum(1, keepdims=True), 1), mask=confusion == 0, norm=norm,
                cmap="mako_r", ax=axes, cbar_ax=bar, linewidths=0.3, linecolor="0.9", xticklabels=labels,
                yticklabels=labels, annot=confusion if labels is not False else None, fmt="d",
                annot_kws={"size": 0.7 * points}, cbar_kws={"label": "share of the true class"})
    axes.tick_params(length=0, labelsize=points)
    axes.set_xlabel("predicted class", size=1.5 * side)
    axes.set_ylabel("true class", size=1.5 * side)
    axes.set_title(title, size=1.5 * side, pad=1.5 * side)
    return figure


def plot_mistakes(model, split, probabilities, names, title, cfg):
    """The eight most confident mistakes, each beside its class activation map (CAM, Zhou et al., 2016)."""
    (confidence, predicted), (height, width) = probabilities.max(1), cfg.img_size
    wrong = (predicted != split.labels).nonzero()[:, 0]
    chosen = wrong[confidence[wrong].argsort(descending=True)[:8]].tolist()
    frozen, evidence = Frozen(model.features, cfg), model.classifier[1].weight.detach().cpu()
    evidence = evidence - evidence.mean(0)  # what all classes share says nothing about one of them
    figure = Figure((14.4, 1 + 3.6 * height / width), dpi=72, layout="constrained")
    figure.suptitle(title, size=14)
    for place, i in enumerate(chosen, 1):
        label, taken, image = split.labels[i], predicted[i], load_views(split.paths[i], i, 0, cfg)
        maps = frozen(torch.from_numpy(image)[None])[0, 0].float()
        cam = torch.einsum("chw,c->hw", maps, evidence[taken])[None, None]
        cam = F.interpolate(cam, cfg.img_size, mode="bicubic")[0, 0].numpy()
        # On the grey photograph all colour is the map's, whatever the colour of the flower.
        heat = sns.color_palette("inferno", as_cmap=True)((cam - cam.min()) / max(np.ptp(cam), 1e-9))[..., :3]
        mixed = (heat + image[0].mean(2, keepdims=True) / 255) / 2
        axes = figure.add_subplot(2, 4, place)
        axes.imshow(np.hstack([image[0] / 255, mixed]))
        axes.set_axis_off()
        axes.set_title(f"is {names[label]} ({probabilities[i, label]:.0%})\n"
                       f"taken for {names[taken]} ({confidence[i]:.0%})", loc="left", size=9)
    return figure


def report(blocks, inputs, data, run, cfg):
    """Evaluate the best checkpoint on the splits of EVAL_SPLITS, write its files, and print what they say."""
    names, classes = np.array(data.class_names), range(len(data.class_names))
    best, metrics, texts, tables = load_checkpoint(run_file(cfg, "best.pth")), {}, [], []
    if best["config"] != run.config:
        raise RunError(f"{run_file(cfg, 'best.pth')} is of another run: start anew with --fresh")
    run.model.load_state_dict(best["model"])
    for name in (name for name in cfg.eval_splits if name in inputs):
        split = data.splits[name]
        probabilities = predict_logits(blocks, run.model.classifier, inputs[name].tensor, cfg).softmax(1)
        values, likeliest = (top.numpy() for top in probabilities.topk(min(5, len(names))))
        labels, predicted = split.labels.numpy(), likeliest[:, 0]
        confusion = confusion_matrix(labels, predicted, labels=classes)
        cells = sorted((-confusion[t, p], t, p) for t, p in np.argwhere(confusion) if t != p)
        pairs = [f"{-count} of {confusion[t].sum()} {names[t]} taken for {names[p]}"
                 for count, t, p in cells[:12]]
        metrics[name], table = measure(probabilities, split.labels)
        each = classification_report(labels, predicted, labels=classes, target_names=names, digits=3,
                                     zero_division=0)
        worst = table.set_axis(names)["f1-score"].nsmallest(10).to_string(float_format="%.3f")
        texts += [f"{name}: lowest F1\n{worst}", f"{name}: each class\n{each.rstrip()}",
                  "\n".join([f"{name}: most confused", *pairs])]
        tables.append(pd.DataFrame({
            "file": [os.path.relpath(path, cfg.data_dir) for path in split.paths], "split": name,
            "true": names[labels], "predicted": names[predicted], "probability": values[:, 0].round(4),
            "top5": ["; ".join(five) for five in names[likeliest]]}))
        if len(metrics) == 1:  # figures and terminal show one split, the files all
            print("\n" + "\n\n".join(texts[1:]))
            title = f", {name} split: {np.trace(confusion)} of {len(labels)} images right"
            short = [name if len(name) <= 36 else name[:35] + "…" for name in names]
            with any_letters(short):
                figure = plot_mistakes(run.model, split, probabilities, short, "Worst mistakes" + title, cfg)
                write_file(run_file(cfg, "mistakes.png"), figure)
                figure = plot_confusion_matrix(confusion, short, "Confusion matrix" + title)
                write_file(run_file(cfg, "confusion_matrix.png"), figure)
    draw_curves(run.history, cfg, at_once=True)
    best_row = best_epoch(run.history)["epoch"]
    summary = pd.DataFrame(metrics).drop("images").to_string(float_format="%.4f")
    metrics = {"best_epoch": best_row, "splits": metrics}
    constants = {name: str(getattr(cfg, name)) for name in CONSTANTS}
    write_file(run_file(cfg, "report.txt"), "\n\n".join([summary, *texts]) + "\n")
    write_file(run_file(cfg, "predictions.csv"), pd.concat(tables).to_csv(index=False))
    write_file(run_file(cfg, "metrics.json"), json.dumps(metrics, indent=1) + "\n")
    write_file(run_file(cfg, "config.json"), json.dumps(constants | run.config, indent=1) + "\n")
    print(f"\nbest epoch {best_row} of {len(run.history) - 1}\n{summary}")


# ---- Prediction ------------------------------------------------------------------------------------------


def predict(cfg):
    """Print the five likeliest classes of each image that --predict names or holds; returns the exit code."""
    paths = []
    for name in cfg.predict:  # Windows leaves wildcards to the program
        found = [Path(name)] if os.path.exists(name) else [Path(match) for match in sorted(glob.glob(name))]
        files = [path for path in found if not path.is_dir()]
        inside = [file for path in found if path.is_dir() for file in files_below(path)]
        if not files and not any(file.suffix.lower() in IMAGE_ENDINGS for file in inside):
            raise UserError(f"{name} does not exist or has no images: name images or folders")
        paths += files + only_images(inside, sys.stderr)
    state = load_checkpoint(cfg.checkpoint or run_file(cfg, "best.pth"))
    cfg.img_size, cfg.crop, names = (state["config"][key] for key in ("img_size", "crop", "class_names"))
    if state["config"]["transforms"] != source_of(make_transforms):
        print("note: this checkpoint was trained with another make_transforms than today's", file=sys.stderr)
    model = build_model(len(names), state["model"])
    batches = progress(map_batches(check_files, paths, 16, cfg), len(paths), "decoding")
    reasons = [reason for batch in batches for _, reason in batch]
    for reason in filter(None, reasons):
        print(f"cannot read {readable(reason)}", file=sys.stderr)
    paths = [path for path, reason in zip(paths, reasons) if not reason]
    outputs = frozen_pass(Frozen(split_model(model, 0)[0], cfg), paths, 0, cfg)
    for features, path in zip((image for batch in outputs for image in batch), paths):
        likeliest = model.classifier(features.float())[0].softmax(0).topk(min(5, len(names)))
        lines = [f"  {100 * share:5.1f} %  {names[number]}" for share, number in zip(*likeliest)]
        print(readable(str(path)), *lines, sep="\n")
    return int(any(reasons))


# ---- Drawn flowers ---------------------------------------------------------------------------------------

DEMO = dict(data_dir="data/demo_flowers", img_size=(96, 96), views=4, eval_splits=("val",), weights="none",
            epochs_stage1=6, epochs_stage2=3, run_name="demo")


def start_without_pretraining(model):
    """Scale random weights so that what passes through them is hardly distorted."""
    for module in reversed(list(model.modules())):  # parts come before what they are part of
        if isinstance(module, nn.BatchNorm2d):
            nn.init.constant_(module.weight, 4)  # SiLU and attention each halve a small signal
        if isinstance(module, MBConv) and module.use_res_connect:
            nn.init.zeros_(module.block[-1][1].weight)  # adds nothing at first (Goyal et al., 2017)
    nn.init.constant_(model.features[0][1].weight, 0.2)  # keeps all small, as SiLU bends large signals


def draw_demo_images(folder):
    """Draw 12 pictures of each of 102 species, 8 for training and 4 for validation, as own images lie."""
    if any(folder.glob("*")) and not (folder / "train" / "species 001").is_dir():
        raise UserError(f"{folder} holds other files than the demo's: leave out --data-dir or set another")
    for species, number in progress(list(np.ndindex(102, 12)), 102 * 12, "drawing"):
        path = folder / ("train" if number < 8 else "val") / f"species {species + 1:03d}" / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        draw_flower(species, number).save(path)


def draw_flower(species, number, size=96):
    """A PIL image of `size` pixels: the species decides the flower's look, the number its pose and light."""
    look, pose = np.random.default_rng(species), np.random.default_rng((species, number))
    petals, depth = look.choice([3, 5, 8]), look.uniform(0.2, 0.7)
    petal, middle = hsv_to_rgb(look.uniform((0, 0.4, 0.5), 1, (2, 3)))
    y, x = np.mgrid[-1:1:size * 1j, -1:1:size * 1j] - pose.uniform(-0.15, 0.15, (2, 1, 1))
    angle, distance = np.arctan2(y, x) + pose.uniform(0, 6.3), np.hypot(x, y) / pose.uniform(0.7, 0.9)
    picture = np.full((size, size, 3), (0.2, 0.4, 0.2))
    picture[distance < 1 - depth * np.cos(petals / 2 * angle) ** 2] = petal
    picture[distance < 0.3] = middle
    return Image.fromarray((picture * pose.uniform(150, 255)).astype(np.uint8))


# ---- Command line ----------------------------------------------------------------------------------------


class UserError(Exception):
    """Bad input; the message says in one line what is wrong and what to do."""


class RunError(Exception):
    """A run that cannot go on; the message says in one line why and what is safe."""


NUMBERS = (  # the type of options, and their lowest and highest value
    (int, 0, 9, "unfreeze_last_blocks"), (int, 2, 100, "folds"), (int, -1, 512, "num_workers"),
    (int, 32, 2048, "img_size"), (int, 1, 2**31, "views batch_size"),
    (int, 0, 2**63 - 1, "epochs_stage1 epochs_stage2 seed"), (float, 0, 1, "crop"),
    (float, 1e-9, 1, "shrinkage layer_decay"), (float, 0.001, 0.999, "val_fraction"),
    (float, 1e-12, 1e12, "lr_stage1 lr_stage2 blocks_lr_factor clip_norm"),
    (bool, False, True, "skip_unreadable train_depthwise cross_fit refit_head amp demo fresh"))


def parse_command_line(argv):
    """The configuration as a namespace: every constant by its lower-case name, and the modes."""
    parser = argparse.ArgumentParser(allow_abbrev=False)
    parser.error = lambda message: parser.exit(2, f"error: {readable(message)} (see --help)\n")  # one line
    parser.format_help = lambda: __doc__ + Path(__file__).read_text("utf-8").split("# ----")[1].lstrip(" -")
    modes = {"demo": False, "fresh": False, "predict": (), "checkpoint": ""}
    numbers = {name: row for *row, names in NUMBERS for name in names.split()}
    for name, value in (CONSTANTS | modes | (DEMO if "--demo" in argv else {})).items():
        kind, *_ = numbers.get(name, [type(value)])
        if kind not in (int, float, bool):
            kind = os.path.expanduser  # texts may be paths that start with ~
        how = {"action": argparse.BooleanOptionalAction} if kind is bool else {
            "type": kind, "nargs": "+" if isinstance(value, tuple) else None}
        parser.add_argument("--" + name.replace("_", "-"), default=value, **how)
    cfg = parser.parse_args(argv)
    rules = {
        "IMG_SIZE must be two numbers, height and width": np.size(cfg.img_size) == 2,
        "EVAL_SPLITS must be val, test or both":
            sorted(cfg.eval_splits) in (["test"], ["test", "val"], ["val"]),
        "HEAD_INIT must be lda or random": cfg.head_init in ("lda", "random"),
        "RUN_NAME must be a file name": cfg.run_name == Path(cfg.run_name).name and cfg.run_name.strip("."),
        "--checkpoint goes with --predict": cfg.predict or not cfg.checkpoint}
    for rule, kept in rules.items():
        if not kept:
            parser.error(rule)
    cfg.img_size, cfg.eval_splits = tuple(cfg.img_size), tuple(cfg.eval_splits)
    for name, (kind, low, high) in numbers.items():
        value = getattr(cfg, name)
        for part in value if isinstance(value, tuple) else [value]:
            if not isinstance(part, (int, float) if kind is float else kind) or not low <= part <= high:
                parser.error(f"{name.upper()} must be from {low} to {high}, not {part!r}")
    return cfg


def choose_device(cfg):
    """Put a torch.device that works in place of DEVICE, and choose the precision."""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # before CUDA starts: the same bits each time
    gpus = ["cuda"] * torch.cuda.is_available() + ["mps"] * torch.backends.mps.is_available()
    for name in [*gpus, "cpu"] if cfg.device == "auto" else [cfg.device]:
        try:
            F.conv2d(*torch.ones(2, 1, 1, 1, 1, device=name)).item()
            break
        except (RuntimeError, AssertionError) as error:
            if cfg.device != "auto":
                raise UserError(f"no device {name!r} ({one_line(error)}): set --device to auto") from None
            print(f"device     going on without {name}, which does not work: {one_line(error)}")
    cfg.device, processor = torch.device(name), torch.cpu.get_capabilities()
    torch.use_deterministic_algorithms(cfg.device.type == "cuda", warn_only=True)
    bfloat16 = processor.get("avx512_bf16") or processor.get("bf16")  # elsewhere it is slower than float32
    half = {"cuda": torch.float16, "cpu": torch.bfloat16 if bfloat16 else torch.float32}
    cfg.dtype = half.get(cfg.device.type, torch.float32) if cfg.amp else torch.float32


def train_and_report(cfg):
    """The whole run: data, model, activations, both stages, reports."""
    socket.setdefaulttimeout(60)  # no download waits for ever
    print(f"device     {cfg.device}, {str(cfg.dtype).removeprefix('torch.')}")
    if cfg.demo:
        print("demo       drawn flowers, no pretrained weights: a demonstration, no result")
        draw_demo_images(Path(cfg.data_dir))
    # All that a user can have got wrong comes first: images, then weights.
    data, pretrained = find_images(cfg), load_pretrained(cfg.weights)
    layout = torch.channels_last if cfg.device.type == "cpu" else torch.preserve_format  # slower on a GPU
    model = build_model(len(data.class_names), pretrained, cfg.seed).to(cfg.device, memory_format=layout)
    if pretrained is None:
        start_without_pretraining(model)
    backbone, blocks = split_model(model, cfg.unfreeze_last_blocks)
    frozen = Frozen(backbone, cfg)
    total, head, tail = (sum(map(torch.numel, net.parameters())) for net in (model, model.classifier, blocks))
    print(f"model      EfficientNet-B3, weights {cfg.weights}: {total:,} parameters\n"
          f"trained    {head:,} of these in stage 1, {head + tail:,} in stage 2")
    inputs = {name: activations_once(name, split, frozen, cfg) for name, split in data.splits.items()}
    run = Run(model, data, cfg)
    train(blocks, inputs, run, cfg)
    report(blocks, inputs, data, run, cfg)


SIGNALS = []  # an exception that a handler raises within a destructor is lost: `progress` looks here too


def stop(number, _frame):
    """Signal handler: an exception, so that workers are ended on the way out; a second signal kills."""
    SIGNALS.append(number)
    signal.signal(number, signal.SIG_DFL)
    raise KeyboardInterrupt


def main(argv=()):
    """The program; returns its exit code: 2 for bad input, 1 for a failed run, 128 + number for a signal."""
    SIGNALS.clear()  # of an earlier call
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):  # a terminal without the letters of a name shows their codes
            stream.reconfigure(errors="backslashreplace", line_buffering=True)
    cfg = parse_command_line(argv)
    try:
        choose_device(cfg)
        if cfg.predict:
            return predict(cfg)
        Path(cfg.out_dir).mkdir(parents=True, exist_ok=True)
        with FileLock(Path(cfg.out_dir) / f".{cfg.run_name}.lock", timeout=0):
            train_and_report(cfg)
        return 0
    except (UserError, RunError) as error:
        code, message = 2 if isinstance(error, UserError) else 1, str(error)
    except Timeout:
        code, message = 2, f"another run of {cfg.run_name} is going on: wait for it, or set --run-name"
    except BrokenPipeError:  # the reader, say `head`, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 128 + signal.SIGPIPE
    except OSError as error:
        code = 2 if error.filename else 1  # a full or broken disk names no file
        message = f"{one_line(error)}: make room, or name another place (--out-dir, --data-dir)"
    except (MemoryError, RuntimeError) as error:  # a worker that the system kills is out of memory too
        signs = "MemoryError", "out of memory", "you tried to allocate", "DataLoader worker (pid"
        if not any(sign in repr(error) for sign in signs):
            raise
        code, message = 1, f"out of memory: lower BATCH_SIZE, NUM_WORKERS or IMG_SIZE ({one_line(error)})"
    except KeyboardInterrupt:
        safe = "" if cfg.predict else ": finished epochs are saved; the same command without --fresh goes on"
        print(f"stopped{safe}", file=sys.stderr)
        return 128 + (SIGNALS or [signal.SIGINT])[0]
    print(f"error: {readable(message)}", file=sys.stderr)
    return code


# ---- Small helpers ---------------------------------------------------------------------------------------


def listing(items, limit=3):
    """The first few of `items` in words, and how many more there are."""
    more = f" and {len(items) - limit} more" if len(items) > limit else ""
    return ", ".join(map(str, items[:limit])) + more


def one_line(error):
    """An exception in one short line."""
    return f"{type(error).__name__}: {' '.join(str(error).split())}"[:200]


def readable(text):
    """Text with codes for what no terminal shows: line breaks, control characters, bytes of no letter."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def progress(batches, images, what):
    """Pass batches of so many images on: a bar where somebody watches, else one line after a long phase."""
    start = time.monotonic()
    with tqdm(total=images, desc=what, disable=None, leave=False, unit=" images") as bar:
        watched = not bar.disable
        for number, batch in enumerate(batches, 1):
            if SIGNALS:
                raise KeyboardInterrupt
            yield batch
            bar.update(images * number // len(batches) - bar.n)
    if not watched and (seconds := time.monotonic() - start) > 5:
        print(f"{what}: {images:,} images in {seconds:.0f} s", file=sys.stderr)


def moments(features, labels, images, classes):
    """Of the rows `images` of features [N, V, D]: counts [classes], sums [classes, D] and products [D, D].

    Those of two sets of images that share none add up to those of both.
    """
    counts = labels[images].bincount(minlength=classes) * features.shape[1]
    sums, products = torch.zeros(2, 1, 1, dtype=torch.float64)
    for rows in images.split(512):  # the features of all images may be larger than the memory
        part = features[rows.cpu()].to(labels.device).float().flatten(0, 1)
        targets = F.one_hot(labels[rows].repeat_interleave(features.shape[1]), classes).float()
        sums, products = sums + (targets.T @ part).cpu(), products + (part.T @ part).cpu()
    return counts.cpu(), sums, products


def digest(value):
    """SHA-256, in hexadecimal, of tensors and plain values in lists and dicts of any depth."""
    if isinstance(value, torch.Tensor):
        return hashlib.sha256(value.cpu().contiguous().numpy()).hexdigest()
    if isinstance(value, (dict, list, tuple)):
        value = [digest(part) for part in (value.items() if isinstance(value, dict) else value)]
    return hashlib.sha256(repr(value).encode(errors="backslashreplace")).hexdigest()


def mix_seed(*parts):
    """One seed from several numbers and words: no two lists of parts share a random stream."""
    return int(digest(parts)[:15], 16)


def source_of(function):
    """The source of a function or, where there is none, its bytecode."""
    with suppress(OSError):
        return inspect.getsource(function)
    return repr((function.__code__.co_code, function.__code__.co_consts, function.__code__.co_names))


if __name__ == "__main__":
    for number in (signal.SIGINT, signal.SIGTERM) if as_script else ():
        signal.signal(number, stop)
    if code := main(sys.argv[1:] if as_script else ()):  # a notebook's arguments are its own
        sys.exit(code)
