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
AS_SCRIPT = __name__ == "__main__" and "__file__" in globals()  # neither imported nor pasted into a notebook
if AS_SCRIPT:
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
import re
import shutil
import socket
import time
import warnings
from collections import Counter, namedtuple
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path

import matplotlib
import numpy as np
import pandas as pd
import seaborn as sns
import torch
import torch.nn.functional as F
from filelock import FileLock, Timeout
from joblib import cpu_count  # cores that this process may use, limits of a container included
from matplotlib import font_manager
from matplotlib.colors import PowerNorm, hsv_to_rgb
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter
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

# ---- Configuration ---------------------------------------------------------------------------------------

# Data
DATA_DIR = "data"  # Flowers-102 (downloaded if missing or empty), or own images in one folder per class
IMG_SIZE = (300, 300)  # height and width in pixels
CROP = 0.0  # training views are random crops of at least this share of an image; 0: whole images
VIEWS = 8  # augmented views of each training image; epoch e trains on view e - 1 mod VIEWS
VAL_FRACTION = 0.2  # of own images without a folder val, the share of each class drawn for validation
SKIP_UNREADABLE = False  # go on without images that cannot be read
EVAL_SPLITS = ("val", "test")  # splits that the report covers, where there are images: val, test or both
NUM_WORKERS = -1  # processes that make batches; -1: one per core, at most 16; 0: none but the main one

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
BLOCKS_LR_FACTOR = 10.0  # times LR_STAGE2 is the learning rate of the last block ...
LAYER_DECAY = 1.0  # ... and times that of the block after it, that of each block before
TRAIN_DEPTHWISE = True  # off: unfrozen blocks keep their depthwise kernels, whose gradients are slow on a CPU
CROSS_FIT = True  # blocks learn from a head that has not seen the image; off: from the head of all images
CLIP_NORM = 1.0  # longer gradients of the unfrozen blocks are shortened to this norm
REFIT_HEAD = True  # end on the mean of the trained head and lda's on the fine-tuned features

# Run
BATCH_SIZE = 32  # training images per step; on a GPU, also images per inference pass
SEED = 0  # of views, folds, order and noise: the same seed gives the same run
DEVICE = "auto"  # auto, cpu, cuda, cuda:1, mps, ...
AMP = True  # half precision: float16 on CUDA, bfloat16 on processors that have it
RUN_NAME = "effb3_flowers102_finetune"  # first part of the names of all files of the run
OUT_DIR = "runs"  # folder of those files

# ---- Data ------------------------------------------------------------------------------------------------

Transforms = namedtuple("Transforms", "resize augment centre normalize")


def make_transforms(cfg):
    """What an image goes through; an edit starts a new run.

    `resize` once, then `augment` for a training view or `centre` for all else (PIL images); last, on the
    device, `normalize` (uint8 [B, 3, H, W] to float32).
    """
    resize, crop, centre = v2.Resize(cfg.img_size), [], v2.Identity()
    if cfg.crop:  # 320 pixels, of which validation sees the middle 300, are torchvision's own preset for B3
        resize, centre = v2.Resize(max(cfg.img_size) * 16 // 15), v2.CenterCrop(cfg.img_size)
        crop = [v2.RandomResizedCrop(cfg.img_size, scale=(cfg.crop, 1))]
    augment = v2.Compose([*crop, v2.RandomHorizontalFlip(), v2.RandomRotation(15),
                          v2.ColorJitter(brightness=0.2, contrast=0.2, saturation=0.2, hue=0.2)])
    normalize = v2.Compose([v2.ToDtype(torch.float32, scale=True),
                            v2.Normalize(mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225))])
    return Transforms(resize, augment, centre, normalize)


def load_image(path):
    """An image file of any mode as upright RGB; UserError says why it cannot be read.

    Transparency becomes white; an animation is its first frame. Of deep greys, white is the lowest of the
    usual white levels that no pixel exceeds.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of large images, odd palettes and broken metadata
            image = Image.open(path)
            image.load()
            with suppress(Exception):  # a broken EXIF block costs the orientation, not the image
                image = ImageOps.exif_transpose(image)
            if image.mode[0] in "IF":
                pixels = np.nan_to_num(np.asarray(image, np.float64))
                low, high = min(0, pixels.min()), pixels.max()
                usual = [level for level in (1, 255, 4095, 65535) if high <= level and low == 0]
                white = usual[0] if usual else high - low or 1
                image = Image.fromarray(((pixels - low) * (255 / white)).round().astype(np.uint8))
            if image.has_transparency_data:
                image = image.convert("RGBA")
                image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
            return image.convert("RGB")
    except Exception as error:  # decoders raise all kinds: OSError, SyntaxError, struct.error, ...
        raise UserError(one_line(error)) from None


def load_views(path, index, views, cfg):
    """A file, decoded once, as `views` augmented views, or, if 0, as it is: uint8 [V, H, W, 3].

    View v of image i is a function of (SEED, v, i) alone: the same in any process, order and continued run.
    """
    transforms, images = make_transforms(cfg), []
    image = transforms.resize(load_image(path))
    for view in range(views):
        torch.default_generator.manual_seed(mix_seed(cfg.seed, "view", view, index))
        images.append(np.asarray(transforms.augment(image)))
    return np.stack(images or [np.asarray(transforms.centre(image))])


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


# ---- Model -----------------------------------------------------------------------------------------------


def build_model(num_classes, state=None, seed=0):
    """torchvision's EfficientNet-B3 in eval mode; `state`: weights, perhaps without a classifier."""
    torch.manual_seed(seed)
    model = efficientnet_b3(num_classes=num_classes).eval().requires_grad_(False)
    missing, foreign = ((), []) if state is None else model.load_state_dict(state, strict=False)
    odd = foreign + [key for key in missing if not key.startswith("classifier.")]
    if odd:
        raise ValueError(f"missing or foreign keys: {listing(odd)}")
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
# With 8 views, 13 epochs and a last evaluation cost 9,180 passes through the frozen part instead of 27,540.
# As its weights are fixed, each takes a sixth of the plain time: BatchNorm folded into the convolutions,
# channels_last, half precision, few images at a time so that they stay in a processor's cache, and one
# process per core. The next run, with other epochs or learning rates, finds the file and computes none.


class Frozen(nn.Module):
    """A copy, in its fastest form, of layers that stand still."""

    def __init__(self, layers, cfg):
        super().__init__()
        layers = copy.deepcopy(layers).eval()
        for block in layers.modules():
            if isinstance(block, Conv2dNormActivation):
                block[0], block[1] = nn.utils.fusion.fuse_conv_bn_eval(block[0], block[1]), nn.Identity()
        self.layers = layers.to(cfg.device, cfg.dtype, memory_format=torch.channels_last)
        self.device, self.dtype, self.normalize = cfg.device, cfg.dtype, make_transforms(cfg).normalize
        self.batch_size = 4 if cfg.device.type == "cpu" else cfg.batch_size

    @torch.no_grad()
    def forward(self, views):
        """Outputs [B, V, ...], on the CPU, of activations [B, V, C, h, w] or images uint8 [B, V, H, W, 3]."""
        outputs, size = [], self.batch_size if views.dtype == torch.uint8 else 4 * self.batch_size
        for part in views.flatten(0, 1).split(size):
            part = part.to(self.device)
            if part.dtype == torch.uint8:
                part = self.normalize(part.permute(0, 3, 1, 2))  # is channels_last
            outputs.append(self.layers(part.to(self.dtype)))
        outputs = torch.cat(outputs).cpu().clone(memory_format=torch.contiguous_format)
        return outputs.unflatten(0, views.shape[:2])


def frozen_pass(frozen, paths, views, cfg):
    """Send image files through `frozen`: yields outputs [B, V, ...], and {path: why it cannot be read}."""
    # A GPU is fed by all processes; processors are busiest when each one takes its images all the way.
    on_cpu, size = cfg.device.type == "cpu", max(1, frozen.batch_size // max(1, views))
    work = partial(batch_of_views, views=views, frozen=frozen if on_cpu else None, cfg=cfg)
    batches = map_batches(work, list(enumerate(paths)), size, cfg)
    for array, unreadable in progress(batches, size, "frozen part"):
        if unreadable and not cfg.predict:
            raise RunError(f"cannot read any more: {listing(list(unreadable.items()))}")
        batch = torch.from_numpy(array)
        yield batch.view(cfg.dtype) if on_cpu else frozen(batch), unreadable


def batch_of_views(items, views, frozen, cfg):
    """Views of the files of (index, path) pairs, or what `frozen` says of them, as bytes; and {path: reason}.

    NumPy arrays come from a worker through a pipe; tensors need shared memory, which containers are short of.
    """
    batch, unreadable = np.zeros((len(items), max(1, views), *cfg.img_size, 3), np.uint8), {}
    for row, (index, path) in zip(batch, items):
        try:
            row[:] = load_views(path, index, views, cfg)
        except UserError as error:
            unreadable[path] = str(error)
    return frozen(torch.from_numpy(batch)).view(torch.uint8).numpy() if frozen else batch, unreadable


def compute_once(name, depends, shape, batches, cfg):
    """A tensor of `shape` [N, V, ...] that `batches` yield in parts, memory-mapped from a file.

    The file's name ends in a fingerprint of all that the tensor depends on; other files of that `name` are
    removed. It gets that name when it is whole on the disk, and a SHA-256 at its end proves that it still is.
    """
    path = run_file(cfg, f"activations_{name}_{digest(depends)[:20]}.npy")
    for other in set(path.parent.glob(f"{glob.escape(cfg.run_name)}_activations_{name}_*.npy")) - {path}:
        other.unlink()
    if not is_whole(path):
        need, free = math.prod(shape) * cfg.dtype.itemsize, shutil.disk_usage(path.parent).free
        if need > free:
            raise UserError(f"activations need {need / 1e9:.1f} GB, {free / 1e9:.1f} are free in "
                            f"{cfg.out_dir}: lower VIEWS, UNFREEZE_LAST_BLOCKS or IMG_SIZE, or set --out-dir")
        bytes_shape, sha256 = (*shape[:-1], shape[-1] * cfg.dtype.itemsize), hashlib.sha256()
        header = {"descr": "|u1", "fortran_order": False, "shape": bytes_shape}
        with replacing(path) as file:
            np.lib.format.write_array_header_1_0(file, header)
            for batch in batches:
                content = batch.view(torch.uint8).numpy()
                file.write(content)
                sha256.update(content)
            file.write(sha256.digest())
    return torch.from_numpy(np.load(path, mmap_mode="c")).view(cfg.dtype)


def is_whole(path):
    """Whether a file is an array that ends in its SHA-256."""
    try:
        with path.open("rb") as file:
            file.seek(-32, os.SEEK_END)
            return file.read() == hashlib.sha256(np.load(path, mmap_mode="r")).digest()
    except (OSError, ValueError):  # missing, or cut short
        return False


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
        may_see[-1] = True
        judges = folds if cfg.cross_fit else torch.full_like(folds, cfg.folds)
        targets = labels.where(may_see, -100)  # which cross_entropy ignores
        for name, buffer in (("labels", labels), ("folds", folds), ("judges", judges), ("targets", targets)):
            self.register_buffer(name, buffer, persistent=False)
        self.weight = nn.Parameter(linear.weight.detach().cpu().repeat(cfg.folds + 1, 1, 1))
        self.bias = nn.Parameter(linear.bias.detach().cpu().repeat(cfg.folds + 1, 1))
        self.to(cfg.device)

    def loss(self, features, images):
        """What the heads learn from: the cross-entropy of each on those images that it may see, summed."""
        logits = torch.einsum("bd,kcd->kbc", features.detach(), self.weight) + self.bias[:, None]
        targets = self.targets[:, images]
        return F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="sum") / len(images)

    def judge(self, features, heads):
        """What the blocks learn from: logits [B, classes], where head number heads[i] judges image i."""
        logits = torch.einsum("bd,kcd->kbc", features, self.weight.detach()) + self.bias.detach()[:, None]
        return logits[heads, torch.arange(len(heads))]

    def judge_all(self, features, heads):
        """The same for one view of each image of features [N, V, D]: logits [N, classes] on the CPU."""
        parts = torch.arange(len(features)).split(512)
        views = (features[images, images % features.shape[1]].to(self.weight) for images in parts)
        return torch.cat([self.judge(view, heads[images]) for view, images in zip(views, parts)]).cpu()

    @torch.no_grad()
    def solve(self, features, shrinkage):
        """Set all heads in closed form: discriminant analysis of the features [N, V, D], and one temperature.

        As such heads are too confident, their logits are scaled by the factor that gives the lowest
        cross-entropy on left-out images (temperature scaling: Guo et al., 2017).
        """
        for head, targets in enumerate(self.targets):
            images = (targets >= 0).nonzero().flatten()
            self.weight[head], self.bias[head] = discriminant(
                features, self.labels, images, self.bias.shape[1], shrinkage)
        left_out = (self.folds < len(self.targets) - 1).cpu()
        if left_out.any():
            logits, targets = self.judge_all(features, self.folds)[left_out], self.labels.cpu()[left_out]
            best = minimize_scalar(lambda log: F.cross_entropy(logits * math.exp(log), targets).item(),
                                   bounds=(-10, 5), method="bounded")
            self.weight.mul_(math.exp(best.x))
            self.bias.mul_(math.exp(best.x))


def discriminant(features, labels, images, classes, shrinkage):
    """Linear discriminant analysis (Fisher, 1936), shrunk covariance: weights [classes, D], bias [classes].

    Of features [N, V, D] and labels [N], the rows `images` count. The same as scikit-learn's
    LinearDiscriminantAnalysis(solver="lsqr", shrinkage=...), which takes one covariance per class and so is
    many times slower, and which needs all features in memory.
    """
    def parts():
        """Rows of features and their labels, 512 images at a time."""
        for rows in images.split(512):
            part = features[rows.cpu()].to(labels.device).float()
            yield part.flatten(0, 1), labels[rows].repeat_interleave(part.shape[1])

    counts = labels[images].bincount(minlength=classes)[:, None] * features.shape[1]
    means = torch.zeros(classes, features.shape[2], device=labels.device)
    covariance = torch.zeros(features.shape[2], features.shape[2], device=labels.device)
    for part, targets in parts():
        means.index_add_(0, targets, part / counts[targets])
    for part, targets in parts():
        within = part - means[targets]
        covariance += within.T @ within / counts.sum()
    covariance, means, counts = covariance.cpu().double(), means.cpu().double(), counts.cpu()
    alike = (covariance.diagonal().mean() or 1) * torch.eye(len(covariance))  # 0: no two images of a class
    weight = torch.linalg.solve((1 - shrinkage) * covariance + shrinkage * alike, means.T).T
    return weight, (counts / counts.sum()).log()[:, 0] - (weight * means).sum(1) / 2


# ---- Training --------------------------------------------------------------------------------------------

Inputs = namedtuple("Inputs", "activations labels")  # [N, V, ...] in half precision, int64 [N]


def train(model, blocks, views, val, run, cfg):
    """Train both stages, from the beginning or from where `run` stands; `blocks` are the model's last."""
    run.print_history()
    heads, nothing = Heads(model.classifier[1], views.labels, cfg), nn.Sequential()
    if run.trainer:
        heads.load_state_dict(run.trainer["heads"])

    # Stage 1. The last blocks stand still too: what they say is computed once, and the heads learn from it.
    if len(run.history) <= cfg.epochs_stage1:
        start, frozen = time.perf_counter(), Frozen(blocks, cfg)
        passed_on = pass_on(frozen, views.activations)
        shape = (*views.activations.shape[:2], model.classifier[1].in_features)
        features = compute_once("features", run.depends, shape, passed_on, cfg)
        val_features = Inputs(torch.cat(list(pass_on(frozen, val.activations))), val.labels)
        if not run.history:  # epoch 0: the head as it is solved, before any gradient
            if cfg.head_init == "lda":
                heads.solve(features, cfg.shrinkage)
            row = {"stage": 1, "epoch": 0, "lr_head": 0.0, "lr_blocks": 0.0,
                   **scores("train", heads.judge_all(features, heads.judges), views.labels)}
            finish_epoch(row, start, model, nothing, val_features, {"heads": heads}, run, cfg)
        train_stage(1, model, nothing, heads, features, val_features, run, cfg)

    # Stage 2. The last blocks learn as well.
    train_stage(2, model, blocks, heads, views.activations, val, run, cfg)


def pass_on(frozen, activations):
    """Yield what frozen layers say about activations [N, V, ...], [B, V, D] for B images at a time."""
    for part in progress(activations.split(64), 64, "frozen blocks"):
        yield frozen(part)


def train_stage(stage, model, blocks, heads, views, val, run, cfg):
    """Train the heads and `blocks` on views [N, V, ...] for the epochs of a stage that `run` has not had."""
    before, epochs, rate = ((0, cfg.epochs_stage1, cfg.lr_stage1) if stage == 1 else
                            (cfg.epochs_stage1, cfg.epochs_stage2, cfg.lr_stage2))
    optimizer = torch.optim.Adam(parameter_groups(blocks, heads, rate, cfg))
    scheduler = PolynomialLR(optimizer, max(1, epochs))  # of power 1: a straight line to 0
    scaler = torch.amp.GradScaler(cfg.device.type, init_scale=1024, enabled=cfg.dtype == torch.float16)
    trainer = {"heads": heads, "optimizer": optimizer, "scheduler": scheduler, "scaler": scaler}
    if len(run.history) > before + 1:
        for name, part in trainer.items():
            part.load_state_dict(run.trainer[name])
    for epoch in range(len(run.history), before + epochs + 1):
        start, (lr_head, *lr_blocks) = time.perf_counter(), scheduler.get_last_lr()
        row = {"stage": stage, "epoch": epoch, "lr_head": lr_head, "lr_blocks": max(lr_blocks, default=0.0)}
        row |= train_one_epoch(blocks, heads, views, optimizer, scaler, epoch, cfg)
        scheduler.step()
        if epoch == before + epochs and len(blocks) and cfg.refit_head:
            refit(heads, blocks, views, cfg)
        finish_epoch(row, start, model, blocks, val, trainer, run, cfg)


def parameter_groups(blocks, heads, rate, cfg):
    """What learns, with its learning rate: the heads, then the blocks from the last to the first."""
    groups = [{"params": list(heads.parameters()), "lr": rate}]
    for layer in blocks.modules():
        depthwise = isinstance(layer, nn.Conv2d) and layer.groups > 1
        for parameter in layer.parameters(recurse=False):
            parameter.requires_grad_(cfg.train_depthwise or not depthwise)
    for block in reversed(blocks):
        if parameters := [parameter for parameter in block.parameters() if parameter.requires_grad]:
            factor = cfg.blocks_lr_factor * cfg.layer_decay ** (len(groups) - 1)
            groups.append({"params": parameters, "lr": rate * factor})
    return groups


def train_one_epoch(blocks, heads, views, optimizer, scaler, epoch, cfg):
    """One pass over one view of each image, in random order; returns the training loss and accuracy."""
    for module in blocks.modules():  # BatchNorm keeps its statistics: a batch of 32 would estimate worse ones
        module.training = isinstance(module, StochasticDepth)
    torch.manual_seed(mix_seed(cfg.seed, "epoch", epoch))  # an epoch is the same after an interruption
    batches, all_logits, skipped = torch.randperm(len(views)).split(cfg.batch_size), [], 0
    for number, images in enumerate(progress(batches, cfg.batch_size, f"epoch {epoch}"), 1):
        features = features_of(blocks, views[images, (epoch - 1) % views.shape[1]], cfg)
        images = images.to(cfg.device)
        logits = heads.judge(features, heads.judges[images])
        loss = F.cross_entropy(logits, heads.labels[images]) + heads.loss(features, images)
        if not torch.isfinite(loss):
            raise RunError(f"the loss is {loss.item()} in epoch {epoch}, batch {number}: lower LR_STAGE1, "
                           "LR_STAGE2 or BLOCKS_LR_FACTOR, or set AMP to False; earlier epochs are saved")
        optimizer.zero_grad()
        scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
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


def features_of(blocks, activations, cfg):
    """Pooled features float32 [B, D] of a batch of activations."""
    with torch.autocast(cfg.device.type, cfg.dtype, enabled=cfg.dtype != torch.float32):
        return blocks(activations.to(cfg.device)).float()


def scores(split, logits, labels):
    """Loss and accuracy on a split, for a row of the history."""
    return {f"{split}_loss": F.cross_entropy(logits, labels).item(),
            f"{split}_acc": (logits.argmax(1) == labels).float().mean().item()}


@torch.no_grad()
def refit(heads, blocks, views, cfg):
    """Solve the heads on the features of the fine-tuned blocks and take the mean with the trained heads.

    Both classify the same features; the mean of two linear heads is a linear head, and better than either.
    """
    trained, passed_on = copy.deepcopy(heads), pass_on(Frozen(blocks, cfg), views)
    shape = (*views.shape[:2], heads.weight.shape[2])
    heads.solve(compute_once("refit", digest(blocks.state_dict()), shape, passed_on, cfg), cfg.shrinkage)
    for solved, other in zip(heads.parameters(), trained.parameters()):
        solved.lerp_(other, 0.5)


@torch.no_grad()
def predict_logits(blocks, head, activations, cfg):
    """Logits float32 [N, classes], on the CPU, of the first view of each of the activations [N, V, ...]."""
    blocks.eval()
    return torch.cat([head(features_of(blocks, part[:, 0], cfg)) for part in activations.split(32)]).cpu()


def finish_epoch(row, start, model, blocks, val, trainer, run, cfg):
    """Put the head of all images into the model, validate it, save and tell."""
    heads = trainer["heads"]
    model.classifier[1].load_state_dict({"weight": heads.weight[-1], "bias": heads.bias[-1]})
    row |= scores("val", predict_logits(blocks, model.classifier, val.activations, cfg), val.labels)
    run.add_epoch(row | {"seconds": time.perf_counter() - start}, model, trainer)


# ---- Checkpoints -----------------------------------------------------------------------------------------

RUN_FILES = ("best.pth", "last.pth", "loss.png", "acc.png", "confusion_matrix.png", "mistakes.png",
             "report.txt", "metrics.json", "history.csv", "predictions.csv", "config.json")
# Constants that say where, how fast or how much to tell; weights, images and precision count as they are.
WITHOUT_EFFECT = {"data_dir", "val_fraction", "skip_unreadable", "eval_splits", "num_workers", "weights",
                  "device", "amp", "run_name", "out_dir"}


class Run:
    """A run as it stands on the disk: the epochs so far and all that the next one needs."""

    def __init__(self, model, data, depends, cfg):
        """Take up this very run after its last whole epoch, or move the files of another one aside."""
        constants = {name: getattr(cfg, name) for name in CONSTANTS if name not in WITHOUT_EFFECT}
        images = [(data.splits[split].digest, data.splits[split].labels) for split in ("train", "val")]
        self.config = {**constants, "class_names": data.class_names, "transforms": source_of(make_transforms),
                       "images": digest(images), "weights": digest(model.features.state_dict()),
                       "device_type": cfg.device.type, "precision": str(cfg.dtype)}
        self.cfg, self.depends, self.history, self.trainer, self.next_drawing = cfg, depends, [], None, 0.0
        reason = "--fresh"
        try:
            if not cfg.fresh:
                state, best = (load_checkpoint(run_file(cfg, name)) for name in ("last.pth", "best.pth"))
                changed = [key for key in {**self.config, **state["config"]}
                           if self.config.get(key) != state["config"].get(key)]
                reason = f"changed: {listing(changed, 9)}"
                if not changed:
                    reason = "the best checkpoint is of another run"
                if state["config"] == best["config"] == self.config:
                    self.history, self.trainer = state["history"], state["trainer"]
                    model.load_state_dict(state["model"])
                    return
        except UserError as error:
            reason = error
        files = [path for path in (run_file(cfg, name) for name in RUN_FILES) if path.exists()]
        if files:
            old = len(list(files[0].parent.glob(glob.escape(run_file(cfg, "old").name) + "*"))) + 1
            run_file(cfg, f"old{old}").mkdir()
            for file in files:
                file.rename(run_file(cfg, f"old{old}") / file.name)
            print(f"new run    {reason}; the earlier run's files are now in {run_file(cfg, f'old{old}')}: "
                  "to get back to it, move them back and repeat its command", flush=True)

    def add_epoch(self, row, model, trainer):
        """Save the model and the states of the parts of `trainer` after an epoch, and tell of it."""
        self.history.append(row)
        checkpoint = {"model": {key: value.cpu() for key, value in model.state_dict().items()},
                      "config": self.config, "history": self.history,
                      "best_accuracy": best_epoch(self.history)["val_acc"]}
        # The best first: a run killed between the two repeats the epoch and writes both again, the same.
        if best_epoch(self.history) is row:
            write_file(run_file(self.cfg, "best.pth"), checkpoint)
        states = {name: part.state_dict() for name, part in trainer.items()}
        write_file(run_file(self.cfg, "last.pth"), checkpoint | {"trainer": states})
        self.print_epoch(row)
        draw_curves(self, self.cfg)

    def print_history(self):
        """The head of the table, and the epochs that a run continues after."""
        print("\nstage  epoch   lr head  lr blocks  train loss  train acc  val loss  val acc  seconds  best")
        for row in self.history:
            self.print_epoch(row)

    def print_epoch(self, row):
        """The line of an epoch, with a mark if none so far was better."""
        best = best_epoch(self.history[:self.history.index(row) + 1]) is row
        print(f"{row['stage']:>5} {row['epoch']:>6} {row['lr_head']:>9.1e} {row['lr_blocks']:>10.1e} "
              f"{row['train_loss']:>11.4f} {100 * row['train_acc']:>8.2f} % {row['val_loss']:>9.4f} "
              f"{100 * row['val_acc']:>6.2f} % {row['seconds']:>8.1f}  {'*' * best}", flush=True)


def best_epoch(history):
    """The row with the highest validation accuracy; of equals, the lowest loss, then the first."""
    return max(history, key=lambda row: (row["val_acc"], -row["val_loss"]))


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
    except OSError as error:
        raise RunError(f"cannot write {path} ({error.strerror or one_line(error)}): what was there before is "
                       "whole; make room or mend it, and run the same command again") from None
    finally:
        unfinished.unlink(missing_ok=True)


def write_file(path, content):
    """Write text, bytes or a checkpoint (plain Python and tensors), whole or not at all."""
    with replacing(path) as file:
        if isinstance(content, dict):
            torch.save(content, file)
        else:
            file.write(content.encode("utf-8", "backslashreplace") if isinstance(content, str) else content)


def load_checkpoint(path):
    """A checkpoint of this program, on the CPU."""
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
        build_model(len(state["config"]["class_names"]), state["model"])
        best_epoch(state["history"])
        return state
    except FileNotFoundError:
        raise UserError(f"no checkpoint {path}: train first, or name another with --checkpoint") from None
    except Exception as error:  # whatever a foreign or truncated file makes of the unpickler
        raise UserError(f"{path} is damaged or no checkpoint of this program ({one_line(error)})") from None


# ---- Image folders and weights ---------------------------------------------------------------------------

Data = namedtuple("Data", "class_names splits")  # list of str, {"train": Split, "val": ...}
Split = namedtuple("Split", "paths labels digest")  # N paths, int64 [N], SHA-256 of all the files' bytes

Image.init()  # loads all of Pillow's formats, each with the endings of its files
IMAGE_ENDINGS = {ending for ending, form in Image.registered_extensions().items() if form in Image.OPEN}
LITTER = {"thumbs.db", "desktop.ini", "__macosx", "@eadir", "lost+found", "$recycle.bin", "__pycache__",
          "system volume information"}
SPLITS = {"train": "train", "training": "train", "val": "val", "valid": "val", "validation": "val",
          "test": "test", "testing": "test"}


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
        words = f"{count} files {ending or 'without an ending'} passed over: no images that Pillow reads"
        print(f"data       {words}", file=stream)
    return [path for path in files if path.suffix.lower() in IMAGE_ENDINGS]


def find_images(cfg):
    """The images of the run, all of which can be read. UserError says what is wrong with folder or files."""
    folder = Path(cfg.data_dir)
    if folder.is_file():
        raise UserError(f"{folder} is a file: set --data-dir to a folder")
    flowers = not folder.is_dir() or not visible(folder) or (folder / "flowers-102").is_dir()
    names, table = (find_flowers102 if flowers else find_class_folders)(folder, cfg)
    table = check_images(table, cfg)
    if flowers and table.reason.any():  # as after an interrupted extraction
        names, table = find_flowers102(folder, cfg, extract=True)
        table = check_images(table, cfg)
    if table.reason.any():
        broken, file = table[table.reason.notna()], run_file(cfg, "unreadable.txt")
        lines = [readable(f"{path}: {reason}") for path, reason in zip(broken.path, broken.reason)]
        write_file(file, "\n".join(lines) + "\n")
        told = f"cannot read {len(broken)} of {len(table)} images, named in {file}, such as {lines[0]}"
        table = table[table.reason.isna()]
        if not cfg.skip_unreadable:
            raise UserError(f"{told}: mend or remove them, or set --skip-unreadable to go on without them")
        if not set(broken.label) <= set(table.label[table.split == "train"]) or "val" not in set(table.split):
            raise UserError(f"{told}: no others are left of a class or of a split")
        print(f"data       {told}")
    splits = {name: Split(part.path.tolist(), torch.tensor(part.label.tolist()), digest(part.sha256.tolist()))
              for name, part in table.groupby("split", sort=False)}
    counts = ", ".join(f"{len(split.paths):,} {name}" for name, split in splits.items())
    print(f"data       {readable(str(folder))}: {len(names)} classes; images: {counts}", flush=True)
    return Data(names, splits)


def find_class_folders(folder, cfg):
    """Class names and a table of own images: one folder per class, alone or within train, val and test."""
    parts = {SPLITS[path.name.lower()]: path for path in visible(folder)
             if path.is_dir() and path.name.lower() in SPLITS} or {"train": folder}
    wanted = [split for split in ("train", "val", *{"test"} & set(cfg.eval_splits)) if split in parts]
    folders = {split: [path for path in visible(parts[split]) if path.is_dir()] for split in wanted}
    table = pd.DataFrame([(file, split, place.name) for split in wanted for place in folders[split]
                          for file in files_below(place)], columns=["path", "split", "name"])
    table = table[table.path.isin(only_images(table.path, sys.stdout))]
    names = sorted(table.name[table.split == "train"].unique())
    if len(names) < 2:
        found = listing([path.name for path in visible(folder)], 9)
        raise UserError(f"{folder} holds {found}: expected two or more folders of images, one per class, "
                        "alone or within train/, val/ and test/")
    for split in wanted:
        there = {path.name for path in folders[split]}
        odd = there ^ set(names) | there ^ set(table.name[table.split == split])
        if odd:
            raise UserError(f"{parts[split]} needs a folder of images for each class of {parts['train']} and "
                            f"no other; not so: {listing(sorted(odd))}")
    if "val" not in parts:
        chosen = table[table.split == "train"].groupby("name").sample(
            frac=cfg.val_fraction, random_state=mix_seed(cfg.seed, "validation") % 2**32).index
        table.loc[chosen, "split"] = "val"
        print(f"data       no folder val: {cfg.val_fraction:.0%} of each class, by SEED, are for validation")
    if not {"train", "val"} <= set(table.split):
        raise UserError(f"{folder} has too few images for training and validation: add some, or "
                        "change VAL_FRACTION")
    return class_titles(names, folder), table.assign(label=table.name.map(names.index))


def class_titles(names, folder):
    """Class names for reports: those in a file cat_to_name.json, if there is one, else the folders' own."""
    titles = {name: name for name in names}
    for file in (folder.resolve().parent / "cat_to_name.json", folder / "cat_to_name.json"):
        if file.is_file():
            try:
                titles |= {name: str(title) for name, title in json.loads(file.read_text("utf-8")).items()}
            except (ValueError, AttributeError):
                raise UserError(f"{file} is no JSON object of folders and names: mend or remove it") from None
    counts = Counter(titles[name] for name in names)
    return [readable(titles[name] + (f" ({name})" if counts[titles[name]] > 1 else "")) for name in names]


def find_flowers102(folder, cfg, extract=False):
    """Class names and a table of the images of Flowers-102 (Nilsback & Zisserman, 2008).

    What is missing is downloaded; `extract` unpacks all images again, if that is possible.
    """
    base, missing = folder / "flowers-102", [folder / "flowers-102" / "jpg"]
    try:
        Flowers102(folder, download=True)
        wanted = ("train", "val", *{"test"} & set(cfg.eval_splits))
        parts = {name: Flowers102(folder, name) for name in wanted}
        table = pd.DataFrame([(path, split, label) for split, part in parts.items()
                              for path, label in zip(part._image_files, part._labels)],
                             columns=["path", "split", "label"])
        missing = [path for path in table.path if not path.exists()]
        if missing or extract:
            archive, md5 = Flowers102._file_dict["image"]
            download_and_extract_archive(Flowers102._download_url_prefix + archive, str(base), md5=md5)
    except (OSError, RuntimeError) as error:
        if not extract:
            wrong = [base / name for name, md5 in Flowers102._file_dict.values()
                     if (base / name).exists() and not check_integrity(base / name, md5)]
            state = f"damaged: {listing(wrong)}" if wrong else f"missing: {listing(missing)}"
            raise UserError(f"Flowers-102 is not whole ({state}) and cannot be downloaded "
                            f"({one_line(error)}): {cure(error)}, set --data-dir, or try --demo, which needs "
                            "none; --eval-splits val does without the test split") from None
    return Flowers102.classes, table


def cure(error):
    """What helps against a failed download."""
    if "CERTIFICATE" in str(error):
        return "let Python know your proxy's certificate (SSL_CERT_FILE)"
    if isinstance(error, PermissionError) or "Read-only" in str(error):
        return f"make {error.filename} writable (for the weights' cache: TORCH_HOME)"
    return "connect to the network"


def check_images(table, cfg):
    """Decode all files once, so that all broken ones are known at once: adds columns sha256 and reason."""
    batches = progress(map_batches(check_files, table.path.tolist(), 16, cfg), 16, "decoding")
    sha256, reason = zip(*(pair for batch in batches for pair in batch))
    return table.assign(sha256=sha256, reason=reason)


def check_files(paths):
    """Of each file, the SHA-256 of its bytes, and None or why it cannot be read as an image."""
    checked = []
    for path in paths:
        try:
            load_image(path)
            checked.append((hashlib.sha256(path.read_bytes()).hexdigest(), None))
        except UserError as error:
            checked.append(("", str(error)))
    return checked


def load_pretrained(weights):
    """The backbone's state dict that WEIGHTS names, without a classifier, or None for random weights."""
    if weights in ("none", None):
        return None
    source, cached = Path(weights), weights == "IMAGENET1K_V1"
    try:
        if cached:
            url = EfficientNet_B3_Weights.IMAGENET1K_V1.url
            source = Path(torch.hub.get_dir(), "checkpoints", Path(url).name)
            if not source.exists():
                EfficientNet_B3_Weights.IMAGENET1K_V1.get_state_dict(check_hash=True)
        state = backbone_in(torch.load(source, map_location="cpu", weights_only=True))
        build_model(2, state)
        return state
    except OSError as error:
        raise UserError(f"cannot get the weights {weights} ({one_line(error)}): {cure(error)}, set --weights "
                        "to an existing file or to none, or try --demo") from None
    except Exception as error:  # whatever a foreign or truncated file makes of the unpickler
        advice = "delete it and run again" if cached else "save a state dict of torchvision's network"
        raise UserError(f"{source} has no weights of EfficientNet-B3 ({one_line(error)}): {advice}") from None


def backbone_in(state):
    """Backbone weights as float32, freed of what trainers add: outer dicts, prefixes, a classifier."""
    first = "features.0.0.weight"
    while not any(str(key).endswith(first) for key in state):
        inner = [value for value in state.values() if isinstance(value, dict) and value]
        if not inner:
            raise ValueError(f"it has {listing(list(state))}")
        state = max(inner, key=len)
    prefix = next(key for key in state if key.endswith(first)).removesuffix(first)
    return {key.removeprefix(prefix): value.detach().float() for key, value in state.items()
            if key.startswith(prefix + "features.")}


# ---- Reports ---------------------------------------------------------------------------------------------


def measure(probabilities, labels):
    """Figures of a split and a table of each class's scores, from probabilities [N, classes], labels [N]."""
    (confidence, predicted), classes = probabilities.max(1), range(probabilities.shape[1])
    table = pd.DataFrame(classification_report(labels, predicted, labels=classes, output_dict=True,
                                               zero_division=0)).T.iloc[:len(classes)]
    right, present = (predicted == labels).float(), table[table.support > 0]
    likeliest = probabilities.topk(min(5, len(classes))).indices
    bins = (confidence * 15).long().clamp_max(14)  # expected calibration error: Guo et al., 2017
    gaps = torch.zeros(15).index_add(0, bins, confidence - right)
    return {"images": len(labels), "accuracy": right.mean().item(),
            "wilson_95": list(binomtest(int(right.sum()), len(labels)).proportion_ci(method="wilson")),
            "balanced_accuracy": present["recall"].mean(), "macro_f1": present["f1-score"].mean(),
            "top5_accuracy": (likeliest == labels[:, None]).any(1).float().mean().item(),
            "log_loss": F.nll_loss(probabilities.clamp_min(1e-12).log(), labels).item(),
            "expected_calibration_error": gaps.abs().sum().item() / len(labels)}, table


def summary(split, figures):
    """The figures of one split in two lines."""
    return ("{:10} accuracy {accuracy:.2%} (95% Wilson interval {wilson_95[0]:.1%} to {wilson_95[1]:.1%}), "
            "macro-F1 {macro_f1:.4f},\n{:10} balanced {balanced_accuracy:.2%}, top-5 {top5_accuracy:.2%}, "
            "log loss {log_loss:.4f}, ECE {expected_calibration_error:.4f}, {images:,} images"
            ).format(split, "", **figures).replace("%", " %")


def most_confused(confusion, names, limit=12):
    """Lines on the largest off-diagonal cells of `confusion` (int [classes, classes], rows true)."""
    cells = sorted((-confusion[t, p], confusion[t].sum(), t, p) for t, p in np.argwhere(confusion) if t != p)
    return [f"{-count} of {total} {names[t]} taken for {names[p]}" for count, total, t, p in cells[:limit]]


def draw_curves(run, cfg, at_once=False):
    """Write history.csv, and, at most every ten seconds unless `at_once`, the curves of loss and accuracy."""
    table, best = pd.DataFrame(run.history), best_epoch(run.history)
    write_file(run_file(cfg, "history.csv"), table.to_csv(index=False))
    if time.monotonic() < run.next_drawing and not at_once:
        return
    for key, label, scale in (("loss", "Cross-entropy loss", 1), ("acc", "Accuracy (%)", 100)):
        figure = Figure((7.5, 4.2), layout="constrained")
        blue, orange, green = sns.color_palette("colorblind")[:3]
        axes, height = figure.subplots(), scale * best[f"val_{key}"]
        axes.plot(table.epoch, scale * table[f"train_{key}"], ".-", c=blue, lw=2,
                  label="training" + " (by heads that have not seen the image)" * cfg.cross_fit)
        axes.plot(table.epoch, scale * table[f"val_{key}"], ".-", c=orange, lw=2, label="validation")
        axes.plot(best["epoch"], height, "o", c=green, ms=10, mec="white", label=f"best: {height:.3g}")
        axes.axvline(cfg.epochs_stage1 + 0.5, color="0.35", ls="--", lw=1.2)
        axes.set_title("stage 1: head (at 0: solved, untrained)", loc="left", size=10, color="0.35")
        axes.set_title("stage 2: fine-tuning", loc="right", size=10, color="0.35")
        axes.set(xlim=(-0.5, cfg.epochs_stage1 + cfg.epochs_stage2 + 0.5), xlabel="Epoch", ylabel=label)
        axes.xaxis.set_major_locator(MaxNLocator(15, integer=True, min_n_ticks=1))
        axes.grid(alpha=0.3)
        figure.legend(loc="outside lower center", ncols=3, frameon=False)
        save_figure(figure, run_file(cfg, f"{key}.png"))
    run.next_drawing = time.monotonic() + 10


def save_figure(figure, path, dpi=100):
    """Write a figure as PNG."""
    drawn = io.BytesIO()
    figure.savefig(drawn, format="png", dpi=dpi, bbox_inches="tight")
    write_file(path, drawn.getvalue())


@contextmanager
def any_letters(names):
    """Figures within show names as they are: no formulas, and the first fonts that have all their letters."""
    fonts, lacking = [], {ord(letter) for name in names for letter in name}
    for font in sorted(font_manager.fontManager.ttflist, key=lambda font: font.name != "DejaVu Sans"):
        with suppress(Exception):  # a font file that is broken or gone
            has = lacking & set(font_manager.get_font(font.fname).get_charmap())
            if has and "LastResort" not in font.fname:  # that one has boxes only
                fonts, lacking = [*fonts, font.name], lacking - has
        if not lacking:
            break
    else:
        print(f"figures    no font has {listing(sorted(map(chr, lacking)), 9)}: boxes stand for these")
    with warnings.catch_warnings(), matplotlib.rc_context({"text.parse_math": False, "font.family": fonts}):
        warnings.filterwarnings("ignore", "Glyph")
        yield


def plot_confusion_matrix(confusion, names, split):
    """Heat map of `confusion` (int [classes, classes], rows true); up to 150 classes are named."""
    side, named = max(6.5, 0.12 * min(len(names), 150)), len(names) <= 150  # inches; 0.12 a class can be read
    cell, figure = 72 * side / len(names), Figure((side, side))  # points
    axes, bar = figure.add_axes((0, 0, 1, 1)), figure.add_axes((1.02, 0, 0.015, 0.4))
    share = confusion / np.maximum(confusion.sum(1, keepdims=True), 1)
    norm = PowerNorm(0.5, vmin=0, vmax=1)  # the root lifts single mistakes off the white of the empty cells
    sns.heatmap(share, mask=confusion == 0, norm=norm, cmap="mako_r", ax=axes, cbar_ax=bar, linewidths=0.3,
                linecolor="0.9", xticklabels=names if named else False, yticklabels=names if named else False,
                annot=confusion if named else None, fmt="d", annot_kws={"size": min(14, 0.6 * cell)},
                cbar_kws={"format": PercentFormatter(1, 0, " %"), "label": "share of the true class"})
    axes.tick_params("x", length=0, labelsize=min(12, 0.85 * cell), rotation=90)
    axes.tick_params("y", length=0, labelsize=min(12, 0.85 * cell), rotation=0)
    axes.set_xlabel("predicted class", size=1.5 * side)
    axes.set_ylabel("true class", size=1.5 * side)
    right = f"{np.trace(confusion)} of {confusion.sum()} images right"
    axes.set_title(f"Confusion matrix, {split} split: {right}", size=1.5 * side, pad=1.5 * side)
    return figure


def plot_mistakes(model, split, name, probabilities, names, cfg, limit=8):
    """The most confident mistakes, each beside its class activation map (CAM, Zhou et al., 2016)."""
    confidence, predicted = probabilities.max(1)
    wrong = (predicted != split.labels).nonzero().flatten()
    chosen = wrong[confidence[wrong].argsort(descending=True)[:limit]].tolist()
    frozen, evidence = Frozen(model.features, cfg), model.classifier[1].weight.detach().cpu()
    evidence = evidence - evidence.mean(0)  # what all classes share says nothing about one of them
    columns, rows = min(4, max(2, len(chosen))), max(1, math.ceil(len(chosen) / 4))
    height = 0.45 + 1.8 * cfg.img_size[0] / cfg.img_size[1]
    figure = Figure((3.6 * columns, 0.4 + rows * height), layout="constrained")
    figure.subplots(rows, columns, subplot_kw={"frame_on": False, "xticks": [], "yticks": []})
    for axes, i in zip(figure.axes, chosen):
        views, label, taken = load_views(split.paths[i], i, 0, cfg), split.labels[i], predicted[i]
        maps = frozen(torch.from_numpy(views)[None])[0, 0].float()
        cam = torch.einsum("chw,c->hw", maps, evidence[taken]).numpy()
        cam = Image.fromarray((cam - cam.min()) / max(np.ptp(cam), 1e-9)).resize(views.shape[2:0:-1])
        cam = np.asarray(cam).clip(0, 1)[..., None]
        # On the grey photograph all colour is the map's, whatever the colour of the flower.
        heat, alpha = sns.color_palette("inferno", as_cmap=True)(cam[..., 0])[..., :3], 0.25 + 0.4 * cam
        heat = alpha * heat + (1 - alpha) * views[0].mean(2, keepdims=True) / 255
        axes.imshow(np.hstack([views[0] / 255, heat]))
        axes.set_title(f"is {names[label]} ({100 * probabilities[i, label].item():.0f} %)\ntaken for "
                       f"{names[taken]} ({100 * confidence[i].item():.0f} %)", loc="left", size=9)
    words = f"Most confident of {len(wrong)} mistakes in {len(predicted)} images, {name} split"
    figure.suptitle(words, size=12)
    return figure


def report(model, blocks, inputs, data, run, cfg):
    """Evaluate the best checkpoint on the splits of EVAL_SPLITS, write its files, and print what they say."""
    names, metrics, texts, tables = np.array(data.class_names), {}, [], []
    best = load_checkpoint(run_file(cfg, "best.pth"))
    if best["config"] != run.config:
        raise RunError(f"{run_file(cfg, 'best.pth')} is of another run: start anew with --fresh")
    model.load_state_dict(best["model"])
    for name in (name for name in cfg.eval_splits if name in inputs):
        split, classes = data.splits[name], range(len(names))
        probabilities = predict_logits(blocks, model.classifier, inputs[name].activations, cfg).softmax(1)
        values, likeliest = (top.numpy() for top in probabilities.topk(min(5, len(names))))
        labels, predicted = split.labels.numpy(), likeliest[:, 0]
        confusion = confusion_matrix(labels, predicted, labels=classes)
        metrics[name], table = measure(probabilities, split.labels)
        worst = table.set_axis(names)["f1-score"].nsmallest(10).to_string(float_format="%.3f")
        each = classification_report(labels, predicted, labels=classes, target_names=names, digits=3,
                                     zero_division=0)
        pairs = "\n".join(most_confused(confusion, names))
        texts += [f"lowest F1, {name}\n{worst}", f"each class, {name}\n{each}",
                  f"most confused, {name}\n{pairs}"]
        tables.append(pd.DataFrame({
            "file": [os.path.relpath(path, cfg.data_dir) for path in split.paths], "split": name,
            "true": names[labels], "predicted": names[predicted], "probability": values[:, 0].round(4),
            "top5": ["; ".join(five) for five in names[likeliest]]}))
        if len(metrics) == 1:
            short = [name if len(name) <= 36 else name[:35] + "…" for name in names]
            with any_letters(short):
                figure = plot_mistakes(model, split, name, probabilities, short, cfg)
                save_figure(figure, run_file(cfg, "mistakes.png"), dpi=72)
                figure = plot_confusion_matrix(confusion, short, name)
                save_figure(figure, run_file(cfg, "confusion_matrix.png"))
            print("\n" + "\n\n".join(texts[1:]))
    draw_curves(run, cfg, at_once=True)
    last_words = "\n".join(map(summary, metrics, metrics.values()))
    content = {"best_epoch": best_epoch(run.history)["epoch"], "splits": metrics}
    constants = {name: str(getattr(cfg, name)) for name in CONSTANTS}
    write_file(run_file(cfg, "report.txt"), "\n\n".join([last_words, *texts]) + "\n")
    write_file(run_file(cfg, "predictions.csv"), pd.concat(tables).to_csv(index=False))
    write_file(run_file(cfg, "metrics.json"), json.dumps(content, indent=1) + "\n")
    write_file(run_file(cfg, "config.json"), json.dumps(constants | run.config, indent=1) + "\n")
    print(f"\nbest       epoch {content['best_epoch']} of {len(run.history) - 1}\n{last_words}")


# ---- Prediction ------------------------------------------------------------------------------------------


def predict(cfg):
    """Print the five likeliest classes of each image that --predict names or holds; returns the exit code."""
    paths, failed = [], False
    for name in cfg.predict:
        # Windows leaves wildcards to the program.
        found = [Path(name)] if Path(name).exists() else [Path(match) for match in sorted(glob.glob(name))]
        files = [path for path in found if not path.is_dir()]
        inside = [file for path in found if path.is_dir() for file in files_below(path)]
        if not files and not any(file.suffix.lower() in IMAGE_ENDINGS for file in inside):
            raise UserError(f"{name} does not exist or has no images: name images or folders")
        paths += files + only_images(inside, sys.stderr)
    state = load_checkpoint(Path(cfg.checkpoint) if cfg.checkpoint else run_file(cfg, "best.pth"))
    cfg.img_size, cfg.crop, names = (state["config"][key] for key in ("img_size", "crop", "class_names"))
    if state["config"]["transforms"] != source_of(make_transforms):
        print("note: this checkpoint was trained with another make_transforms than today's", file=sys.stderr)
    model = build_model(len(names), state["model"])
    remaining = iter(paths)
    for features, unreadable in frozen_pass(Frozen(split_model(model, 0)[0], cfg), paths, 0, cfg):
        values, likeliest = model.classifier(features[:, 0].float()).softmax(1).topk(min(5, len(names)))
        for shares, classes, path in zip(values.tolist(), likeliest.tolist(), remaining):
            if path in unreadable:
                print(f"{readable(str(path))}: cannot be read ({unreadable[path]})", file=sys.stderr)
                failed = True
            else:
                lines = [f"  {100 * share:5.1f} %  {names[number]}" for share, number in zip(shares, classes)]
                print(readable(str(path)), *lines, sep="\n")
    return int(failed)


# ---- Drawn flowers ---------------------------------------------------------------------------------------

DEMO = dict(data_dir="data/demo_flowers", img_size=(96, 96), views=4, eval_splits=("val",), weights="none",
            epochs_stage1=6, epochs_stage2=3, run_name="demo")


def start_without_pretraining(model, paths, cfg):
    """Make random weights say something: identity-like blocks, then BatchNorm statistics from images.

    Zero-initialised residual branches (Goyal et al., 2017) and a bias that keeps SiLU in its near-linear
    range let colour and shape through 26 random blocks, which would otherwise scramble them.
    """
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.train().momentum = None  # cumulative: the mean over all batches
        if isinstance(module, Conv2dNormActivation) and len(module) == 3:
            nn.init.ones_(module[1].bias)
        if isinstance(module, MBConv) and module.use_res_connect:
            nn.init.zeros_(module.block[-1][1].weight)
    chosen = torch.randperm(len(paths), generator=torch.Generator().manual_seed(cfg.seed))[:1024].tolist()
    work = partial(batch_of_views, views=0, frozen=None, cfg=cfg)
    for batch in progress([chosen[start:start + 64] for start in range(0, len(chosen), 64)], 64, "BatchNorm"):
        images, _ = work([(i, paths[i]) for i in batch])
        with torch.no_grad():
            images = torch.from_numpy(images)[:, 0].to(cfg.device).permute(0, 3, 1, 2)
            model.features(make_transforms(cfg).normalize(images))
    model.eval()


def draw_demo_images(folder):
    """Draw 12 pictures of each of 102 species, 8 to train on and 4 to test, as own images would lie there."""
    if folder.is_dir() and any(folder.iterdir()) and not (folder / "train" / "species 001").is_dir():
        raise UserError(f"{folder} holds other files than the demo's: leave out --data-dir or set another")
    try:
        for species in progress(range(102), 12, "drawing"):
            for number in range(12):
                split = folder / ("train" if number < 8 else "val")
                path = split / f"species {species + 1:03d}" / f"{number}.png"
                path.parent.mkdir(parents=True, exist_ok=True)
                draw_flower(species, number).save(path)
    except OSError as error:
        raise UserError(f"cannot draw into {folder} ({one_line(error)}): set --data-dir to another") from None


def draw_flower(species, number, size=96):
    """A PIL image of `size` pixels: the species decides the flower's look, the number its pose and light."""
    look, pose = np.random.default_rng(species), np.random.default_rng((species, number))
    petals, depth, core = look.choice([4, 5, 6, 8, 12]), look.uniform(0.3, 0.75), look.uniform(0.15, 0.35)
    hue = 0.52 + 0.64 * (species * 0.618034 % 1)  # golden steps, leaving out green, which would not stand out
    petal, throat, disc, ground = hsv_to_rgb([
        (hue % 1, look.uniform(0.3, 1), look.uniform(0.75, 1)), (look.uniform(), 0.7, look.uniform(0.4, 1)),
        (0.13, 0.9, look.uniform(0.25, 1)), (look.uniform(0.15, 0.45), 0.6, look.uniform(0.15, 0.45))])
    # Of each pixel, the distance from the flower's middle and the angle around it.
    y, x = np.mgrid[:size, :size][..., None] / size - pose.uniform(0.42, 0.58, (2, 1, 1, 1))
    distance = np.hypot(x, y) / pose.uniform(0.34, 0.45)
    angle = np.arctan2(y, x) + pose.uniform(0, 2 * math.pi)
    wave = np.abs(np.cos(petals / 2 * angle))  # 1 along the middle of a petal, 0 between two
    reach = distance / (1 - depth + depth * wave)  # 1 at the petals' edge
    petal = petal + (throat - petal) * np.clip(1.1 - 1.4 * reach, 0, 1)
    petal = petal * (0.75 + 0.25 * wave) * np.where(reach > 0.94, 0.7, 1)  # folds and a dark rim
    leaves = Image.fromarray(pose.integers(60, 200, (7, 7, 3), np.uint8)).resize((size, size))
    picture = np.where(reach < 1, petal, ground * np.array(leaves) / 128)
    seeds = disc * (0.8 + 0.3 * np.sin(70 * distance) * np.sin(3 * petals * angle))
    light = pose.uniform(0.9, 1.1) - 0.3 * (x + y)  # from the upper left
    picture = np.where(distance < core, seeds, picture) * light
    return Image.fromarray((255 * picture).clip(0, 255).astype(np.uint8))


# ---- Command line ----------------------------------------------------------------------------------------


class UserError(Exception):
    """Bad input; the message says in one line what is wrong and what to do."""


class RunError(Exception):
    """A run that cannot go on; the message says in one line why and what is safe."""


CHECKS = (  # constants, their type, what must hold, and that in words
    ("data_dir device out_dir", str, lambda v: v, "a text"),
    ("weights", (str, type(None)), lambda v: v != "", "IMAGENET1K_V1, the path of a state dict, or none"),
    ("run_name", str, lambda v: v not in ("", "..") and Path(v).name == v, "a file name without folders"),
    ("head_init", str, lambda v: v in ("lda", "random"), "lda or random"),
    ("img_size", tuple, lambda v: [type(n) for n in v] == [int, int] and 32 <= min(v) and max(v) <= 2048,
     "two sizes from 32 to 2048"),
    ("eval_splits", tuple, lambda v: sorted(v) in (["test"], ["test", "val"], ["val"]), "val, test or both"),
    ("num_workers", int, lambda v: -1 <= v <= 512, "from -1 to 512"),
    ("unfreeze_last_blocks", int, lambda v: 0 <= v <= 9, "from 0 to 9"),
    ("folds", int, lambda v: 2 <= v <= 100, "from 2 to 100"),
    ("epochs_stage1 epochs_stage2 seed", int, lambda v: 0 <= v < 2**63, "a whole number, 0 or more"),
    ("views batch_size", int, lambda v: 1 <= v < 2**31, "a whole number, 1 or more"),
    ("crop", (int, float), lambda v: 0 <= v <= 1, "from 0 to 1"),
    ("shrinkage layer_decay", (int, float), lambda v: 0 < v <= 1, "above 0, at most 1"),
    ("val_fraction", (int, float), lambda v: 0 < v < 1, "between 0 and 1"),
    ("lr_stage1 lr_stage2 blocks_lr_factor clip_norm", (int, float), lambda v: 0 < v < math.inf,
     "a number above 0"),
    ("skip_unreadable train_depthwise cross_fit refit_head amp", bool, lambda v: True, "True or False"),
)
CONSTANTS = {name: globals()[name.upper()] for names, *_ in CHECKS for name in names.split()}


def parse_command_line(argv):
    """The configuration as a namespace: every constant by its lower-case name, and the modes."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.error = lambda message: parser.exit(2, f"error: {readable(message)} (see --help)\n")  # one line
    for mode in ("--help", "--demo", "--fresh"):
        parser.add_argument(mode, action="store_true")
    parser.add_argument("--predict", nargs="+")
    parser.add_argument("--checkpoint")
    for kind, name in ((kind, name) for names, kind, *_ in CHECKS for name in names.split()):
        how = {"action": argparse.BooleanOptionalAction} if kind is bool else {
            "nargs": "+" if kind is tuple else None,
            "type": int if kind is int or name == "img_size" else float if kind == (int, float) else str}
        parser.add_argument("--" + name.replace("_", "-"), default=CONSTANTS[name], **how)
    if "--demo" in argv:
        parser.set_defaults(**DEMO)
    cfg = parser.parse_args(argv)
    if cfg.help:  # the Configuration section as it stands
        print(__doc__ + Path(__file__).read_text("utf-8").split("# ----")[1].lstrip(" -"))
        parser.exit()
    for names, kind, valid, words in CHECKS:
        for name in names.split():
            value = getattr(cfg, name)
            value = tuple(value) if isinstance(value, list) else value
            setattr(cfg, name, value)
            if not isinstance(value, kind) or isinstance(value, bool) != (kind is bool) or not valid(value):
                parser.error(f"{name.upper()} must be {words}, not {value!r}")
    for name in ("data_dir", "out_dir", "weights", "checkpoint"):
        setattr(cfg, name, getattr(cfg, name) and os.path.expanduser(getattr(cfg, name)))
    cfg.predict = cfg.predict and [os.path.expanduser(name) for name in cfg.predict]
    if cfg.epochs_stage1 + cfg.epochs_stage2 == 0:
        parser.error("EPOCHS_STAGE1 and EPOCHS_STAGE2 must not both be 0")
    if cfg.checkpoint and not cfg.predict:
        parser.error("--checkpoint goes with --predict")
    return cfg


def choose_device(cfg):
    """Put a torch.device that works in place of DEVICE, and choose the precision."""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # before CUDA starts: the same bits each time
    names = [cfg.device] if cfg.device != "auto" else [
        *["cuda"] * torch.cuda.is_available(), *["mps"] * torch.backends.mps.is_available(), "cpu"]
    for name in names:
        try:
            F.conv2d(*torch.ones(2, 1, 1, 1, 1, device=name)).item()
        except (RuntimeError, AssertionError, NotImplementedError) as error:
            if name == names[-1]:
                words = f"no device {name!r} here ({one_line(error)}): set --device to auto or cpu"
                raise UserError(words) from None
            print(f"device     going on without {name}, which does not work: {one_line(error)}")
        else:
            break
    cfg.device, processor = torch.device(name), torch.cpu.get_capabilities()
    torch.use_deterministic_algorithms(cfg.device.type == "cuda", warn_only=True)
    bfloat16 = processor.get("avx512_bf16") or processor.get("bf16")  # elsewhere it is slower than float32
    half = {"cuda": torch.float16, "cpu": torch.bfloat16 if bfloat16 else torch.float32}
    cfg.dtype = half.get(cfg.device.type, torch.float32) if cfg.amp else torch.float32


@contextmanager
def open_folder(cfg):
    """OUT_DIR, which can be written to and which no other run of this RUN_NAME uses meanwhile."""
    folder = run_file(cfg, "").parent
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with FileLock(folder / f".{cfg.run_name}.lock", timeout=0):
            for path in folder.glob(f"{glob.escape(cfg.run_name)}_*.tmp"):  # of a run that was killed
                path.unlink()
            run_file(cfg, "config.json.tmp").touch()
            run_file(cfg, "config.json.tmp").unlink()
            yield
    except Timeout:
        raise UserError(f"another run of {cfg.run_name} is going on in {folder}: wait for it, or set "
                        "--run-name") from None


def train_and_report(cfg):
    """The whole run: data, model, activations, both stages, reports."""
    socket.setdefaulttimeout(60)  # no download waits for ever
    print(f"device     {cfg.device}, {str(cfg.dtype).removeprefix('torch.')}", flush=True)
    if cfg.demo:
        print("demo       drawn flowers, no pretrained weights: a demonstration, no result")
        draw_demo_images(Path(cfg.data_dir))
    data, pretrained = find_images(cfg), load_pretrained(cfg.weights)
    model = build_model(len(data.class_names), pretrained, cfg.seed).to(cfg.device)
    if cfg.device.type == "cpu":
        model.to(memory_format=torch.channels_last)  # steps are a sixth faster; on a GPU, slower
    if pretrained is None:
        start_without_pretraining(model, data.splits["train"].paths, cfg)
    frozen, blocks = split_model(model, cfg.unfreeze_last_blocks)
    total, head, tail = (sum(p.numel() for p in part.parameters())
                         for part in (model, model.classifier, blocks))
    print(f"model      EfficientNet-B3, weights {cfg.weights}: {total:,} parameters, trained in stage 1 "
          f"{head:,}, in stage 2 {head + tail:,}", flush=True)
    common = [source_of(make_transforms), cfg.img_size, cfg.crop, digest(frozen.state_dict()), str(cfg.dtype),
              cfg.device.type]
    inputs, views_of_train, fast = {}, (cfg.views, cfg.seed), Frozen(frozen, cfg)
    one = fast(torch.zeros(1, 1, *cfg.img_size, 3, dtype=torch.uint8))
    for name, split in data.splits.items():
        views, drawn_by = (cfg.views, views_of_train) if name == "train" else (0, None)
        batches = (batch for batch, _ in frozen_pass(fast, split.paths, views, cfg))
        shape = (len(split.paths), max(1, views), *one.shape[2:])
        activations = compute_once(name, [*common, split.digest, drawn_by], shape, batches, cfg)
        inputs[name] = Inputs(activations, split.labels)
    depends = [*common, data.splits["train"].digest, views_of_train, digest(blocks.state_dict())]
    run = Run(model, data, depends, cfg)
    train(model, blocks, inputs["train"], inputs["val"], run, cfg)
    report(model, blocks, inputs, data, run, cfg)


SIGNALS = []  # an exception that a handler raises within a destructor is lost: `progress` looks here too


def stop(number, _frame):
    """Signal handler: an exception, so that workers are ended on the way out; a second signal kills."""
    SIGNALS.append(number)
    signal.signal(number, signal.SIG_DFL)
    raise KeyboardInterrupt(number)


def main(argv=()):
    """The program; returns its exit code: 2 for bad input, 1 for a failed run, 128 + number for a signal."""
    SIGNALS.clear()  # of an earlier call
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):  # a terminal without the letters of a name shows their codes
            stream.reconfigure(errors="backslashreplace")
    cfg = parse_command_line(list(argv))
    try:
        choose_device(cfg)
        if cfg.predict:
            code = predict(cfg)
        else:
            with open_folder(cfg):
                code = train_and_report(cfg)
        sys.stdout.flush()
        return code or 0
    except (UserError, RunError) as error:
        code, message = 2 if isinstance(error, UserError) else 1, f"error: {readable(str(error))}"
    except BrokenPipeError:  # the reader, say `head`, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 128 + signal.SIGPIPE
    except OSError as error:
        if error.filename is None:
            raise
        code, message = 2, f"error: cannot use {error.filename} ({error.strerror}): name another"
    except (MemoryError, RuntimeError) as error:
        # Only CUDA has an error of its own; a worker that the system has killed is out of memory too.
        if not isinstance(error, (MemoryError, torch.OutOfMemoryError)) and not re.search(
                r"out of memory|you tried to allocate|DataLoader worker \(pid", str(error)):
            raise
        code = 1
        message = f"error: out of memory: lower BATCH_SIZE, NUM_WORKERS or IMG_SIZE ({one_line(error)})"
    except KeyboardInterrupt as error:
        code, message = 128 + (error.args[0] if error.args else signal.SIGINT), "stopped"
        if not cfg.predict:
            message += ": finished epochs are saved; the same command without --fresh continues after them"
    print(message, file=sys.stderr)
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


def progress(batches, size, what):
    """Pass batches on: a bar that counts images where somebody watches, else one line after a long phase."""
    start = time.monotonic()
    with tqdm(batches, what, disable=None, leave=False, unit=" images", unit_scale=size) as bar:
        for batch in bar:
            if SIGNALS:
                raise KeyboardInterrupt(SIGNALS[0])
            yield batch
    seconds = time.monotonic() - start
    if bar.disable and seconds > 5:
        print(f"{what}: {size * len(batches):,} images in {seconds:.0f} s", file=sys.stderr, flush=True)


def digest(value):
    """SHA-256, in hexadecimal, of tensors and plain values in lists and dicts of any depth."""
    if isinstance(value, dict):
        value = list(value.items())
    if isinstance(value, (list, tuple)):
        value = [digest(part) for part in value]
    if isinstance(value, torch.Tensor):
        return hashlib.sha256(value.cpu().contiguous().numpy()).hexdigest()
    return hashlib.sha256(repr(value).encode(errors="backslashreplace")).hexdigest()


def mix_seed(*parts):
    """One seed from several numbers and words: no two lists of parts share a random stream."""
    return int(digest(parts)[:15], 16)


def source_of(function):
    """The source of a function or, where there is none, its bytecode."""
    try:
        return inspect.getsource(function)
    except OSError:
        return repr((function.__code__.co_code, function.__code__.co_consts))


if __name__ == "__main__":
    if AS_SCRIPT:
        signal.signal(signal.SIGINT, stop)
        signal.signal(signal.SIGTERM, stop)
    if code := main(sys.argv[1:] if "__file__" in globals() else ()):  # a notebook's arguments are its own
        sys.exit(code)
