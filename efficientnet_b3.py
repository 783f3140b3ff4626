"""Classify the 102 flower species of Oxford Flowers-102 with EfficientNet-B3, by two-stage transfer learning.

    python efficientnet_b3.py                        train (or continue), evaluate, report
    python efficientnet_b3.py --epochs-stage2 10     any constant, by its name in lower case with dashes
    python efficientnet_b3.py --fresh                start anew; the files of an earlier run are moved aside
    python efficientnet_b3.py --demo                 the whole run on drawn flowers: no download, a minute or two
    python efficientnet_b3.py --predict rose.jpg d/  the five likeliest names for each image

Stage 1 trains the classifier head on a frozen backbone, stage 2 fine-tunes the last feature blocks as well, and the
report compares the two. The rooms of this file, by which code_of tells the edits that decide results:

    Configuration, Data, Model     all constants; how an image is augmented; EfficientNet-B3, cut in two
    Frozen activations             the outputs of the frozen part, computed once
    Heads, Training                what learns, and how: both stages and the refit
    Decoding, Closed form          what these need: an image file as RGB; discriminant analysis
    Fast passes, Activation files  inference in worker processes; its results on the disk
    Fingerprints, Files of a run   which code decides results; checkpoints, and how a run goes on
    Images and weights, Reports    what lies on the disk; figures, and frozen against fine-tuned; then Prediction,
                                   Drawn flowers, Whole run (train_and_report), Command line, Helpers
"""

import linecache
import os
import sys

os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # threads that spin at barriers stall on a busy machine
# The code of this file is part of a run (see code_of). It is read before the libraries load, as it may be edited
# meanwhile, and by linecache, which knows the cells of a notebook too.
own_path = sys._getframe().f_code.co_filename
linecache.checkcache(own_path)
source = "".join(linecache.getlines(own_path)) or sys.exit("error: start the program as a file or a notebook's cell")

import argparse
import ast
import copy
import ctypes
import errno
import hashlib
import io
import json
import math
import multiprocessing
import random
import re
import shutil
import signal
import socket
import threading
import time
import warnings
from collections import namedtuple
from contextlib import contextmanager, suppress
from functools import cache, cached_property, partial
from itertools import count
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
from sklearn.metrics import classification_report, confusion_matrix, f1_score
from torch import nn
from torch.optim.lr_scheduler import PolynomialLR
from torch.utils.data import DataLoader
from torchvision.datasets import Flowers102
from torchvision.models.efficientnet import EfficientNet_B3_Weights, MBConv, efficientnet_b3
from torchvision.ops import Conv2dNormActivation, StochasticDepth
from torchvision.transforms import v2
from tqdm import tqdm

# ---- Configuration ---------------------------------------------------------------------------------------------------

# Data
DATA_DIR = "data"  # Flowers-102 (downloaded into data or an empty folder), or own images, one folder per class
IMG_SIZE = (300, 300)  # height and width in pixels
CROP = 0.0  # training: random crops of at least this share of an image, evaluation: its centre; 0: whole images
VIEWS = 5  # augmented views of each training image in all, which the epochs take in turn
TRAIN_SPLITS = ("train",)  # what trains; train val: the final model, from all labelled images, nothing held out
EVAL_SPLITS = ("val", "test")  # splits that the report covers, where there are images
VAL_FRACTION = 0.2  # of own images without a folder val, the share of each class drawn for validation
SKIP_UNREADABLE = False  # go on without images that cannot be read
NUM_WORKERS = -1  # processes that work on images; -1: one per core, at most 16; 0: none but the main one

# Model
WEIGHTS = "IMAGENET1K_V1"  # pretrained weights: IMAGENET1K_V1, the path of a state dict, or none
UNFREEZE_LAST_BLOCKS = 2  # of the 9 feature blocks, how many stage 2 trains; 0: the head alone
HEAD_INIT = "lda"  # the head's start: lda, linear discriminant analysis in closed form, or random
SHRINKAGE = 0.3  # of lda's covariance matrix: near 0 as measured, 1 a multiple of the identity
FOLDS = 5  # parts of the training images for cross-fitting and for the temperature
BALANCE = False  # each class counts alike in all losses that train, however many images it has

# Stage 1: the head on the frozen backbone
EPOCHS_STAGE1 = 8  # passes over the training images
LR_STAGE1 = 1e-3  # learning rate of the first epoch; it falls linearly towards 0

# Stage 2: fine-tuning
EPOCHS_STAGE2 = 5  # passes over the training images
LR_STAGE2 = 1e-4  # learning rate of the head in the stage's first epoch; it falls linearly too
BLOCKS_LR_FACTOR = 10.0  # the last block's learning rate is this times LR_STAGE2
LAYER_DECAY = 1.0  # each earlier block's learning rate is this times that of the block after it
TRAIN_DEPTHWISE = True  # off: unfrozen blocks keep their depthwise kernels, whose gradients are slow on a CPU
CROSS_FIT = True  # blocks learn from, and training figures tell of, a head that has not seen the image
REFIT_HEAD = True  # after each epoch of stage 2 the model gets the mean of its head and of lda's
REFITTED_EPOCHS = 5  # in so many first epochs of stage 2, training goes on from that mean too

# Run
BATCH_SIZE = 32  # training images per step
SEED = 0  # of all that is drawn, validation images of VAL_FRACTION included: the same seed gives the same run
DEVICE = "auto"  # auto, cpu, cuda, cuda:1, mps, ...
AMP = True  # half precision: float16 on CUDA, bfloat16 on processors that have it
RUN_NAME = "effb3_flowers102_finetune"  # first part of the names of all files of the run
OUT_DIR = "runs"  # folder of those files
KEEP_GB = 5.0  # beyond this, activations that no run has used for longest are removed

# The options: numbers, words and lists set above, no other names of a notebook; plain Python, even from NumPy.
CONSTANTS = {name.lower(): json.loads(json.dumps(globals()[name], default=lambda value: value.tolist()))
             for name in re.findall(r"^([A-Z_0-9]+)\b.*?=", source.partition("\nCONSTANTS")[0], re.MULTILINE)
             if isinstance(globals().get(name), (bool, int, float, str, tuple, list, np.generic, np.ndarray))}

# ---- Data ------------------------------------------------------------------------------------------------------------

Transforms = namedtuple("Transforms", "resize augment centre normalize")


def make_transforms(cfg):
    """PIL image to one of IMG_SIZE: `resize`, then `augment` or, for the plain view, `centre`; batches: `normalize`."""
    # With crops, the shorter side has 320 pixels, of which validation sees the middle 300: torchvision's preset for B3.
    resize = v2.Resize(max(cfg.img_size) * 16 // 15 if cfg.crop else cfg.img_size)
    crop = [v2.RandomResizedCrop(cfg.img_size, scale=(cfg.crop, 1))] if cfg.crop else []
    augment = v2.Compose([*crop, v2.RandomHorizontalFlip(), v2.RandomRotation(15),
                          v2.ColorJitter(brightness=0.2, contrast=0.2, saturation=0.2, hue=0.2)])
    normalize = v2.Compose([v2.ToDtype(torch.float32, scale=True),
                            v2.Normalize(mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225))])
    return Transforms(resize, augment, v2.CenterCrop(cfg.img_size), normalize)


def load_views(path, index, num_views, cfg):
    """A file, decoded once: view 0, the image as in validation, and augmented ones: uint8 [1 + num_views, H, W, 3].

    View v of image i is a function of (SEED, v, i) alone: the same in any process, order and continued run.
    """
    transforms = make_transforms(cfg)
    image = transforms.resize(load_image(path))
    images = [transforms.centre(image)]
    for view in range(1, num_views + 1):
        seed = mix_seed(cfg.seed, "view", view, index)
        torch.default_generator.manual_seed(seed)
        random.seed(seed)  # the other two serve augmentations that somebody adds
        np.random.seed(seed % 2**32)
        images.append(transforms.augment(image))
    return np.stack(images)


def mix_seed(*parts):
    """One seed from several numbers and words: no two lists of parts share a random stream."""
    return int(digest(parts)[:15], 16)


# ---- Model -----------------------------------------------------------------------------------------------------------


def build_model(num_classes, state=None, seed=0):
    """torchvision's EfficientNet-B3 in eval mode; `state`: weights, perhaps without a classifier."""
    torch.manual_seed(seed)
    model = efficientnet_b3(num_classes=num_classes).eval().requires_grad_(False)
    for module in model.modules():
        if isinstance(module, nn.AdaptiveAvgPool2d):
            module.forward = average_pool
    if state is not None:
        model.load_state_dict({**model.classifier.state_dict(prefix="classifier."), **state})
    return model


def split_model(model, num_blocks):
    """The model's own layers up to the pooled features [B, 1536] in two sequences: the frozen part, the last blocks."""
    layers = nn.Sequential(*model.features, model.avgpool, nn.Flatten())
    cut = len(model.features) - num_blocks if num_blocks else len(layers)
    return layers[:cut], layers[cut:]


# ---- Frozen activations ----------------------------------------------------------------------------------------------
#
# A frozen network is a fixed function: its output for an image need be computed once, not in every epoch.
#
#     image file --once--> decoded --once per view--> augmented --> frozen part --> activations, a file
#     activations (232x10x10, 46 kB in half precision) --in every step--> unfrozen blocks --> head --> loss
#
# With 5 views, 13 epochs and a last evaluation cost 7,140 passes through the frozen part instead of 27,540, and each of
# these is faster ("Fast passes" below). The next run, with other rates or epochs or another name, computes none.

Activations = namedtuple("Activations", "tensor labels fingerprint")  # [N, V, ...], view 0 plain; int64 [N]; a hash


def frozen_activations(table, frozen_part, num_views, cfg):
    """What FrozenLayers give for each image of a table and for `num_views` augmented views of it."""
    code = code_of(without=DOWNSTREAM)
    unused = WITHOUT_EFFECT if num_views else {"seed", *WITHOUT_EFFECT}  # no draw decides a plain image
    # Of the constants, those count that this code reads: .name or "name" of whatever object, or NAME.
    words = set(re.findall(r"(?<=[.'\"])\w+|[A-Z_0-9]+", " ".join(code.values())))
    constants = {name: getattr(cfg, name) for name in CONSTANTS if words & {name, name.upper()} and name not in unused}
    fingerprint = digest([code, constants, num_views, table.sha256.tolist(), frozen_part.digest])
    compute = lambda done: outputs_of_files(frozen_part, list(enumerate(table.path))[done:], num_views, cfg)
    tensor = compute_once(fingerprint, len(table), compute, cfg)
    return Activations(tensor, torch.tensor(table.label.tolist()), fingerprint)


def pooled_features(activations, blocks, cfg):
    """The pooled features [N, V, D] that the last blocks, as they are now, make of activations."""
    layers, tensor = FrozenLayers(blocks, cfg), activations.tensor
    fingerprint = digest([activations.fingerprint, layers.digest])
    compute = lambda done: map(layers, progress(tensor[done:].split(max(1, 512 // tensor.shape[1])), "last blocks"))
    return Activations(compute_once(fingerprint, len(tensor), compute, cfg), activations.labels, fingerprint)


# ---- Heads -----------------------------------------------------------------------------------------------------------
#
# Ten images per class are few: a head soon knows its training images by heart, and its loss on them says nothing of
# other images. So FOLDS + 1 heads are trained side by side: head k never sees the images of fold k, the last one sees
# all and goes into the model. The outputs of heads for images that they have not seen set the temperature, and the
# unfrozen blocks learn from them (cross-fitting, Chernozhukov et al., 2018). In stage 1 they resemble validation.


class Heads(nn.Module):
    """FOLDS + 1 linear heads on the same features float32 [B, D], all of which start as `linear`."""

    def __init__(self, linear, labels, cfg):
        super().__init__()
        self.cfg = cfg
        self.labels = labels.to(cfg.device)
        self.unseen_by = deal_folds(labels, cfg).to(cfg.device)  # for each image, the head that does not see it
        # For each image, the head that teaches the blocks.
        self.teacher = self.unseen_by if cfg.cross_fit else torch.full_like(self.labels, cfg.folds)
        self.targets = self.labels.repeat(cfg.folds + 1, 1)  # [heads, N]
        for head in range(cfg.folds):
            self.targets[head, self.unseen_by == head] = -100  # cross_entropy ignores these; the last head sees all
        counts = self.labels.bincount()
        equal = torch.ones(len(counts), device=cfg.device)
        self.class_weight = len(labels) / len(counts) / counts if cfg.balance else equal
        self.weight = nn.Parameter(linear.weight.detach().repeat(cfg.folds + 1, 1, 1))
        self.bias = nn.Parameter(linear.bias.detach().repeat(cfg.folds + 1, 1))
        # Bound of the scale of a closed form: 1, and after epoch 0 the scale found there.
        self.register_buffer("max_log_scale", torch.tensor(0.0))

    def logits(self, features, head_numbers):
        """Logits [B, classes] where head number head_numbers[i] classifies image i."""
        # Gradients go to the features alone: else a head would learn from images that it must not see.
        weight, bias = self.weight.detach(), self.bias.detach()
        logits = torch.einsum("bd,kcd->kbc", features.to(weight), weight) + bias[:, None]
        return logits[head_numbers, torch.arange(len(features))]

    def loss(self, features, indices):
        """The sum of two losses: that of each image's teacher, for the blocks; each head's own, on what it may see."""
        cross_entropy = partial(F.cross_entropy, weight=self.class_weight, reduction="sum")
        for_blocks = cross_entropy(self.logits(features, self.teacher[indices]), self.labels[indices])
        logits = torch.einsum("bd,kcd->kbc", features.detach(), self.weight) + self.bias[:, None]
        for_heads = cross_entropy(logits.flatten(0, 1), self.targets[:, indices].flatten())
        return (for_blocks + for_heads) / len(indices)

    @torch.no_grad()
    def fit_closed_form(self, features):
        """Set each head by discriminant analysis of features [N, V, D] ("Closed form" below), all to one scale.

        The scale minimises the loss on left-out images (temperature scaling: Guo et al., 2017), up to epoch 0's, or 1
        without one: blocks that are fine-tuned have seen those images, and may get all of them right.
        """
        weight, bias = discriminants(features, self.labels, self.unseen_by, self.class_weight, self.cfg)
        self.weight.copy_(weight)
        self.bias.copy_(bias)
        logits, left_out = self.logits(features[:, 0], self.unseen_by), self.unseen_by < self.cfg.folds
        smoothing = 0.0
        if not left_out.any():  # all heads have seen all images, which any confidence fits: 90 % at most, then
            left_out, smoothing = ~left_out, 0.1
        loss = lambda log_scale: F.cross_entropy(logits[left_out] * math.exp(log_scale), self.labels[left_out],
                                                 self.class_weight, label_smoothing=smoothing).item()
        fit = minimize_scalar(loss, bounds=(-10, self.max_log_scale.item()), method="bounded")
        self.max_log_scale.fill_(fit.x)  # a refit fits a copy, so that epoch 0's stays
        for parameter in self.parameters():
            parameter.mul_(math.exp(fit.x))

    @torch.no_grad()
    def refit(self, features):
        """New heads: the mean of these and of ones in closed form, for features that have changed."""
        mean, fitted = copy.deepcopy(self), copy.deepcopy(self)
        fitted.fit_closed_form(features)
        for parameter, other in zip(mean.parameters(), fitted.parameters()):
            parameter.lerp_(other, 0.5)
        return mean


# ---- Training --------------------------------------------------------------------------------------------------------


def train(model, blocks, activations, run, cfg):
    """Train both stages, from where `run` (see take_up_run) stands; `blocks` are the model's last."""
    heads = Heads(model.classifier[1], activations["train"].labels, cfg)
    rows = len(run["history"])
    if rows:
        heads.load_state_dict(run["trainer"]["heads"])

    # Stage 1. The last blocks stand still too: their outputs are computed once, and the heads learn from them.
    if rows <= cfg.epochs_stage1:
        start = time.perf_counter()
        no_blocks = nn.Sequential()
        features = {split: pooled_features(part, blocks, cfg) for split, part in activations.items()}
        if not rows:
            if cfg.head_init == "lda":
                heads.fit_closed_form(features["train"].tensor)
            row = {"stage": 1, "epoch": 0, "lr_head": 0.0, "lr_blocks": 0.0}
            end_epoch(row, start, features["train"].tensor, heads, model, no_blocks, {"heads": heads}, features, run,
                      cfg)
        train_stage(1, range(1, cfg.epochs_stage1 + 1), cfg.lr_stage1, model, no_blocks, heads, features, run, cfg)

    # Stage 2. The last blocks learn as well.
    epochs = range(cfg.epochs_stage1 + 1, cfg.epochs_stage1 + cfg.epochs_stage2 + 1)
    train_stage(2, epochs, cfg.lr_stage2, model, blocks, heads, activations, run, cfg)


def train_stage(stage, epochs, rate, model, blocks, heads, inputs, run, cfg):
    """Train the heads and `blocks` on `inputs`, Activations by split, in those `epochs` that the run has not had."""
    # Each stage has an optimizer of its own: Adam's averages of stage 1 mean nothing in stage 2.
    optimizer = torch.optim.Adam(parameter_groups(blocks, heads, rate, cfg))
    scheduler = PolynomialLR(optimizer, max(1, len(epochs)))  # of power 1: a straight line to 0
    # The usual first scale of 65,536 overflows at first, and stage 2 has no steps to lose.
    scaler = torch.amp.GradScaler(cfg.device.type, init_scale=1024, enabled=cfg.dtype == torch.float16)
    parts = {"heads": heads, "optimizer": optimizer, "scheduler": scheduler, "scaler": scaler}
    to_come = range(max(epochs.start, len(run["history"])), epochs.stop)  # row e of the history is epoch e
    if 0 < len(to_come) < len(epochs):  # the run was stopped in this stage
        for name, part in parts.items():
            part.load_state_dict(run["trainer"][name])
    for epoch in to_come:
        start, rates = time.perf_counter(), scheduler.get_last_lr()  # the heads', then the blocks'
        row = {"stage": stage, "epoch": epoch, "lr_head": rates[0], "lr_blocks": max(rates[1:], default=0.0)}
        # For figures and refit: the features seen during the epoch, and those of the plain images after it.
        seen = train_one_epoch(blocks, heads, inputs["train"].tensor, optimizer, scaler, epoch, cfg)
        features = torch.cat([plain_features(blocks, inputs["train"].tensor, cfg).to(seen), seen], 1)
        scheduler.step()
        model_heads = heads
        if cfg.refit_head and len(blocks):  # features change faster than a few steps of gradient can follow
            model_heads = heads.refit(features)
            if epoch < epochs.start + cfg.refitted_epochs:
                heads.load_state_dict(model_heads.state_dict())
        end_epoch(row, start, features, model_heads, model, blocks, parts, inputs, run, cfg)


def parameter_groups(blocks, heads, rate, cfg):
    """What learns, with its learning rate: the heads, then the blocks from the last to the first."""
    groups = [{"params": list(heads.parameters()), "lr": rate}]
    for block in reversed(blocks):
        if learning := trainable_parameters(block, cfg):  # pooling has none
            factor = cfg.blocks_lr_factor * cfg.layer_decay ** (len(groups) - 1)
            groups.append({"params": [p.requires_grad_() for p in learning], "lr": rate * factor})
    return groups


def trainable_parameters(blocks, cfg):
    """What stage 2 trains of blocks."""
    # Of all parameters, depthwise kernels alone are [channels, 1, height, width].
    return [p for p in blocks.parameters() if cfg.train_depthwise or p.shape[1:2] != (1,)]


def train_one_epoch(blocks, heads, activations, optimizer, scaler, epoch, cfg):
    """One pass over one view of each image, in random order; returns the features [N, 1, D] as they were seen."""
    # BatchNorm keeps its statistics, as a batch of 32 would estimate worse ones; what is random in training stays so.
    for module in blocks.modules():
        module.training = isinstance(module, StochasticDepth)
    torch.manual_seed(mix_seed(cfg.seed, "epoch", epoch))  # an epoch is the same after an interruption
    order, all_features = torch.randperm(len(activations)), []
    view = 1 + (epoch - 1) % (activations.shape[1] - 1)  # view 0 is the plain image
    for number, indices in enumerate(progress(order.split(cfg.batch_size), f"epoch {epoch}"), 1):
        with torch.autocast(cfg.device.type, cfg.dtype, enabled=cfg.dtype != torch.float32):
            features = blocks(activations[indices, view].to(cfg.device)).float()
        loss = heads.loss(features, indices.to(cfg.device))
        if not torch.isfinite(loss):
            raise UserError(f"the loss is {loss.item()} in epoch {epoch}, batch {number}: lower the learning rates, "
                            "set --no-amp, or look at initial weights and edited code; earlier epochs are saved")
        optimizer.zero_grad()
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        all_features.append(features.detach())
    return torch.cat(all_features)[order.argsort(), None]


def end_epoch(row, start, features, model_heads, model, blocks, parts, inputs, run, cfg):
    """Complete a row of the history, and save it with the model, which gets its head here, and all parts' states."""
    row |= scores("train", model_heads.logits(features[:, 0], model_heads.teacher), model_heads.labels)
    model.classifier[1].load_state_dict({"weight": model_heads.weight[-1], "bias": model_heads.bias[-1]})
    row |= {"val_loss": None, "val_acc": None}
    if "val" in inputs:
        row |= scores("val", predict_logits(blocks, model.classifier, inputs["val"].tensor, cfg), inputs["val"].labels)
    row["seconds"] = time.perf_counter() - start
    names = ("best", "frozen") if row["stage"] == 1 else ("best",)  # the frozen model is the best one of stage 1
    better = names if best_row([*run["history"], row]) is row else ()
    save_epoch(row, better, model, parts, run, cfg)


def scores(split, logits, labels):
    """Loss and accuracy on a split, for a row of the history."""
    return {f"{split}_loss": F.cross_entropy(logits, labels).item(),
            f"{split}_acc": (logits.argmax(1) == labels).float().mean().item()}


def best_row(history):
    """The row of highest validation accuracy, of equals of lowest loss, then the first; without validation the last."""
    if history[-1]["val_acc"] is None:
        return history[-1]
    return max(history, key=lambda row: (row["val_acc"], -row["val_loss"]))


# ---- Decoding --------------------------------------------------------------------------------------------------------


def load_image(path):
    """An image file as upright RGB, transparency on white; UserError names the file and why it is not read."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of large images, odd palettes and broken metadata
        with explained(path, Exception):  # of decoders alone, which raise all kinds: SyntaxError, struct.error, ...
            image = Image.open(path)
            image.load()
        with suppress(Exception):  # a broken EXIF block costs the orientation, not the image
            image = ImageOps.exif_transpose(image)
        if image.mode in ("I", "F"):
            raise UserError(f"{path}: its pixels have 32 bits (mode {image.mode}), and nothing says which are white")
        if image.mode.startswith("I;16"):
            image = Image.fromarray((np.asarray(image) // 256).astype(np.uint8))
        if image.has_transparency_data:
            image = image.convert("RGBA")
            image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
        return image.convert("RGB")


# ---- Closed form -----------------------------------------------------------------------------------------------------


def deal_folds(labels, cfg):
    """The head that leaves out each image, int64 [N]; for a class's only image FOLDS, the head of all images."""
    shuffled = pd.Series(labels.tolist()).sample(frac=1, random_state=mix_seed(cfg.seed, "folds") % 2**32)
    # + shuffled, the label: classes start at other folds, else the first folds would be the largest.
    fold = (shuffled.groupby(shuffled).cumcount() + shuffled).sort_index() % cfg.folds
    return torch.tensor(fold.tolist()).where(labels.bincount()[labels] > 1, cfg.folds)


def discriminants(features, labels, unseen_by, class_weight, cfg):
    """Linear discriminant analyses (Fisher, 1936), shrunk covariance: weights [heads, classes, D], biases.

    Head k leaves out the images that unseen_by (int64 [N]) calls k, head FOLDS none. The sums over these groups of
    features [N, V, D] are taken once, and add up to those of all heads. It makes what scikit-learn's
    LinearDiscriminantAnalysis(solver="lsqr", shrinkage=...) makes many times slower, with all features in memory.
    View 0, the plain image, counts as much as all others, as the model is for images that look like it: two points more
    in stage 1 than with augmented views alone.
    """
    (_, views, width), classes, num_heads = features.shape, len(class_weight), cfg.folds + 1
    view_weight = torch.tensor([max(1, views - 1)] + [1] * (views - 1), device=class_weight.device)[:, None]
    device = class_weight.device if class_weight.is_cuda else "cpu"  # others have no double precision
    sums_by_head = [torch.zeros(num_heads, *shape, device=device, dtype=torch.double)
                    for shape in ((classes,), (classes, width), (width, width))]
    for head in range(num_heads):
        for images in (unseen_by == head).nonzero()[:, 0].split(512):  # all features may be larger than the memory
            rows = features[images.cpu()].to(class_weight).flatten(0, 1)
            weight = ((F.one_hot(labels[images], classes) * class_weight)[:, None] * view_weight).flatten(0, 1)
            sums = weight.sum(0), weight.T @ rows, rows.T @ (rows * weight.sum(1, keepdim=True))
            for total, part in zip(sums_by_head, sums):
                total[head] += part.to(device)
    weights, biases = [], []
    for head in range(num_heads):
        left_out = [head] if head < cfg.folds else []
        counts, sums, products = (total.sum(0) - total[left_out].sum(0) for total in sums_by_head)
        means = sums / counts[:, None].clamp_min(1e-9)
        covariance = (products - means.T @ sums) / counts.sum()
        # With one image per class, the covariance is rounding noise: this is its floor.
        least = 1e-3 * products.diagonal().mean() / counts.sum() + 1e-9
        identity = covariance.diagonal().mean().clamp_min(least) * torch.eye(width, device=device)
        weights.append(torch.linalg.solve((1 - cfg.shrinkage) * covariance + cfg.shrinkage * identity, means.T).T)
        biases.append((counts / counts.sum()).log() - (weights[-1] * means).sum(1) / 2)
    return torch.stack(weights), torch.stack(biases)


# ---- Fast passes -----------------------------------------------------------------------------------------------------
#
# As the weights are fixed, a pass takes a sixth of the plain time, or two fifths where there is no half precision:
# BatchNorm folded into the convolutions, channels_last, few images at a time so that they stay in a processor's cache,
# and one process per core. A GPU takes many images at a time, which all processes prepare.


class FrozenLayers:
    """A copy of layers that stand still, in the form that is fastest for inference."""

    def __init__(self, layers, cfg):
        layers = copy.deepcopy(layers).eval()
        for module in layers.modules():
            if isinstance(module, Conv2dNormActivation):
                conv, norm, *_ = module
                module[0], module[1] = nn.utils.fusion.fuse_conv_bn_eval(conv, norm), nn.Identity()
        self.layers = layers.to(cfg.device, cfg.dtype, memory_format=torch.channels_last)
        self.device, self.dtype, self.normalize = cfg.device, cfg.dtype, make_transforms(cfg).normalize
        self.at_once = 4 if cfg.device.type == "cpu" else 128

    @cached_property
    def digest(self):
        """A hash of what decides the outputs."""
        own_classes = [code_of().get(type(part).__name__) for part in self.layers.modules()]  # in any room that counts
        return digest([str(self.layers), own_classes, self.layers.state_dict(), str(self.dtype), self.device.type])

    @torch.no_grad()
    def __call__(self, views):
        """Outputs [B, V, ...], on the CPU, of activations [B, V, C, h, w] or images uint8 [B, V, H, W, 3]."""
        batch, outputs, first = views.flatten(0, 1), [], 0
        while first < len(batch):
            size = self.at_once if views.dtype == torch.uint8 else 4 * self.at_once
            try:
                part = batch[first:first + size].to(self.device)
                if len(batch) > 1 and self.device.type != "cpu":  # padded: a GPU needs seconds for each new shape
                    part = torch.cat([part, part[:1].expand(size - len(part), *part.shape[1:])])
                if part.dtype == torch.uint8:
                    part = self.normalize(part.permute(0, 3, 1, 2))  # is channels_last
                outputs.append(self.layers(part.to(self.dtype))[:len(batch) - first].cpu())
                first += size
            except RuntimeError as error:
                if self.at_once == 1 or not is_out_of_memory(error):
                    raise
                self.at_once //= 2
        return torch.cat(outputs).clone(memory_format=torch.contiguous_format).unflatten(0, views.shape[:2])


def average_pool(maps):
    """The mean of each channel [B, C, 1, 1], as torchvision's pooling has it, which is slow on a CPU."""
    if maps.device.type != "cpu":
        return F.adaptive_avg_pool2d(maps, 1)
    if maps.requires_grad:
        return maps.sum((2, 3), keepdim=True) / maps[0, 0].numel()  # its gradient is channels_last too
    return F.avg_pool2d(maps, maps.shape[2:])


def plain_features(blocks, activations, cfg):
    """The pooled features [N, 1, D], on the CPU, that blocks make of view 0, the plain image, of activations."""
    return torch.cat(list(map(FrozenLayers(blocks, cfg), activations[:, :1].split(512))))


@torch.no_grad()
def predict_logits(blocks, classifier, activations, cfg):
    """Logits float32 [N, classes], on the CPU, of the plain images of activations [N, V, ...]."""
    return classifier(plain_features(blocks, activations, cfg)[:, 0].float().to(cfg.device)).cpu()


def outputs_of_files(layers, files, num_views, cfg):
    """Yield the outputs [B, V, ...] of FrozenLayers for image files, a list of (index, path), in order."""
    on_cpu, start = cfg.device.type == "cpu", time.monotonic()
    size = max(1, layers.at_once // (1 + num_views))
    work = partial(batch_of_views, num_views=num_views, layers=layers if on_cpu else None, cfg=cfg)
    for batch in progress(map_batches(work, files, cfg, size), "frozen part"):
        yield torch.from_numpy(batch).view(cfg.dtype) if on_cpu else layers(torch.from_numpy(batch))
    views = f" and {len(files) * num_views:,} views of them" if num_views else ""
    print(f"frozen     part: {len(files):,} images{views}, {time.monotonic() - start:.0f} s")


def batch_of_views(files, num_views, layers, cfg):
    """Views of files, (index, path), as uint8 [B, V, H, W, 3], or the bytes of what `layers` make of them."""
    batch = np.stack([load_views(path, index, num_views, cfg) for index, path in files])
    # NumPy arrays go through a pipe; tensors would need shared memory, which containers are short of.
    return layers(torch.from_numpy(batch)).view(torch.uint8).numpy() if layers else batch


def map_batches(work, items, cfg, size=None):
    """work(batch) for batches of `size` items of a list, or work(item) for all, in order, done by worker processes."""
    # Forked workers share network and lists. Elsewhere they start afresh, which takes as long as some images, and
    # cannot import the code of a notebook.
    fork, workers = sys.platform == "linux", min(cpu_count(), 16) if cfg.num_workers < 0 else cfg.num_workers
    workers = min(workers, len(items) // (2 if fork else 32)) if fork or "__file__" in globals() else 0
    # A list is a data set too, and collate_fn is called by a worker.
    loader = DataLoader(items, batch_size=size, collate_fn=work, num_workers=workers,
                        worker_init_fn=partial(start_worker, digest(source)),
                        multiprocessing_context="fork" if fork and workers else None)
    with explained("cannot start worker processes: set --num-workers 0", OSError, RuntimeError):
        return iter(loader)


def start_worker(expected, _number):
    """What each worker process does first."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a terminal's Ctrl-C is for the main process, which ends its workers
    # If that one is killed, a worker would wait for ever for somebody to read its results.
    parent = multiprocessing.parent_process()
    threading.Thread(target=lambda: (parent.join(), os._exit(1)), daemon=True).start()
    if digest(source) != expected:
        raise UserError("the program was edited while it ran, and new workers have the new code: start it again")


def keep_freed_memory():
    """Have Linux's malloc keep what a step frees for the next one: to get it anew costs a tenth of a float32 step."""
    if sys.platform == "linux" and hasattr(libc := ctypes.CDLL(None), "mallopt"):
        libc.mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD
        libc.mallopt(-3, 2**30)  # M_MMAP_THRESHOLD


# ---- Activation files ------------------------------------------------------------------------------------------------


def compute_once(fingerprint, rows, compute, cfg):
    """A memory-mapped tensor of so many rows, [N, V, ...], which `compute` yields in parts.

    They stand in OUT_DIR/activations/FINGERPRINT.bin, for all runs; a .json beside it holds their shape, and how many
    of them are surely on the disk: a pass that was killed goes on with compute(that many).
    """
    path = Path(cfg.out_dir, "activations", fingerprint[:32] + ".bin")
    note, lock = path.with_suffix(".json"), FileLock(path.with_suffix(".lock"))
    with wait_for(lock), open(path, "ab") as file:
        known = json.loads(note.read_text()) if note.exists() else {"rows": 0, "row_bytes": 0}
        if file.tell() < known["rows"] * known["row_bytes"]:  # somebody has cut it
            known["rows"] = 0
        # Written, not mapped: on a full disk a write raises an error, but a mapped file kills the process.
        file.truncate(known["rows"] * known["row_bytes"])
        noted, parts = time.monotonic(), compute(known["rows"]) if known["rows"] < rows else ()
        for part in parts:
            known |= {"shape": (rows, *part.shape[1:]), "row_bytes": part[0].nbytes}
            if (need := (rows - known["rows"]) * known["row_bytes"]) > shutil.disk_usage(path.parent).free:
                raise UserError(f"no room for {need / 1e9:.1f} GB of activations in {path.parent}: remove older ones "
                                "there, lower --views or --unfreeze-last-blocks, or set --out-dir")
            file.write(part.view(torch.uint8).numpy())
            known["rows"] += len(part)
            if time.monotonic() - noted > 5 or known["rows"] == rows:
                file.flush()
                os.fsync(file.fileno())  # before the note that says so
                write_file(note, json.dumps(known))
                noted = time.monotonic()
    os.utime(path)  # those used last are kept longest
    tensor = torch.from_file(str(path), shared=False, size=math.prod(known["shape"]), dtype=cfg.dtype)
    return tensor.view(known["shape"])


def remove_old_activations(in_use, cfg):
    """Remove what has not been used for longest beyond KEEP_GB, but nothing while another run is going on here."""
    for path in set(Path(cfg.out_dir).glob(".*.lock")) - {Path(cfg.out_dir, f".{cfg.run_name}.lock")}:
        try:
            with FileLock(path, timeout=0):
                pass
        except OSError:  # of which Timeout is one; the lock of another user cannot be tried
            return
    files = sorted(Path(cfg.out_dir, "activations").glob("[0-9a-f]" * 32 + ".bin"),
                   key=lambda path: (path.stem not in in_use, -path.stat().st_mtime))
    for path, total in zip(files, np.cumsum([path.stat().st_size for path in files])):
        if total > cfg.keep_gb * 1e9 and path.stem not in in_use:
            for part in (path.with_suffix(".json"), path, path.with_suffix(".lock")):
                part.unlink(missing_ok=True)


# ---- Fingerprints ----------------------------------------------------------------------------------------------------

# Rooms that decide no results, and those that decide results but no activations.
UNCOUNTED = {"Files of a run", "Images and weights", "Reports", "Prediction", "Drawn flowers", "Command line"}
DOWNSTREAM = frozenset(("Heads", "Closed form", "Training", "Whole run"))
# Constants that decide no result, or that count as what they lead to: images, weights, device, precision.
WITHOUT_EFFECT = {"data_dir", "val_fraction", "skip_unreadable", "eval_splits", "num_workers", "weights", "device",
                  "amp", "run_name", "out_dir", "keep_gb"}


def digest(value):
    """SHA-256, in hexadecimal, of tensors and plain values in lists and dicts of any depth."""
    if isinstance(value, torch.Tensor):
        return hashlib.sha256(value.cpu().flatten().view(torch.uint8).numpy()).hexdigest()  # NumPy has no bfloat16
    if isinstance(value, (dict, list, tuple)):
        value = [digest(part) for part in (value.items() if isinstance(value, dict) else value)]
    return hashlib.sha256(repr(value).encode(errors="backslashreplace")).hexdigest()


@cache
def code_of(without=frozenset()):
    """The definitions that decide results, as {name: text}; comments, docstrings and layout do not count.

    All rooms count but those named, so that what somebody adds to a room or in a new one counts unlisted.
    """
    without = without | UNCOUNTED
    definitions, imports, used = {}, {}, set()
    rooms = ["Start", *re.split(r"^# ---- (.+?) -+$", source, flags=re.MULTILINE)]
    for room, text in zip(rooms[::2], rooms[1::2]):
        for node in without_docstrings(ast.parse(text)).body if room not in without else ():
            if isinstance(node, (ast.Import, ast.ImportFrom)):
                for part in node.names:
                    module = getattr(node, "module", part.name)
                    own = Path(own_path).with_name(f"{module}.py")  # a module of the user's, beside this file
                    content = own.read_text("utf-8") if own.is_file() else ""
                    imports[part.asname or part.name] = f"{module} {part.name} {content}"
                continue
            used |= {part.id for part in ast.walk(node) if isinstance(part, ast.Name)}
            name = getattr(node, "name", re.split(" = |: ", ast.unparse(node))[0])
            if name not in map(str.upper, CONSTANTS):  # which count by their values
                definitions[name] = definitions.get(name, "") + ast.unparse(node)
    definitions |= {f"import {name}": what for name, what in imports.items() if name in used}
    return dict(sorted(definitions.items()))


def without_docstrings(tree):
    """A syntax tree without the docstrings of its modules, classes and functions."""
    for part in ast.walk(tree):
        if isinstance(part, (ast.Module, ast.FunctionDef, ast.ClassDef)) and ast.get_docstring(part) is not None:
            part.body = part.body[1:] or [ast.Pass()]
    return tree


# ---- Files of a run --------------------------------------------------------------------------------------------------

RUN_FILES = {"best.pth", "last.pth", "frozen.pth", "loss.png", "acc.png", "report.txt", "metrics.json", "history.csv",
             "predictions.csv", "config.json"} | {
    f"{figure}{split}.png" for split in ("", "_val", "_test")
    for figure in ("confusion_matrix", "mistakes", "frozen_vs_fine_tuned")}


def take_up_run(model, data, cfg):
    """The run as it stands in its last.pth, a dict; the files of a run that differs in anything are moved aside."""
    # Test images decide nothing.
    images = [table[["sha256", "label"]].values.tolist() for name, table in data.tables.items() if name != "test"]
    config = {name: getattr(cfg, name) for name in CONSTANTS if name not in WITHOUT_EFFECT} | {
        "folders": data.folders, "images": digest(images), "initial weights": digest(model.features.state_dict()),
        "device_type": cfg.device.type, "precision": str(cfg.dtype)} | {
        f"code of {name}": digest(text)[:16] for name, text in code_of().items()}
    # Beside its last model it holds the best one, and the best one of stage 1, each with the history up to it.
    run = {"model": {key: value.cpu().clone() for key, value in model.state_dict().items()}, "config": config,
           "class_names": data.class_names, "history": [], "trainer": None, "best": None, "frozen": None}
    last, differs = None, ""
    try:
        last = load_checkpoint(run_file(cfg, "last.pth"), wanted=run)
        if changed := sorted(key for key in config | last["config"] if config.get(key) != last["config"].get(key)):
            differs = f"changed: {listing(changed, 9)}"
    except UserError as error:
        differs = str(error)
    if not differs and not cfg.fresh:
        run = last | {"class_names": data.class_names}
        model.load_state_dict(run["model"])
        export_models(run, ("best", "frozen"), cfg)
        done, epochs = len(run["history"]) - 1, cfg.epochs_stage1 + cfg.epochs_stage2
        print(f"goes on    after epoch {done} of {epochs}" if done < epochs else f"finished   all {epochs} epochs")
    elif files := [file for file in (run_file(cfg, name) for name in RUN_FILES) if file.exists()]:
        old = next(path for number in count(1) if not (path := run_file(cfg, f"old{number}")).exists())
        old.mkdir()
        for file in files:
            file.rename(old / file.name)
        undo = f": to go on with it, undo that and move its files back to {old.parent}" if last and differs else ""
        print(f"new run    {differs or '--fresh'}; the earlier one is in {old}{undo}")
    return run


def save_epoch(row, better, model, parts, run, cfg):
    """Save the model, by the names in `better` too, and the states of the parts that train it; tell of the epoch."""
    run["history"].append(row)
    # What has not changed is the same tensor as before, and stands in the file once.
    run["model"] = {key: run["model"][key] if torch.equal(run["model"][key], value.cpu()) else value.cpu().clone()
                    for key, value in model.state_dict().items()}
    run["trainer"] = {name: part.state_dict() for name, part in parts.items()}
    run |= dict.fromkeys(better, {"model": run["model"], "history": run["history"].copy()})
    # The file holds all that the next epoch depends on, besides what is drawn from SEED and epoch.
    write_file(run_file(cfg, "last.pth"), run)
    export_models(run, better, cfg)
    print_epoch(run["history"])
    with suppress(PermissionError):  # of a table that is open elsewhere, on Windows; the report tries again
        write_history(run, cfg)


def export_models(run, names, cfg):
    """Write best.pth or frozen.pth from what last.pth holds."""
    for name in names:
        write_file(run_file(cfg, f"{name}.pth"), run[name] | {
            "config": run["config"], "class_names": run["class_names"],
            "best_accuracy": run[name]["history"][-1]["val_acc"]})


def print_table(history):
    """The head of the table, and the rows so far."""
    print("\nstage epoch lr head lr blocks train loss train acc val loss val acc   secs best")
    for end in range(1, len(history) + 1):
        print_epoch(history[:end])


def print_epoch(history):
    """The last row as a line of the table, with a star if none before was better."""
    row, star = history[-1], "    *" if best_row(history) is history[-1] else ""
    validation = "" if row["val_acc"] is None else "{val_loss:8.4f} {val_acc:7.2%}".format(**row)
    print("{stage:5} {epoch:>5} {lr_head:7.1e} {lr_blocks:9.1e} {train_loss:10.4f} {train_acc:9.2%} {validation:16} "
          "{seconds:6.1f}{star}".format(**row, validation=validation, star=star))


def load_checkpoint(path, wanted=(), of_config=()):
    """What torch.save has put into a file, tensors and plain Python; UserError says what it lacks of what is wanted."""
    if not os.path.isfile(path):
        raise UserError(f"there is no file {path}")
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)  # nothing else is safe to load
    except Exception as error:  # whatever a foreign or truncated file makes of the unpickler
        if isinstance(error, OSError) or is_out_of_memory(error):
            raise
        refused = re.search(r"GLOBAL (\S+)", str(error))
        reason = f"it holds {refused[1]}, which is not safe to load" if refused else one_line(error).split(".")[0]
        raise UserError(f"{path} is no file of tensors and plain values, or not a whole one ({reason})") from None
    parts = state if isinstance(state, dict) else {}
    if lacking := set(wanted) - set(parts) or set(of_config) - set(parts.get("config") or ()):
        raise UserError(f"{path} lacks {listing(sorted(lacking), 9)}: it is of another version or of another kind")
    return state


def run_file(cfg, suffix):
    """The path of a file of the run, say of "best.pth"."""
    return Path(cfg.out_dir) / f"{cfg.run_name}_{suffix}"


def write_file(path, content):
    """Write text, a figure or a checkpoint (plain Python and tensors), whole or not at all, whatever cuts it short."""
    buffer = io.BytesIO()  # torch.save would hide what a full disk says
    if isinstance(content, Figure):
        content.savefig(buffer, format="png", bbox_inches="tight")
    elif isinstance(content, dict):
        torch.save(content, buffer)
    else:
        buffer.write(content.encode("utf-8", "backslashreplace"))
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(path.name + ".tmp")
    try:
        with open(unfinished, "wb") as file:
            file.write(buffer.getbuffer())
            file.flush()
            os.fsync(file.fileno())
        os.replace(unfinished, path)
    finally:
        unfinished.unlink(missing_ok=True)


# ---- Images and weights ----------------------------------------------------------------------------------------------

Data = namedtuple("Data", "class_names folders tables")  # of classes; {split: table of path, label, sha256}

IMAGE_ENDINGS = {ending for ending, form in Image.registered_extensions().items() if form in Image.OPEN}
SPLIT_FOLDERS = {"train": "train", "training": "train", "val": "val", "valid": "val", "validation": "val",
                 "test": "test", "testing": "test"}


def find_images(cfg):
    """The images of the run, all of them checked; UserError says what is wrong with the folder."""
    folder, needed = Path(cfg.data_dir), {"train"} if "val" in cfg.train_splits else {"train", "val"}
    if not os.path.isdir(folder) and folder != Path(CONSTANTS["data_dir"]):  # which is downloaded
        raise UserError(f"{folder} is no folder: set --data-dir to one that exists")
    flowers = not folder.exists() or not visible(folder) or (folder / "flowers-102").is_dir()
    folders, class_names, table = (find_flowers102 if flowers else find_class_folders)(folder, cfg)
    table = check_images(table[table.split.isin(["train", "val", *cfg.eval_splits])], cfg)
    if "val" not in needed:
        table = table.assign(split=table.split.where(table.split == "test", "train"))
    tables = {split: part for split in ("train", "val", "test") if len(part := table[table.split == split])}
    if needed - tables.keys() or tables["train"].label.nunique() < len(folders):
        raise UserError(f"{folder} has too few readable images of a class or split: add some")
    if "val" in needed and not tables.keys() & set(cfg.eval_splits):
        raise UserError(f"{folder} has no images of EVAL_SPLITS ({' '.join(cfg.eval_splits)})")
    counts = ", ".join(f"{len(part):,} {name}" for name, part in tables.items())
    print(f"data       {folder}: {len(folders)} classes; images: {counts}")
    return Data(class_names, folders, tables)


def check_images(table, cfg):
    """The table with the hash of each file; those that cannot be read are an error or, if told so, left out."""
    # Files that were read before by the same code need not be decoded again.
    note = Path(cfg.out_dir, "activations", f"readable_{digest(code_of(without=DOWNSTREAM))[:16]}.json")
    known = set(json.loads(note.read_text()) if note.exists() else ())
    work = partial(attempt, partial(check_image, known=known))
    hashes, reasons = zip(*progress(map_batches(work, table.path.tolist(), cfg), "decoding"))
    write_file(note, json.dumps(sorted(known.union(hashes) - {""})))
    file = run_file(cfg, "unreadable.txt")
    file.unlink(missing_ok=True)
    if reasons := [reason.replace("\n", " ") for reason in reasons if reason]:
        write_file(file, "\n".join(reasons) + "\n")
        message = f"cannot read {len(reasons)} of {len(table)} images, named in {file}, such as {reasons[0]}"
        if not cfg.skip_unreadable or len(reasons) == len(table):
            raise UserError(f"{message}: mend or remove them, or set --skip-unreadable")
        print(f"data       {message}")
    table = table.assign(sha256=hashes)
    return table[table.sha256 != ""]


def check_image(path, known):
    """The SHA-256 of a file's bytes; UserError says why it cannot be read as an image."""
    with explained(path, OSError):
        sha256 = hashlib.sha256(path.read_bytes()).hexdigest()
    if sha256 not in known:
        load_image(path)
    return sha256


def find_class_folders(folder, cfg):
    """Class folders, titles and a table of own images: one folder per class, alone or within splits."""
    folders_in = lambda place: [path for path in visible(place) if path.is_dir()]
    # A folder of such a name is a split if it holds class folders, and else a class.
    splits = [path for path in folders_in(folder) if path.name.lower() in SPLIT_FOLDERS and folders_in(path)]
    places = {SPLIT_FOLDERS[path.name.lower()]: path for path in splits} or {"train": folder}
    if len(places) < len(splits):
        raise UserError(f"{folder} holds a split twice: {listing([path.name for path in splits], 9)}")
    classes = [(split, path) for split, place in places.items() for path in folders_in(place)]
    origin = {file: (split, path.name) for split, path in classes for file in files_below(path)}
    # Strings of pyarrow, where it is installed, cannot hold names that no encoding has.
    table = pd.DataFrame([(*origin[path], path) for path in only_images(list(files_below(folder)), origin, sys.stdout)],
                         columns=["split", "name", "path"], dtype=object)
    if len(names := sorted(set(table.name))) < 2 or "train" not in places:
        inside = listing([path.name for path in visible(folder)], 9)
        raise UserError(f"{folder} holds {inside}: expected two or more folders of images, one per class, alone or "
                        "within train/, val/ and test/")
    # A class without images in one split would never be learned, or never be measured.
    wanted = {(split, path.name) for split in places.keys() & {"train", "val", *cfg.eval_splits} for _, path in classes}
    if lacking := [places[split] / name for split, name in sorted(wanted - set(zip(table.split, table.name)))]:
        raise UserError(f"each class needs images in each split; missing or empty: {listing(lacking)}")
    if "val" not in places and "val" not in cfg.train_splits:
        print(f"data       no folder val: {cfg.val_fraction:.0%} of each class, at least one of two, are drawn by SEED")
        shuffled = table[table.split == "train"].sample(frac=1, random_state=mix_seed(cfg.seed, "validation") % 2**32)
        by_class = shuffled.groupby("name").name
        size = by_class.transform("size")
        lent = (cfg.val_fraction * size).round().clip(lower=1).clip(upper=size - 1)  # each class keeps one
        table.loc[shuffled.index[by_class.cumcount() < lent], "split"] = "val"
    file = folder / "cat_to_name.json"
    with explained(f"{file} is no JSON object of folders and names: mend or remove it", ValueError, TypeError):
        titles = dict(json.loads(file.read_text("utf-8-sig"))) if file.is_file() else {}
    return names, [str(titles.get(name, name)) for name in names], table.assign(label=table.name.map(names.index))


def files_below(folder):
    """All visible files in a folder and its folders."""
    for path in visible(folder):
        yield from files_below(path) if path.is_dir() else [path]


def visible(folder):
    """What a folder holds, sorted by name, without hidden files, links to a folder above, names of classes, OUT_DIR."""
    above = set(map(os.path.realpath, Path(os.path.abspath(folder), "inside").parents))
    return [path for path in sorted(folder.iterdir()) if not path.name.startswith(".")
            and path.name != "cat_to_name.json" and not os.path.exists(path / ".images")
            and not (path.is_dir() and os.path.realpath(path) in above)]


def only_images(files, wanted, stream):
    """Those of the `wanted` files that Pillow reads, by their endings; all others are counted and named aloud."""
    images = [path for path in files if path in wanted and path.suffix.lower() in IMAGE_ENDINGS and path.is_file()]
    if others := sorted(set(files) - set(images)):
        print(f"data       {len(others)} passed over, not readable here as images or outside of the class folders: "
              f"{listing(others)}", file=stream)
    return images


def find_flowers102(folder, cfg):
    """Class names, twice, and a table of Flowers-102 (Nilsback & Zisserman, 2008), which is downloaded if missing."""
    base, names = folder / "flowers-102", Flowers102.classes
    with explained(f"cannot download Flowers-102 into {base}: try again, put its files there by hand, set --data-dir, "
                   "or try --demo", OSError, RuntimeError):
        parts = {name: Flowers102(folder, name, download=True) for name in ("train", "val", *cfg.eval_splits)}
    table = pd.DataFrame([(name, path, label) for name, part in parts.items() for path, label in zip(
        part._image_files, part._labels)], columns=["split", "path", "label"])
    if missing := [path.name for path in table.path if not path.exists()]:
        raise UserError(f"{base} lacks {listing(missing)}, as if its extraction had been cut short: delete "
                        f"{base / 'jpg'}, and the same command extracts it again")
    return names, names, table


def load_pretrained(weights):
    """The backbone's state dict that WEIGHTS names, without a classifier, or None for random weights."""
    if weights == "none":
        return None
    if weights == "IMAGENET1K_V1":
        official = EfficientNet_B3_Weights.IMAGENET1K_V1
        file = Path(torch.hub.get_dir(), "checkpoints", os.path.basename(official.url))
        with explained(f"cannot download or load {file}: set --weights, or try --demo", Exception):
            state = official.get_state_dict(check_hash=True)
    else:
        state = load_checkpoint(weights)
    state = state if isinstance(state, dict) else {}
    for name in ("model", "state_dict"):  # under which checkpoints hold a state dict; its keys may have prefixes
        state = state[name] if isinstance(state.get(name), dict) else state
    features = build_model(2).features
    parts = {re.sub(r"^.*?features\.", "", str(key)): value for key, value in state.items() if "features." in str(key)}
    with explained(f"{weights} does not fit the features of torchvision's EfficientNet-B3", RuntimeError):
        features.load_state_dict(parts)
    return features.state_dict(prefix="features.")


def start_without_pretraining(model, paths, cfg):
    """Make random weights pass on what tells images apart: some of these give BatchNorm its statistics."""
    views = np.concatenate([load_views(path, 0, 0, cfg) for path in paths[::max(1, len(paths) // 32)]])
    for module in reversed(list(model.modules())):  # parts come before what they are part of
        if isinstance(module, nn.BatchNorm2d):
            module.train().momentum = None  # estimates the plain mean
            nn.init.constant_(module.weight, 0.1)  # SiLU bends larger signals, and so many layers of it blend all
        if isinstance(module, MBConv) and module.use_res_connect:
            nn.init.zeros_(module.block[-1][1].weight)  # adds nothing at first (Goyal et al., 2017)
    with torch.no_grad():
        model(make_transforms(cfg).normalize(torch.from_numpy(views).permute(0, 3, 1, 2)).to(cfg.device))
    model.eval()


# ---- Reports ---------------------------------------------------------------------------------------------------------

# Names may have letters of any script: these are the usual fonts for them, as far as they are here.
fonts = {"Arial Unicode MS", "Hiragino Sans", "Malgun Gothic", "Microsoft YaHei", "Noto Sans CJK JP", "Nirmala UI"}
fonts = ["DejaVu Sans", *sorted(fonts & set(font_manager.get_font_names()))]


def report(model, blocks, activations, data, run, cfg):
    """Evaluate the best model on the splits of `activations`, compare frozen with fine-tuned, print and write all."""
    names = np.array(data.class_names)
    # Figures show no bytes that are no letters.
    short = [(name if len(name) <= 36 else name[:35] + "…").encode(errors="replace").decode() for name in names]
    # Where no row of stage 2 is the best, the fine-tuned model is its last one: else frozen would face itself.
    tuned = next((state for state in (run["best"], run) if state["history"][-1]["stage"] == 2), None)
    texts, comparisons, predictions, metrics = [], [], [], {}
    for split, part in activations.items():
        by_model, ending = {}, f"_{split}.png" if len(activations) > 1 else ".png"
        for title, state in (("frozen", run["frozen"]), ("fine-tuned", tuned)):
            if state:
                model.load_state_dict(state["model"])
                features = pooled_features(part, blocks, cfg)  # which are known when the report is made again
                probabilities = predict_logits(nn.Sequential(), model.classifier, features.tensor, cfg).softmax(1)
                epoch = state["history"][-1]["epoch"]
                by_model[f"{title} (epoch {epoch})"] = probabilities
        best = list(by_model)[-1 if tuned is run["best"] else 0]
        of_best = by_model[best]
        model.load_state_dict(run["best"]["model"])  # its mistakes are shown
        metrics[split], text, f1 = compare(split, by_model, best, part.labels, short)
        comparisons.append(text)
        values, likeliest = (top.numpy() for top in of_best.topk(min(5, len(names))))
        confusion = confusion_matrix(part.labels, likeliest[:, 0], labels=range(len(names)))
        texts += describe(split, part.labels, likeliest[:, 0], confusion, names)
        predictions.append(pd.DataFrame({
            "file": [os.path.relpath(path, cfg.data_dir) for path in data.tables[split].path], "split": split,
            "true": names[part.labels],
            **{title.partition(" (")[0]: names[shares.argmax(1)] for title, shares in by_model.items()},
            "predicted": names[likeliest[:, 0]],
            "probability": [round(value, 4) for value in values[:, 0].tolist()],
            "top5": ["; ".join(five) for five in names[likeliest]]}, dtype=object))
        write_figures(model, data.tables[split], of_best, confusion, f1, short, split, ending, cfg)
    write_history(run, cfg, at_once=True)
    epoch = run["best"]["history"][-1]["epoch"]
    write_file(run_file(cfg, "metrics.json"), json.dumps({"best_epoch": epoch, "splits": metrics}, indent=1) + "\n")
    if activations:
        write_file(run_file(cfg, "predictions.csv"), pd.concat(predictions).to_csv(index=False))
        texts.append(f"best epoch: {epoch}")
        write_file(run_file(cfg, "report.txt"), "\n\n".join(comparisons + texts) + "\n")
        print("\n" + "\n\n".join(texts + comparisons))
    else:
        print("\nno report: no images are held out, and no test images evaluated")


def write_figures(model, table, of_best, confusion, f1, names, split, ending, cfg):
    """Confusion matrix, mistakes and, where there are two columns of F1, what fine-tuning changed."""
    title = f", {split} split: {np.trace(confusion)} of {len(table)} images right"
    with warnings.catch_warnings(), rc_context({"text.parse_math": False, "font.family": fonts}):
        warnings.simplefilter("ignore")  # of letters that no font has
        figure = plot_confusion_matrix(confusion, names, "Confusion matrix" + title)
        write_file(run_file(cfg, "confusion_matrix" + ending), figure)
        figure = plot_mistakes(model, table, of_best, names, "Worst mistakes" + title, cfg)
        write_file(run_file(cfg, "mistakes" + ending), figure)
        if f1.shape[1] == 2:
            means = ", ".join(f"{mean:.3f} {title}" for title, mean in f1.mean().items())
            figure = plot_changes(f1, f"F1 of classes, {split} split: mean {means}")
            write_file(run_file(cfg, "frozen_vs_fine_tuned" + ending), figure)


def describe(split, labels, predicted, confusion, names):
    """Of a split, the most confused pairs of classes and the classification report, as texts."""
    cells = [(confusion[t, p], t, p) for t, p in np.argwhere(confusion) if t != p]
    cells.sort(key=lambda cell: cell[0], reverse=True)
    pairs = [f"{cell} of {confusion[t].sum()} {names[t]} taken for {names[p]}" for cell, t, p in cells[:12]]
    present = np.unique(labels)
    each = classification_report(labels, predicted, labels=present, target_names=names[present], digits=3,
                                 zero_division=0)
    return "\n".join([f"{split}: most confused", *pairs]), f"{split}: each class\n{each.rstrip()}"


def measure(probabilities, labels):
    """Figures of a split from probabilities [N, classes] and labels [N]; a class without images counts in none."""
    (confidence, predicted), present = probabilities.max(1), labels.unique()
    right, likeliest = (predicted == labels).float(), probabilities.topk(min(5, probabilities.shape[1])).indices
    gaps, _ = np.histogram(confidence, 15, (0, 1), weights=confidence - right)  # Guo et al., 2017
    macro = classification_report(labels, predicted, labels=present, output_dict=True, zero_division=0)["macro avg"]
    return {"images": len(labels), "accuracy": right.mean().item(), "balanced_accuracy": macro["recall"],
            "macro_f1": macro["f1-score"],
            "top5_accuracy": (likeliest == labels[:, None]).any(1).float().mean().item(),
            "log_loss": F.nll_loss(probabilities.clamp_min(1e-12).log(), labels).item(),
            "expected_calibration_error": np.abs(gaps).sum().item() / len(labels)}


def compare(split, by_model, best, labels, names):
    """Frozen against fine-tuned, {title: probabilities}, on a split: figures, a text, and the F1 of each class."""
    figures = {title: measure(part, labels) for title, part in by_model.items()}
    metrics, table = figures[best].copy(), pd.DataFrame(figures)
    present = labels.unique()
    f1 = pd.DataFrame({title: f1_score(labels, part.argmax(1), labels=present, average=None, zero_division=0)
                       for title, part in by_model.items()}, index=[names[label] for label in present])
    lines = [f"{split}, {len(labels):,} images"]
    if len(by_model) == 2:
        before, after = (part.argmax(1) == labels for part in by_model.values())
        mended, spoilt = (after & ~before).sum().item(), (before & ~after).sum().item()
        p_value = binomtest(mended, mended + spoilt).pvalue if mended + spoilt else 1.0  # McNemar's test, exact
        table["difference"], change = table.iloc[:, 1] - table.iloc[:, 0], f1.iloc[:, 1] - f1.iloc[:, 0]
        lines.append(f"fine-tuning put {mended} right and spoilt {spoilt} (McNemar's exact test: p = {p_value:.2g})")
        if split == "val":
            lines.append("epochs are chosen on these images, which flatters the figures")
        for word, part in (("gained", change[change > 0].nlargest(5)), ("lost", change[change < 0].nsmallest(5))):
            lines.append(f"F1 {word} most:" + " none" * part.empty)
            lines += [f"  {gain:+.3f}  {name}" for name, gain in part.items()]
        metrics |= dict(zip(("frozen", "fine_tuned"), figures.values()))
        metrics |= {"mended": mended, "spoilt": spoilt, "mcnemar_p_value": p_value}
    lines.insert(1, table.drop("images").to_string(float_format="%.4f"))
    return metrics, "\n".join(lines), f1


def plot_changes(f1, title):
    """The up to 30 classes whose F1 changed most, each an arrow from the frozen to the fine-tuned value."""
    change = (f1.iloc[:, 1] - f1.iloc[:, 0]).to_numpy()
    chosen = np.argsort(-np.abs(change), kind="stable")[:min(30, np.count_nonzero(change))]
    chosen = chosen[np.argsort(change[chosen], kind="stable")]
    figure = Figure((7.5, 1.6 + 0.22 * max(4, len(chosen))), layout="constrained")
    axes, (gain, loss) = figure.subplots(), sns.color_palette("colorblind")[:2]
    for place, label in enumerate(chosen):
        style = {"arrowstyle": "-|>", "color": gain if change[label] > 0 else loss, "lw": 2, "shrinkA": 0, "shrinkB": 0}
        axes.annotate("", (f1.iloc[label, 1], place), (f1.iloc[label, 0], place), arrowprops=style)
    axes.set(xlim=(-0.02, 1.02), ylim=(-1, max(4, len(chosen))), xlabel="F1 of the class, from frozen to fine-tuned")
    axes.set_yticks(range(len(chosen)), f1.index[chosen], size=8)
    axes.set_title(f"{title}\n{(change > 0).sum()} classes gain, {(change < 0).sum()} lose", size=10)
    axes.grid(axis="x", alpha=0.3)
    return figure


def write_history(run, cfg, at_once=False):
    """Write config.json, history.csv, and, at most every ten seconds unless `at_once`, the curves."""
    table, file = pd.DataFrame(run["history"]), run_file(cfg, "acc.png")
    config = {name: getattr(cfg, name) for name in CONSTANTS} | run["config"]
    write_file(run_file(cfg, "config.json"), json.dumps(config, indent=1, default=str) + "\n")
    write_file(run_file(cfg, "history.csv"), table.to_csv(index=False))
    if file.exists() and time.time() - file.stat().st_mtime < 10 and not at_once:
        return
    blue, orange, green = sns.color_palette("colorblind")[:3]
    for key, label, scale in (("loss", "Cross-entropy loss", 1), ("acc", "Accuracy (%)", 100)):
        figure = Figure((7.5, 4.2), layout="constrained")
        axes, best = figure.subplots(), len(run["best"]["history"]) - 1
        axes.plot(scale * table[f"train_{key}"], ".-", c=blue, lw=2,
                  label="training (by heads that have not seen the image)" if cfg.cross_fit else "training")
        if (height := table[f"val_{key}"][best]) is not None:
            axes.plot(scale * table[f"val_{key}"], ".-", c=orange, lw=2, label="validation")
            axes.plot(best, scale * height, "o", c=green, ms=10, mec="white", label=f"best: {scale * height:.3g}")
        axes.axvline(cfg.epochs_stage1 + 0.5, color="0.35", ls="--", lw=1.2)
        axes.set_title("stage 1: head (epoch 0: before any gradient)", loc="left", size=10, color="0.35")
        axes.set_title("stage 2: fine-tuning", loc="right", size=10, color="0.35")
        axes.set(xlim=(-0.5, cfg.epochs_stage1 + cfg.epochs_stage2 + 0.5), xlabel="Epoch", ylabel=label)
        axes.set_xticks(range(len(table)), table.epoch, rotation=90 if len(table) > 20 else 0)
        axes.grid(alpha=0.3)
        figure.legend(loc="outside lower center", ncols=3, frameon=False)
        write_file(run_file(cfg, f"{key}.png"), figure)


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


def plot_mistakes(model, table, probabilities, names, title, cfg):
    """The eight most confident mistakes, each beside its class activation map (CAM, Zhou et al., 2016)."""
    (confidence, predicted), (height, width) = probabilities.max(1), cfg.img_size
    labels, paths = torch.tensor(table.label.tolist()), table.path.tolist()
    wrong = (predicted != labels).nonzero()[:, 0]
    layers, weight = FrozenLayers(model.features, cfg), model.classifier[1].weight.detach().cpu()
    weight = weight - weight.mean(0)  # what all classes share tells nothing about one of them
    figure = Figure((14.4, 1 + 3.6 * height / width), dpi=72, layout="constrained")
    figure.suptitle(title, size=14)
    worst = wrong[confidence[wrong].argsort(descending=True)[:8]].tolist()
    images = [load_views(paths[i], i, 0, cfg) for i in worst]
    maps = layers(torch.from_numpy(np.stack(images)))[:, 0].float() if worst else ()
    for place, (i, image, channels) in enumerate(zip(worst, images, maps), 1):
        label, taken = labels[i], predicted[i]
        cam = torch.einsum("chw,c->hw", channels, weight[taken])
        cam = F.interpolate(cam[None, None], cfg.img_size, mode="bicubic")[0, 0].numpy()
        # On the grey photograph all colour is the map's, whatever the colour of the flower.
        heat = sns.color_palette("inferno", as_cmap=True)((cam - cam.min()) / max(np.ptp(cam), 1e-9))[..., :3]
        axes = figure.add_subplot(2, 4, place)
        axes.imshow(np.hstack([image[0] / 255, (heat + image[0].mean(2, keepdims=True) / 255) / 2]))
        axes.set_axis_off()
        axes.set_title(f"is {names[label]} ({probabilities[i, label]:.0%})\n"
                       f"taken for {names[taken]} ({confidence[i]:.0%})", loc="left", size=9)
    return figure


# ---- Prediction ------------------------------------------------------------------------------------------------------


def predict(cfg):
    """Print the five likeliest classes of each image that --predict names or holds; returns the exit code."""
    paths, failed = [], 0
    for path in map(Path, cfg.predict):
        if not os.path.exists(path):  # which a name that is too long does not
            raise UserError(f"{path} does not exist: name images or folders")
        paths += only_images(files := list(files_below(path)), set(files), sys.stderr) if path.is_dir() else [path]
    if not paths:
        raise UserError(f"no images in {listing(cfg.predict)}")
    checkpoint = Path(cfg.checkpoint) if cfg.checkpoint else run_file(cfg, "best.pth")
    state = load_checkpoint(checkpoint, ("model", "config", "class_names"), of_config=("img_size", "crop"))
    config, names = state["config"], state["class_names"]
    vars(cfg).update({name: config[name] for name in CONSTANTS if name in config})  # images are seen as in the training
    without = DOWNSTREAM | {"Frozen activations", "Activation files"}
    code = {f"code of {name}": digest(text)[:16] for name, text in code_of(without=without).items()}
    if changed := [key for key in code if config.get(key) != code[key]]:
        print(f"note: this checkpoint was trained with another {listing(changed)}", file=sys.stderr)
    model = build_model(len(names))
    with explained(f"{checkpoint} does not fit the model of this program", RuntimeError):
        model.load_state_dict(state["model"])
    layers = FrozenLayers(split_model(model, 0)[0], cfg)
    on_cpu = cfg.device.type == "cpu"
    work = partial(attempt, partial(batch_of_views, num_views=0, layers=layers if on_cpu else None, cfg=cfg))
    for path, (batch, reason) in zip(paths, map_batches(work, list(enumerate(paths)), cfg, 1)):
        if reason:
            print("cannot read", reason.replace("\n", " "), file=sys.stderr)
            failed = 1
            continue
        features = torch.from_numpy(batch).view(cfg.dtype) if on_cpu else layers(torch.from_numpy(batch))
        likeliest = model.classifier(features[0].float())[0].softmax(0).topk(min(5, len(names)))
        print(path, *(f"  {100 * share:5.1f} %  {names[number]}" for share, number in zip(*likeliest)), sep="\n")
    return failed


# ---- Drawn flowers ---------------------------------------------------------------------------------------------------

DEMO = dict(data_dir="runs/demo_flowers", img_size=[64, 64], views=3, eval_splits=["val"], weights="none",
            epochs_stage1=3, run_name="demo")


def draw_demo_images(folder):
    """Draw 12 pictures of each of 102 species, 8 for training and 4 for validation, as own images lie."""
    if folder.is_file() or any(folder.glob("*")) and not (folder / "train" / "species 001").is_dir():
        raise UserError(f"{folder} holds other files than the demo's: leave out --data-dir or set another")
    for species, number in progress(list(np.ndindex(102, 12)), "drawing"):
        path = folder / ("train" if number < 8 else "val") / f"species {species + 1:03d}" / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        unfinished = path.with_name(f".{path.name}")  # another run may be reading the picture
        draw_flower(species, number).save(unfinished)
        unfinished.replace(path)


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


# ---- Whole run -------------------------------------------------------------------------------------------------------


def train_and_report(cfg):
    """The whole run: data, model, activations, both stages, reports."""
    socket.setdefaulttimeout(60)  # no download waits for ever
    print(f"device     {cfg.device}, {str(cfg.dtype).removeprefix('torch.')}")
    # Two runs that start together would download into the same files.
    with wait_for(FileLock(Path(cfg.out_dir, ".images"))):
        if cfg.demo:
            print("demo       drawn flowers, no pretrained weights: a demonstration, no result")
            draw_demo_images(Path(cfg.data_dir))
        # What a user can have got wrong comes first, and what is soon checked before what takes minutes.
        pretrained, data = load_pretrained(cfg.weights), find_images(cfg)
    layout = torch.channels_last if cfg.device.type == "cpu" else torch.preserve_format  # a GPU trains slower in it
    model = build_model(len(data.class_names), pretrained, cfg.seed).to(cfg.device, memory_format=layout)
    if pretrained is None:
        start_without_pretraining(model, data.tables["train"].path.tolist(), cfg)
    backbone, blocks = split_model(model, cfg.unfreeze_last_blocks)
    total, head, tail = (sum(map(torch.numel, parameters)) for parameters in (
        model.parameters(), model.classifier.parameters(), trainable_parameters(blocks, cfg)))
    print(f"model      EfficientNet-B3, weights {cfg.weights}: {total:,} parameters\n"
          f"trained    {head:,} of these in stage 1, {head + tail:,} in stage 2")
    run = take_up_run(model, data, cfg)
    frozen_part = FrozenLayers(backbone, cfg)
    activations = {split: frozen_activations(table, frozen_part, cfg.views if split == "train" else 0, cfg)
                   for split, table in data.tables.items() if split != "test"}
    remove_old_activations({part.fingerprint[:32] for part in activations.values()}, cfg)
    print_table(run["history"])
    train(model, blocks, activations, run, cfg)
    if "test" in data.tables:  # nobody waits for these before the training
        activations["test"] = frozen_activations(data.tables["test"], frozen_part, 0, cfg)
    evaluated = {split: part for split, part in activations.items() if split in cfg.eval_splits}
    report(model, blocks, evaluated, data, run, cfg)


# ---- Command line ----------------------------------------------------------------------------------------------------


def parse_command_line(argv):
    """The configuration as a namespace: every constant by its lower-case name, and the modes."""
    parser = argparse.ArgumentParser(allow_abbrev=False, usage="%(prog)s [options]", description=(
        "Two-stage transfer learning on Flowers-102 or own images. Each constant at the top of the file is an option."))
    parser.error = lambda message: parser.exit(2, "error: " + message.replace("\n", " ") + " (see --help)\n")
    parser.add_argument("--demo", action="store_true", help="the whole run on drawn flowers, without a download")
    parser.add_argument("--fresh", action="store_true", help="start anew; files of an earlier run are moved aside")
    parser.add_argument("--predict", nargs="+", default=(), metavar="PATH", help="name what images or folders show")
    parser.add_argument("--checkpoint", default="", metavar="FILE", help="for --predict: another one than the best")
    comments = dict(re.findall(r"^([A-Z_0-9]+)\b.*?  # (.*)$", source, flags=re.MULTILINE))
    constants = CONSTANTS | (DEMO if "--demo" in argv else {})
    for name, value in constants.items():
        several, kind, shown = isinstance(value, list), type(value), value
        if several:
            kind, shown = type(value[0]) if value else str, " ".join(map(str, value))
        how = {"action": argparse.BooleanOptionalAction} if kind is bool else {
            "type": os.path.expanduser if kind is str else kind, "metavar": kind.__name__.upper(),
            "nargs": "+" if several else None}
        parser.add_argument("--" + name.replace("_", "-"), default=value, **how,
                            help=f"{comments.get(name.upper(), '')} (default: {shown})".replace("%", "%%"))
    cfg = parser.parse_args(argv)
    if broken := broken_rules(cfg):
        parser.error("; ".join(broken))
    return cfg


def broken_rules(cfg):
    """What is wrong with the values of a configuration, in words."""
    rules = {
        "IMG_SIZE must be two numbers from 32": np.size(cfg.img_size) == 2 and min(cfg.img_size) >= 32,
        "TRAIN_SPLITS must be train, or train val": set(cfg.train_splits) in ({"train"}, {"train", "val"}),
        "EVAL_SPLITS must be val, test or both": set(cfg.eval_splits) in ({"val"}, {"test"}, {"val", "test"}),
        "HEAD_INIT must be lda or random": cfg.head_init in ("lda", "random"),
        "RUN_NAME must be a file name": (cfg.run_name == Path(cfg.run_name).name and cfg.run_name.strip(".")
                                         and len(os.fsencode(cfg.run_name)) < 200),
        "OUT_DIR must be another folder than DATA_DIR": Path(cfg.out_dir).resolve() != Path(cfg.data_dir).resolve(),
        "UNFREEZE_LAST_BLOCKS must be from 0 to 9": 0 <= cfg.unfreeze_last_blocks <= 9,
        "CROP must be from 0 to 1": 0 <= cfg.crop <= 1,
        "SHRINKAGE and VAL_FRACTION must be above 0, at most 1": all(
            0 < share <= 1 for share in (cfg.shrinkage, cfg.val_fraction)),
        "VIEWS and BATCH_SIZE must be at least 1, FOLDS 2": min(cfg.views, cfg.batch_size, cfg.folds - 1) >= 1,
        "epochs, learning rates, their factors and SEED must be from 0 to 2^63": all(0 <= value < 2**63 for value in (
            cfg.epochs_stage1, cfg.epochs_stage2, cfg.lr_stage1, cfg.lr_stage2, cfg.blocks_lr_factor, cfg.layer_decay,
            cfg.seed)),
        "--checkpoint goes with --predict": cfg.predict or not cfg.checkpoint}
    rules |= {f"{name.upper()} is read by that name in the code, so it is no option: edit it, or read cfg.{name}":
              getattr(cfg, name) == value or name.upper() not in names_read()
              for name, value in CONSTANTS.items()}
    return [rule for rule, kept in rules.items() if not kept]


@cache
def names_read():
    """The names whose values the code reads; what messages and comments say is none."""
    names = [part for part in ast.walk(ast.parse(source)) if isinstance(part, ast.Name)]
    return {name.id for name in names if isinstance(name.ctx, ast.Load)}


def choose_device(cfg):
    """Put a torch.device in place of DEVICE, and choose the precision."""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # before CUDA starts: the same bits each time
    gpu = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    with explained(f"no device {cfg.device}: set --device to auto or cpu", RuntimeError, AssertionError):
        cfg.device = torch.device(gpu if cfg.device == "auto" else cfg.device)
        torch.zeros(1, device=cfg.device).item()
    torch.use_deterministic_algorithms(cfg.device.type == "cuda", warn_only=True)
    processor = torch.cpu.get_capabilities()
    bfloat16 = processor.get("avx512_bf16") or processor.get("bf16")  # elsewhere it is slower than float32
    half = {"cuda": torch.float16, "cpu": torch.bfloat16 if bfloat16 else torch.float32}
    cfg.dtype = half.get(cfg.device.type, torch.float32) if cfg.amp else torch.float32


def main(argv=()):
    """The program; returns its exit code: 2 for bad input, 1 for failures, 130 for Ctrl-C."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):  # a terminal without the letters of a name shows their codes
            stream.reconfigure(errors="backslashreplace", line_buffering=True)
    cfg = parse_command_line(argv)
    try:
        choose_device(cfg)
        keep_freed_memory()
        if cfg.predict:
            return predict(cfg)
        lock = Path(cfg.out_dir) / f".{cfg.run_name}.lock"
        try:
            Path(cfg.out_dir, "activations").mkdir(parents=True, exist_ok=True)
            held = FileLock(lock, timeout=0).acquire()
        except Timeout:
            raise UserError(f"another run of {cfg.run_name} is going on: wait for it, or set --run-name; if there is "
                            f"none, as its machine is gone, delete {lock}") from None
        except (OSError, NotImplementedError) as error:
            raise UserError(f"cannot write or lock {lock} ({one_line(error)}): set --out-dir") from None
        with held:
            train_and_report(cfg)
        return 0
    except UserError as error:
        code, message = 2, str(error).rpartition("UserError: ")[2].strip()  # from a worker it comes with its traceback
    except KeyboardInterrupt:
        saved = "" if cfg.predict else ": what is done is saved, and the same command without --fresh goes on"
        print(f"stopped{saved}", file=sys.stderr)
        return 130
    except (MemoryError, RuntimeError, OSError) as error:
        if is_out_of_memory(error):
            code, message = 1, f"out of memory: lower BATCH_SIZE, NUM_WORKERS or IMG_SIZE ({one_line(error)})"
        elif getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            code, message = 1, f"no room left in {cfg.out_dir} ({error.strerror}): what was saved before is whole"
        elif isinstance(error, PermissionError) and error.filename:
            code, message = 2, one_line(error)
        else:
            raise
    print("error: " + message.replace("\n", " "), file=sys.stderr)
    return code


# ---- Helpers ---------------------------------------------------------------------------------------------------------

progress = partial(tqdm, disable=None, leave=False)  # a bar, where somebody watches


class UserError(Exception):
    """Bad input; the message says in one line what is wrong and what to do."""


def wait_for(lock):
    """Acquire a FileLock that other runs hold for a while, and say so where one does."""
    try:
        return lock.acquire(timeout=0)
    except Timeout:
        print(f"waiting    for another run in this folder; if none is going on, delete {lock.lock_file}")
        return lock.acquire()


def listing(items, limit=3):
    """The first few of `items` in words, and how many more there are."""
    more = f" and {len(items) - limit} more" if len(items) > limit else ""
    return ", ".join(map(str, items[:limit])) + more


@contextmanager
def explained(message, *kinds):
    """An error of these kinds, met within, as a UserError with this message; one of memory stays what it is."""
    try:
        yield
    except kinds as error:
        if is_out_of_memory(error):
            raise
        raise UserError(f"{message} ({one_line(error)})") from None


def attempt(work, item):
    """What work(item) returns and no reason, or nothing and the reason that a UserError gives."""
    try:
        return work(item), ""
    except UserError as error:
        return "", str(error)


def one_line(error):
    """An exception in one short line."""
    return f"{type(error).__name__}: {' '.join(str(error).split())}"[:200]


def is_out_of_memory(error):
    """Whether an exception tells of it: allocators and killed workers raise a mere RuntimeError."""
    signs = "MemoryError", "OutOfMemory", "out of memory", "allocate memory", "killed by signal: Killed"
    return any(sign in repr([error, error.__cause__]) for sign in signs)


if __name__ == "__main__":
    if code := main(sys.argv[1:] if "__file__" in globals() else ()):  # a notebook's arguments are its own
        sys.exit(code)
