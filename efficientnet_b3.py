"""Classify the 102 flower species of Oxford Flowers-102 with EfficientNet-B3, by two-stage transfer learning.

    python efficientnet_b3.py                        train (or continue), evaluate, report
    python efficientnet_b3.py --demo                 the whole run on drawn flowers, without a download
    python efficientnet_b3.py --predict rose.jpg d/  the five likeliest names for each image
    python efficientnet_b3.py --epochs-stage2 10     any constant below, by its name in lower case with dashes

Stage 1 trains the classifier head on a frozen backbone; stage 2 fine-tunes the last feature blocks as well.
A run leaves checkpoints, curves, confusion matrix, mistakes, report and metrics in runs/.
"""

import argparse
import copy
import hashlib
import inspect
import io
import json
import math
import os
import re
import signal
import sys
import time
from collections import namedtuple
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path

import numpy as np
import pandas as pd
import seaborn as sns
import torch
import torch.nn.functional as F
from joblib import cpu_count  # cores that this process may use, limits of a container included
from matplotlib.colors import PowerNorm, hsv_to_rgb
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter
from PIL import Image, ImageOps
from scipy.optimize import minimize_scalar
from scipy.stats import binomtest
from sklearn.metrics import balanced_accuracy_score, classification_report, confusion_matrix, f1_score
from torch import nn
from torch.optim.lr_scheduler import StepLR
from torch.utils.data import DataLoader, Dataset
from torchvision.datasets import Flowers102, ImageFolder
from torchvision.datasets.folder import IMG_EXTENSIONS
from torchvision.datasets.utils import check_integrity, download_and_extract_archive
from torchvision.models.efficientnet import EfficientNet_B3_Weights, MBConv, efficientnet_b3
from torchvision.ops import Conv2dNormActivation, StochasticDepth
from torchvision.transforms import v2
from tqdm import tqdm

# ---- Configuration ---------------------------------------------------------------------------------------

# Data
DATA_DIR = "data"  # folder of Flowers-102 (downloaded if missing), or of train/, val/ [and test/] of your own
IMG_SIZE = (300, 300)  # height and width in pixels
VIEWS = 8  # augmented views of each training image; epoch e trains on view e - 1 mod VIEWS
EVAL_SPLITS = ("val", "test")  # splits that the report covers: val, test or both
TEST_TIME_FLIP = False  # report also, and predict by, the mean over image and mirror image
NUM_WORKERS = -1  # processes that decode and augment; -1: one per core, 0: none but the main one

# Model
WEIGHTS = "IMAGENET1K_V1"  # pretrained weights: IMAGENET1K_V1, the path of a state dict, or none
UNFREEZE_LAST_BLOCKS = 2  # of the 9 feature blocks, how many stage 2 trains; 0: the head alone
HEAD_INIT = "lda"  # the head's start: lda, linear discriminant analysis in closed form, or random
SHRINKAGE = 0.3  # of lda's covariance matrix: near 0 as measured, 1 a multiple of the identity
FOLDS = 5  # parts of the training images for cross-fitting and for the temperature

# Stage 1: the head on the frozen backbone
EPOCHS_STAGE1 = 8  # passes over the training images
LR_STAGE1 = 1e-3  # learning rate; a tenth of it in the last two fifths of the epochs

# Stage 2: fine-tuning
EPOCHS_STAGE2 = 5  # passes over the training images
LR_STAGE2 = 1e-4  # learning rate of the head; a tenth of it in the last two fifths of the epochs
BLOCKS_LR_FACTOR = 5.0  # times LR_STAGE2 is the learning rate of the unfrozen blocks
CROSS_FIT = True  # blocks learn from a head that has not seen the image; off: from the head of all images
REFIT_HEAD = True  # end on the mean of the trained head and lda's on the fine-tuned features

# Run
BATCH_SIZE = 32  # training images per step
SEED = 0  # of views, folds, order and noise: the same seed gives the same run
DEVICE = "auto"  # auto, cpu, cuda, cuda:1, mps, ...
AMP = True  # half precision: float16 on CUDA, bfloat16 on processors that have it
DETERMINISTIC = True  # on CUDA, choose kernels that give the same bits each time, if slower
RUN_NAME = "effb3_flowers102_finetune"  # first part of the names of all files of the run
OUT_DIR = "runs"  # folder of those files

# ---- Run -------------------------------------------------------------------------------------------------


class UserError(Exception):
    """Bad input; the message says in one line what is wrong and what to do."""


class RunError(Exception):
    """A run that cannot go on; the message says in one line why and what is safe."""


class Run:
    """Constants, device, precision of inference and autocast, cached activations, seconds per phase."""

    def __init__(self, cfg, device, dtype):
        self.cfg, self.device, self.dtype, self.activations, self.seconds = cfg, device, dtype, {}, {}

    def file(self, suffix):
        """The path of a file of the run, say of "best.pth"."""
        return Path(self.cfg.out_dir) / f"{self.cfg.run_name}_{suffix}"

    @property
    def inference_batch_size(self):
        """Images per pass: few enough for a processor's cache, enough to fill a GPU."""
        return 4 if self.device.type == "cpu" else 128

    @contextmanager
    def phase(self, name):
        """Add the seconds of a `with` block to those of the phase `name`."""
        start = time.perf_counter()
        yield
        self.seconds[name] = round(self.seconds.get(name, 0) + time.perf_counter() - start, 2)


def listing(items, limit=3):
    """The first few of `items` in words, and how many more there are."""
    more = f" and {len(items) - limit} more" if len(items) > limit else ""
    return ", ".join(map(str, items[:limit])) + more


def one_line(error):
    """An exception in one short line."""
    return f"{type(error).__name__}: {' '.join(str(error).split())}"[:200]


def progress(batches, batch_size, description):
    """A progress bar that counts images where somebody watches it; nothing elsewhere."""
    return tqdm(batches, description, disable=None, leave=False, unit=" images", unit_scale=batch_size)


def mix_seed(*numbers):
    """One 64-bit seed from several whole numbers; neighbours give unrelated random streams."""
    return int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0])


# ---- Data ------------------------------------------------------------------------------------------------

Transforms = namedtuple("Transforms", "resize augment normalize")
Split = namedtuple("Split", "paths labels images")  # list [N], int64 [N], uint8 [N, H, W, 3]
Data = namedtuple("Data", "class_names splits")  # list of str, dict of Split


def make_transforms(img_size):
    """What an image goes through: `resize` once, `augment` once per training view, `normalize` on the device.

    The first two take and give PIL images, the last takes uint8 [B, 3, H, W]. An edit starts a new run.
    """
    return Transforms(
        resize=v2.Resize(img_size),
        augment=v2.Compose([v2.RandomHorizontalFlip(), v2.RandomRotation(15),
                            v2.ColorJitter(brightness=0.2, contrast=0.2, saturation=0.2, hue=0.2)]),
        normalize=v2.Compose([v2.ToDtype(torch.float32, scale=True),
                              v2.Normalize(mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225))]))


def find_own_images(folder, names):
    """Class names and {split: (paths, labels)} of folder/train, folder/val, ...: one sub-folder per class."""
    try:
        found = {name: ImageFolder(folder / name) for name in names}
    except OSError as error:
        raise UserError(f"{folder} needs the folders {', '.join(names)}, each with one sub-folder of images "
                        f"per class ({one_line(error)}); --eval-splits val does without test") from None
    class_names = found["train"].classes
    for name, files in found.items():
        if files.classes != class_names or len(class_names) < 2:
            odd = sorted(set(files.classes) ^ set(class_names)) or class_names
            raise UserError(f"{folder / name} needs two or more classes, the same as in train; not so: "
                            f"{listing(odd)}")
    return class_names, {name: ([Path(path) for path, _ in files.samples], files.targets)
                         for name, files in found.items()}


def find_flowers102(folder, names, extract=False):
    """Class names and {split: (paths, labels)} of Flowers-102 (Nilsback & Zisserman, 2008).

    What is missing is downloaded; `extract` unpacks all images again, as after an interrupted extraction.
    """
    base, missing = folder / "flowers-102", [folder / "flowers-102" / "jpg"]
    try:
        Flowers102(folder, download=True)
        found = {name: Flowers102(folder, name) for name in names}
        missing = [path for files in found.values() for path in files._image_files if not path.exists()]
        if missing or extract:
            archive, md5 = Flowers102._file_dict["image"]
            download_and_extract_archive(Flowers102._download_url_prefix + archive, str(base), md5=md5)
    except (OSError, RuntimeError) as error:
        wrong = [base / name for name, md5 in Flowers102._file_dict.values()
                 if (base / name).exists() and not check_integrity(base / name, md5)]
        state = f"damaged: {listing(wrong)}" if wrong else f"missing: {listing(missing)}"
        raise UserError(f"Flowers-102 is not whole ({state}) and cannot be downloaded ({one_line(error)}): "
                        "connect to the network, set --data-dir, or try --demo, which needs no download; "
                        "--eval-splits val does without the test split") from None
    return Flowers102.classes, {name: (files._image_files, files._labels) for name, files in found.items()}


def load_image(path):
    """An image file of any mode as upright RGB: transparency becomes white, an animation its first frame."""
    with Image.open(path) as image:
        image = ImageOps.exif_transpose(image)
        if image.mode.startswith("I;16"):
            image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
        if image.has_transparency_data:
            image = image.convert("RGBA")
            image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
        return image.convert("RGB")


def load_images(paths, img_size):
    """Files as uint8 [B, H, W, 3], and {path: reason} of those that cannot be read, which become zeros."""
    images, unreadable = torch.zeros((len(paths), *img_size, 3), dtype=torch.uint8), {}
    for image, path in zip(images, paths):
        try:
            image.copy_(torch.from_numpy(np.array(make_transforms(img_size).resize(load_image(path)))))
        except Exception as error:  # decoders raise all kinds: OSError, SyntaxError, struct.error, ...
            unreadable[path] = one_line(error)
    return images, unreadable


class AugmentedViews(Dataset):
    """VIEWS views of each of `images` (uint8 [N, H, W, 3]), made from (SEED, view, image index) alone."""

    def __init__(self, images, cfg):
        self.images, self.cfg, self.augment = images, cfg, make_transforms(cfg.img_size).augment

    def __len__(self):
        return self.cfg.views * len(self.images)

    def __getitem__(self, index):
        view, image = divmod(index, len(self.images))
        torch.default_generator.manual_seed(mix_seed(self.cfg.seed, view, image))
        return torch.from_numpy(np.array(self.augment(Image.fromarray(self.images[image].numpy()))))


def batches_of(dataset, batch_size, cfg, collate=None):
    """Batches of a data set in its own order, made by worker processes if there are enough of them."""
    workers = cpu_count() if cfg.num_workers < 0 else cfg.num_workers
    return DataLoader(dataset, batch_size, num_workers=min(workers, len(dataset) // batch_size),
                      collate_fn=collate, worker_init_fn=ignore_interrupt)


def ignore_interrupt(_worker):
    """Ctrl-C reaches every process of a terminal; only the main one answers, and ends its workers."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def decode(paths, cfg):
    """Decode and resize once: uint8 [N, H, W, 3], and {path: reason} of the files that cannot be read."""
    images, unreadable = torch.empty((len(paths), *cfg.img_size, 3), dtype=torch.uint8), {}
    batches = batches_of(paths, 16, cfg, partial(load_images, img_size=cfg.img_size))
    for part, (batch, errors) in zip(images.split(16), progress(batches, 16, "decoding")):
        part.copy_(batch)
        unreadable |= errors
    return images, unreadable


def load_data(cfg):
    """All images and labels that the run uses, decoded before any training: none can fail the run later."""
    folder, names = Path(cfg.data_dir), ["train", "val"] + ["test"] * ("test" in cfg.eval_splits)
    if folder.is_file():
        raise UserError(f"{folder} is a file: set --data-dir to a folder")
    own = (folder / "train").is_dir()
    class_names, found = (find_own_images if own else find_flowers102)(folder, names)
    paths = [path for split_paths, _ in found.values() for path in split_paths]
    images, unreadable = decode(paths, cfg)
    if unreadable and not own:
        with suppress(UserError):  # no network and no archive: the files are named below
            find_flowers102(folder, names, extract=True)
            images, unreadable = decode(paths, cfg)
    if unreadable:
        files = listing([f"{path} ({error})" for path, error in unreadable.items()])
        raise UserError(f"cannot read {files}: put whole images in their place and run again")
    parts = images.split([len(labels) for _, labels in found.values()])
    return Data(class_names, {name: Split(split_paths, torch.tensor(labels), part)
                              for (name, (split_paths, labels)), part in zip(found.items(), parts)})


# ---- Drawn flowers ---------------------------------------------------------------------------------------

DEMO = dict(data_dir="data/demo_flowers", img_size=(96, 96), views=4, eval_splits=("val",), weights="none",
            epochs_stage1=6, epochs_stage2=3, run_name="demo")


def draw_demo_images(folder):
    """Draw 12 pictures of each of 102 species, 8 to train on and 4 to test, as own images would lie there."""
    if folder.is_dir() and any(folder.iterdir()) and not (folder / "train" / "species 001").is_dir():
        raise UserError(f"{folder} holds other files than the demo's: leave out --data-dir or set another")
    try:
        for species in progress(range(102), 12, "drawing"):
            for number in range(12):
                path = folder / ("train" if number < 8 else "val") / f"species {species + 1:03d}"
                path.mkdir(parents=True, exist_ok=True)
                draw_flower(species, number).save(path / f"{number}.png")
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


# ---- Model -----------------------------------------------------------------------------------------------


def build_model(num_classes, state=None, seed=0):
    """torchvision's EfficientNet-B3 in eval mode; `state`: weights, perhaps without a classifier."""
    torch.manual_seed(seed)
    model = efficientnet_b3(num_classes=num_classes).eval()
    missing, foreign = ((), []) if state is None else model.load_state_dict(state, strict=False)
    odd = foreign + [key for key in missing if not key.startswith("classifier.")]
    if odd:
        raise ValueError(f"missing or foreign keys: {listing(odd)}")
    return model


def load_pretrained(weights):
    """The backbone's state dict that WEIGHTS names, without a classifier, or None for random weights."""
    if weights in ("none", None):
        return None
    try:
        if weights == "IMAGENET1K_V1":
            state = EfficientNet_B3_Weights.IMAGENET1K_V1.get_state_dict(progress=True, check_hash=True)
        else:
            state = torch.load(weights, map_location="cpu", weights_only=True)
        state = {key: value.detach().float() for key, value in state.get("model", state).items()
                 if "classifier." not in key}
        build_model(2, state)
        return state
    except OSError as error:
        raise UserError(f"cannot get the weights {weights} ({one_line(error)}): connect to the network, "
                        "set --weights to an existing file or to none, or try --demo") from None
    except Exception as error:  # whatever a foreign file makes of the unpickler
        raise UserError(f"{weights} is no state dict of EfficientNet-B3 ({one_line(error)})") from None


def split_model(model, blocks):
    """The frozen and the unfrozen layers up to the pooled features, where the last `blocks` are unfrozen.

    Both are sequences of the model's own layers: training the one trains the model. The pooling ends the
    unfrozen sequence, or, where no block is unfrozen, the frozen one.
    """
    layers = nn.Sequential(*model.features, model.avgpool, nn.Flatten())
    cut = len(model.features) - blocks if blocks else len(layers)
    model.requires_grad_(False)
    return layers[:cut], layers[cut:].requires_grad_(True)


def start_without_pretraining(model, images, run):
    """Make random weights say something: identity-like blocks, then BatchNorm statistics from `images`.

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
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(run.cfg.seed))[:1024]
    batches, normalize = order.tensor_split(-(-len(order) // 64)), make_transforms(run.cfg.img_size).normalize
    with torch.no_grad():
        for batch in progress(batches, 64, "BatchNorm statistics"):
            model.features(normalize(images[batch].to(run.device).permute(0, 3, 1, 2)))
    model.eval()


# ---- Frozen activations ----------------------------------------------------------------------------------
#
# A frozen network is a fixed function: what it says about an image need be computed once, not in every epoch.
#
#     JPEG --once--> 300x300 uint8 in memory
#          --once per view--> augmented view --> activations at the cut (232x10x10, 46 kB in half precision)
#          --in every step--> unfrozen blocks --> head --> loss
#
# With 8 views, 13 epochs and a last evaluation cost 9,180 passes through the frozen part instead of 27,540,
# and as its weights are fixed, each can run in its fastest form. Further epochs cost the trainable part only.


def fast_copy(layers, run):
    """A copy for inference: BatchNorm folded into the convolutions, channels_last, half precision."""
    layers = copy.deepcopy(layers).eval().requires_grad_(False)
    for block in layers.modules():
        if isinstance(block, Conv2dNormActivation):
            block[0], block[1] = nn.utils.fusion.fuse_conv_bn_eval(block[0], block[1]), nn.Identity()
    return layers.to(run.device, run.dtype, memory_format=torch.channels_last)


class FrozenPart(nn.Module):
    """Frozen layers in their fastest form, from B decoded images uint8 [H, W, 3] to activations."""

    def __init__(self, layers, run):
        super().__init__()
        self.layers, self.device, self.dtype = fast_copy(layers, run), run.device, run.dtype
        self.normalize = make_transforms(run.cfg.img_size).normalize

    @torch.no_grad()
    def forward(self, images):
        """Activations [B, C, h, w], or [B, C] after the pooling."""
        images = torch.stack(tuple(images)).to(self.device).permute(0, 3, 1, 2)  # is channels_last
        return self.layers(self.normalize(images).to(self.dtype))


def with_mirror_images(images, cfg):
    """Images uint8 [N, H, W, 3], followed by their mirror images if TEST_TIME_FLIP asks for them."""
    return torch.cat([images, images.flip(2)]) if cfg.test_time_flip else images


def cache_activations(frozen, split, data, run, augment=False):
    """What `frozen` says about a split: VIEWS augmented views of each image, or the image as it is.

    Returns activations [views, N, C, h, w] ([views, N, C] after pooling); a second view of an image that is
    not augmented is its mirror image. A second call costs nothing.
    """
    if split not in run.activations:
        images, size, part = data.splits[split].images, run.inference_batch_size, FrozenPart(frozen, run)
        views = AugmentedViews(images, run.cfg) if augment else with_mirror_images(images, run.cfg)
        on_cpu = run.device.type == "cpu"
        # A GPU is fed by all processes; processors are busiest when each one takes its batches all the way.
        batches = batches_of(views, size, run.cfg, collate=part if on_cpu else torch.stack)
        with run.phase(f"frozen part, {split}"):
            batches = progress(batches, size, f"frozen part, {split}")
            outputs = collected(batches if on_cpu else map(part, batches), len(views))
        run.activations[split] = outputs.unflatten(0, (-1, len(images)))
    return run.activations[split]


def collected(batches, count):
    """One tensor [count, ...] of all batches of an iterable, without holding them twice."""
    outputs, start = None, 0
    for batch in batches:
        outputs = batch.new_empty((count, *batch.shape[1:])) if outputs is None else outputs
        outputs[start:start + len(batch)] = batch
        start += len(batch)
    return outputs


@torch.no_grad()
def pass_through(layers, activations, run):
    """Send cached activations [views, N, ...] on through further layers, as they are now."""
    if not len(layers):
        return activations
    batches = activations.flatten(0, 1).split(4 * run.inference_batch_size)
    outputs = collected(map(fast_copy(layers, run), batches), activations.shape[:2].numel())
    return outputs.unflatten(0, activations.shape[:2])


def check_memory(frozen, data, run):
    """UserError if the activations of all splits would not fit into memory."""
    with torch.no_grad():
        one = frozen(torch.zeros(1, 3, *run.cfg.img_size, device=run.device)).numel() * run.dtype.itemsize
    images = {name: len(split.labels) for name, split in data.splits.items()}
    evaluated = (1 + run.cfg.test_time_flip) * (sum(images.values()) - images["train"])
    need, there = one * (run.cfg.views * images["train"] + evaluated), math.inf
    if run.device.type == "cuda":
        there = torch.cuda.mem_get_info(run.device)[0]
    elif hasattr(os, "sysconf"):
        there = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if need > 0.8 * there:
        raise UserError(f"the activations need {need / 1e9:.1f} GB of the {there / 1e9:.1f} GB of memory: "
                        "lower VIEWS, UNFREEZE_LAST_BLOCKS or IMG_SIZE")


# ---- Heads -----------------------------------------------------------------------------------------------
#
# Ten images per class are few: a head soon knows its training images by heart, and its loss on them says
# nothing of other images. So FOLDS + 1 heads are trained side by side: head k never sees the images of fold
# k, the last one sees all and goes into the model. What a head says of images that it has not seen sets the
# temperature, and the unfrozen blocks learn from it (cross-fitting, Chernozhukov et al., 2018). On a frozen
# backbone that is as honest as validation; blocks that are trained have seen those images themselves.


class Heads(nn.Module):
    """FOLDS + 1 linear heads on the same features; a class's only image is in no fold: each head needs it."""

    def __init__(self, labels, linear, cfg):
        super().__init__()
        order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(mix_seed(cfg.seed, 0)))
        folds = torch.full_like(labels, cfg.folds)
        for members in (order[labels[order] == label] for label in labels.unique()):
            if len(members) > 1:
                folds[members] = torch.arange(len(members)) % cfg.folds
        seen = folds != torch.arange(cfg.folds + 1)[:, None]  # which head (row) learns from which image
        seen[-1] = True
        self.labels, self.folds, self.seen = (part.to(linear.weight.device) for part in (labels, folds, seen))
        self.weight = nn.Parameter(linear.weight.detach().repeat(cfg.folds + 1, 1, 1))
        self.bias = nn.Parameter(linear.bias.detach().repeat(cfg.folds + 1, 1))

    def forward(self, features, learn=True):
        """Logits [FOLDS + 1, B, classes] of features [B, D]; the heads get a gradient if they `learn`."""
        weight, bias = (p if learn else p.detach() for p in (self.weight, self.bias))
        return torch.einsum("bd,kcd->kbc", features.float(), weight) + bias[:, None]

    @torch.no_grad()
    def solve(self, features, shrinkage):
        """Set all heads in closed form from features [views, N, D]: discriminant analysis and a temperature.

        Discriminant analysis is too confident: all logits are scaled by the one factor that gives the lowest
        cross-entropy on left-out images.
        """
        views, classes = len(features), self.weight.shape[1]
        for head, seen in enumerate(self.seen):
            kept, labels = features[:, seen].flatten(0, 1).float(), self.labels[seen].repeat(views)
            self.weight[head], self.bias[head] = discriminant(kept, labels, classes, shrinkage)
        images = (self.folds < len(self.seen) - 1).nonzero().flatten()
        if not len(images):
            return
        judges, rows = self.folds[images], torch.arange(len(images))
        logits = torch.cat([self(view[images])[judges, rows] for view in features]).cpu()
        targets = self.labels[images].repeat(views).cpu()
        factor = math.exp(minimize_scalar(lambda log: F.cross_entropy(logits * math.exp(log), targets).item(),
                                          bounds=(-10, 5), method="bounded").x)
        self.weight.mul_(factor)
        self.bias.mul_(factor)


def discriminant(features, labels, classes, shrinkage):
    """Linear discriminant analysis with a shrunk covariance: weights [classes, D] and bias [classes].

    The same as scikit-learn's LinearDiscriminantAnalysis(solver="lsqr", shrinkage=...), which takes one
    covariance per class and so is many times slower. `features` are float32 [N, D], `labels` int64 [N].
    """
    counts = labels.bincount(minlength=classes)[:, None]
    means = features.new_zeros(classes, features.shape[1]).index_add(0, labels, features) / counts
    within = features - means[labels]
    covariance, means = (within.T @ within / len(features)).cpu().double(), means.cpu().double()
    alike = (covariance.diagonal().mean() or 1) * torch.eye(len(covariance))  # 0: no two images of a class
    weight = torch.linalg.solve((1 - shrinkage) * covariance + shrinkage * alike, means.T).T
    return weight, (counts / counts.sum()).log()[:, 0].cpu() - (weight * means).sum(1) / 2


# ---- Training --------------------------------------------------------------------------------------------

# Epochs are counted over both stages: those `before` this one, and those `through` its end.
Stage = namedtuple("Stage", "number before through lr blocks")


def stages_of(cfg):
    """Stage 1: the head on the frozen backbone; stage 2: the last feature blocks too."""
    epochs = cfg.epochs_stage1 + cfg.epochs_stage2
    return (Stage(1, 0, cfg.epochs_stage1, cfg.lr_stage1, 0),
            Stage(2, cfg.epochs_stage1, epochs, cfg.lr_stage2, cfg.unfreeze_last_blocks))


def features_of(blocks, activations, run):
    """Pooled features float32 [B, D] of a batch of activations."""
    with torch.autocast(run.device.type, run.dtype, enabled=run.dtype != torch.float32):
        return blocks(activations).float()


def train_one_epoch(blocks, heads, activations, optimizer, scaler, epoch, run):
    """One pass over `activations` [N, ...] in random order: mean loss and accuracy (CROSS_FIT: left-out)."""
    cfg, loss_sum, right = run.cfg, 0.0, 0
    for module in blocks.modules():  # BatchNorm keeps its statistics: a batch of 32 would estimate worse ones
        module.training = isinstance(module, StochasticDepth)
    torch.manual_seed(mix_seed(cfg.seed, epoch))  # an epoch is the same after an interruption
    batches = torch.randperm(len(activations)).to(run.device).split(cfg.batch_size)
    for number, images in enumerate(progress(batches, cfg.batch_size, f"epoch {epoch}"), 1):
        features = features_of(blocks, activations[images], run)
        targets, seen = heads.labels[images], heads.seen[:, images]
        judges = heads.folds[images] if cfg.cross_fit else torch.full_like(images, cfg.folds)
        logits = heads(features, learn=False)[judges, torch.arange(len(images))]
        loss = F.cross_entropy(logits, targets)
        logits_of_heads, targets_of_heads = heads(features.detach())[seen], targets.expand_as(seen)[seen]
        loss_of_heads = F.cross_entropy(logits_of_heads, targets_of_heads, reduction="sum") / len(images)
        if not torch.isfinite(loss + loss_of_heads):
            raise RunError(f"the loss is {(loss + loss_of_heads).item()} in epoch {epoch}, batch {number}: "
                           "lower LR_STAGE1 or LR_STAGE2, or set AMP to False; earlier epochs are saved")
        optimizer.zero_grad()
        scaler.scale(loss + loss_of_heads).backward()
        scaler.step(optimizer)
        scaler.update()
        loss_sum += loss.item() * len(images)
        right += (logits.argmax(1) == targets).sum().item()
    return loss_sum / len(activations), right / len(activations)


@torch.no_grad()
def predict_logits(blocks, head, activations, run):
    """Logits float32 [N, classes], on the CPU, of activations [N, ...]."""
    blocks.eval()
    return torch.cat([head(features_of(blocks, batch, run)) for batch in activations.split(32)]).cpu()


@torch.no_grad()
def refit(heads, blocks, activations, run):
    """Solve the heads on the features of the fine-tuned blocks and take the mean with the trained heads.

    Both classify the same features; the mean of two linear heads is a linear head, and better than either.
    """
    trained = copy.deepcopy(heads)
    heads.solve(pass_through(blocks, activations, run), run.cfg.shrinkage)
    for solved, other in zip(heads.parameters(), trained.parameters()):
        solved.lerp_(other, 0.5)


def fit(model, data, state, config, run):
    """Train both stages, from the beginning or after the last whole epoch in `state`; returns the history."""
    cfg, history, labels = run.cfg, list(state["history"]) if state else [], data.splits["val"].labels
    print("stage  epoch        lr  train loss   train acc  val loss   val acc  seconds  best")
    for number in range(len(history)):
        print_epoch(history[:number + 1])
    if len(history) == cfg.epochs_stage1 + cfg.epochs_stage2:
        return history
    frozen, _ = split_model(model, cfg.unfreeze_last_blocks)
    train_cut = cache_activations(frozen, "train", data, run, augment=True)
    val_cut = cache_activations(frozen, "val", data, run)[:1]
    heads = Heads(data.splits["train"].labels, model.classifier[1], cfg)
    if state:
        heads.load_state_dict(state["heads"])
    for stage in stages_of(cfg):
        if history and len(history) >= stage.through:  # a stage 1 of no epochs still solves the head
            continue
        frozen_now, blocks = split_model(model, stage.blocks)
        beyond = frozen_now[len(frozen):]  # stage 1 is frozen beyond the cut, up to the head
        optimizer = torch.optim.Adam([
            {"params": heads.parameters(), "lr": stage.lr},
            {"params": blocks.parameters(), "lr": stage.lr * cfg.blocks_lr_factor}])
        scheduler = StepLR(optimizer, max(1, math.ceil(0.6 * (stage.through - stage.before))), gamma=0.1)
        scaler = torch.amp.GradScaler(run.device.type, enabled=run.dtype == torch.float16)
        if len(history) > stage.before:
            optimizer.load_state_dict(state["optimizer"])
            scheduler.load_state_dict(state["scheduler"])
            scaler.load_state_dict(state["scaler"])
        with run.phase(f"stage {stage.number}"):
            train, val = pass_through(beyond, train_cut, run), pass_through(beyond, val_cut, run)[0]
            if not history and stage.number == 1 and cfg.head_init == "lda":
                heads.solve(train, cfg.shrinkage)
            for epoch in range(len(history) + 1, stage.through + 1):
                start, view = time.perf_counter(), train[(epoch - 1) % cfg.views]
                loss, accuracy = train_one_epoch(blocks, heads, view, optimizer, scaler, epoch, run)
                if epoch == stage.through and stage.blocks and cfg.refit_head:
                    refit(heads, blocks, train, run)
                model.classifier[1].load_state_dict({"weight": heads.weight[-1], "bias": heads.bias[-1]})
                logits = predict_logits(blocks, model.classifier, val, run)
                history.append({
                    "stage": stage.number, "epoch": epoch, "lr": scheduler.get_last_lr()[0],
                    "train_loss": loss, "train_acc": accuracy,
                    "val_loss": F.cross_entropy(logits, labels).item(),
                    "val_acc": (logits.argmax(1) == labels).float().mean().item(),
                    "seconds": time.perf_counter() - start})
                scheduler.step()
                trainer = {"heads": heads.state_dict(), "optimizer": optimizer.state_dict(),
                           "scheduler": scheduler.state_dict(), "scaler": scaler.state_dict()}
                save_epoch(model, data, history, config, trainer, run)
                print_epoch(history)
    return history


def best_epoch(history):
    """The row with the highest validation accuracy; of equals, the lowest loss, then the first."""
    return max(history, key=lambda row: (row["val_acc"], -row["val_loss"]))


def print_epoch(history):
    """The line of the last epoch in `history`, with a mark if it is the best so far."""
    row = history[-1]
    print(f"{row['stage']:>5} {row['epoch']:>6} {row['lr']:>9.1e} {row['train_loss']:>11.4f} "
          f"{100 * row['train_acc']:>9.2f} % {row['val_loss']:>9.4f} {100 * row['val_acc']:>7.2f} % "
          f"{row['seconds']:>8.1f}  {'*' * (best_epoch(history) is row)}", flush=True)


# ---- Checkpoints -----------------------------------------------------------------------------------------

RUN_FILES = ("best.pth", "last.pth", "loss.png", "acc.png", "confusion_matrix.png", "mistakes.png",
             "report.txt", "metrics.json", "history.csv", "predictions.csv", "config.json")
# Constants that say where, how fast or how much to tell; weights, images and precision count as they are.
WITHOUT_EFFECT = {"data_dir", "eval_splits", "test_time_flip", "num_workers", "weights", "device", "amp",
                  "run_name", "out_dir"}


def write_file(path, content):
    """Write text or bytes such that `path` at any moment holds its old or its new content, whole."""
    unfinished = path.with_name(path.name + ".tmp")
    try:
        with open(unfinished, "wb") as file:
            file.write(content.encode() if isinstance(content, str) else content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(unfinished, path)
    except OSError as error:
        unfinished.unlink(missing_ok=True)
        raise RunError(f"cannot write {path} ({error.strerror}): what was there before is whole; "
                       "make room or mend it, and run the same command again") from None


def save_checkpoint(path, state):
    """Write `state` (plain Python and tensors) as a file that `torch.load(path, weights_only=True)` reads."""
    buffer = io.BytesIO()
    torch.save(state, buffer)
    write_file(path, buffer.getbuffer())


def save_epoch(model, data, history, config, trainer, run):
    """Write the last checkpoint, which holds the state of the `trainer` too, and perhaps the best one."""
    checkpoint = {"model": {key: value.cpu() for key, value in model.state_dict().items()},
                  "class_names": data.class_names, "config": config, "history": history,
                  "best_accuracy": best_epoch(history)["val_acc"]}
    # The best first: a run killed between the two repeats the epoch and writes both again, the same.
    if best_epoch(history) is history[-1]:
        save_checkpoint(run.file("best.pth"), checkpoint)
    save_checkpoint(run.file("last.pth"), checkpoint | trainer)


def load_checkpoint(path):
    """A checkpoint of this program, on the CPU."""
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
        build_model(len(state["class_names"]), state["model"])
        if not state["history"] or "img_size" not in state["config"]:
            raise ValueError("parts are missing")
        return state
    except FileNotFoundError:
        raise UserError(f"no checkpoint {path}: train first, or name another with --checkpoint") from None
    except Exception as error:  # whatever a foreign or truncated file makes of the unpickler
        raise UserError(f"{path} is damaged or no checkpoint of this program ({one_line(error)})") from None


def fingerprint(data, pretrained, run):
    """All that the result of a run depends on, as plain values: the same fingerprint means the same run."""
    images, weights = hashlib.sha256(repr(data.class_names).encode()), hashlib.sha256()
    for split in (data.splits["train"], data.splits["val"]):
        images.update(split.labels.numpy())
        images.update(split.images.numpy())
    for key, value in sorted((pretrained or {}).items()):
        weights.update(key.encode() + value.numpy().tobytes())
    constants = {name: getattr(run.cfg, name) for name in CONSTANTS if name not in WITHOUT_EFFECT}
    return {**constants, "transforms": inspect.getsource(make_transforms),
            "images_sha256": images.hexdigest(), "weights_sha256": weights.hexdigest(),
            "device_type": run.device.type, "precision": str(run.dtype)}


def find_state(config, run):
    """The state of this very run after its last whole epoch, or None; other runs' files are moved aside."""
    reason = "--fresh" if run.cfg.fresh else "no last checkpoint"
    if run.file("last.pth").exists() and not run.cfg.fresh:
        try:
            state, best = load_checkpoint(run.file("last.pth")), load_checkpoint(run.file("best.pth"))
            changed = [key for key in config | state["config"] if config.get(key) != state["config"].get(key)]
            if not changed and best["config"] == config:
                return state
            reason = f"changed: {listing(changed, 9)}" if changed else "the best checkpoint is of another run"
        except UserError as error:
            reason = error
    files = [run.file(name) for name in RUN_FILES if run.file(name).exists()]
    if files:
        number = 1
        while (aside := run.file(f"old{number}")).exists():
            number += 1
        aside.mkdir()
        for file in files:
            file.rename(aside / file.name)
        print(f"new run    {reason}; the files of the earlier run are now in {aside}")
    return None


# ---- Reports ---------------------------------------------------------------------------------------------


def measure(probabilities, labels):
    """The figures of one split from `probabilities` (float [N, classes]) and `labels` (int64 [N])."""
    confidence, predicted = probabilities.max(1)
    right = (predicted == labels).float()
    bins = (confidence * 15).long().clamp_max(14)  # ECE: Guo et al., 2017
    gaps = torch.zeros(15).index_add(0, bins, confidence - right)
    likeliest = probabilities.topk(min(5, probabilities.shape[1])).indices
    return {"images": len(labels), "accuracy": right.mean().item(),
            "wilson_95": list(binomtest(int(right.sum()), len(labels)).proportion_ci(method="wilson")),
            "balanced_accuracy": float(balanced_accuracy_score(labels, predicted)),
            "macro_f1": float(f1_score(labels, predicted, labels=labels.unique(), average="macro")),
            "top5_accuracy": (likeliest == labels[:, None]).any(1).float().mean().item(),
            "log_loss": F.nll_loss(probabilities.clamp_min(1e-12).log(), labels).item(),
            "expected_calibration_error": gaps.abs().sum().item() / len(labels)}


def summary(split, figures):
    """The figures of one split in two lines."""
    low, high = figures["wilson_95"]
    return (f"{split:10} accuracy {100 * figures['accuracy']:.2f} % (95 % Wilson interval {100 * low:.1f} to "
            f"{100 * high:.1f}), macro-F1 {figures['macro_f1']:.4f}, "
            f"balanced {100 * figures['balanced_accuracy']:.2f} %,\n{'':10} top-5 "
            f"{100 * figures['top5_accuracy']:.2f} %, log loss {figures['log_loss']:.4f}, expected "
            f"calibration error {figures['expected_calibration_error']:.4f}, {figures['images']} images")


def most_confused(confusion, class_names, limit=12):
    """Pairs of words on the largest off-diagonal cells of `confusion` (int [classes, classes], rows true)."""
    totals = confusion.sum(1)
    cells = [(int(confusion[t, p]), int(totals[t]), t, p) for t, p in np.argwhere(confusion) if t != p]
    cells.sort(key=lambda cell: (-cell[0], cell[1]))  # of equal counts, the larger share of its class first
    return [(f"{count} of {total} {class_names[t]}", f"taken for {class_names[p]}")
            for count, total, t, p in cells[:limit]]


def plot_curves(history, key, label, cross_fit):
    """Training and validation `key` ("loss", or "acc" in %) over the epochs of both stages."""
    table, best, scale = pd.DataFrame(history), best_epoch(history), 100 if key == "acc" else 1
    figure = Figure(figsize=(7.5, 4.2), layout="constrained")
    axes, (blue, orange, green) = figure.subplots(), sns.color_palette("colorblind")[:3]
    training = "training (left-out folds)" if cross_fit else "training"
    for part, name, colour in (("train", training, blue), ("val", "validation", orange)):
        axes.plot(table.epoch, scale * table[f"{part}_{key}"], ".-", c=colour, lw=2, label=name)
    height = scale * best[f"val_{key}"]
    words = f"best epoch: {best['epoch']}, " + (f"{height:.1f} %" if key == "acc" else f"loss {height:.3f}")
    axes.plot(best["epoch"], height, "o", c=green, ms=10, mec="white", label=words)
    for stage, name, side in ((1, "head", "left"), (2, "fine-tuning", "right")):
        if stage in table.stage.values:
            axes.set_title(f"stage {stage}: {name}", loc=side, size=10, color="0.35")
    if table.stage.nunique() == 2:
        axes.axvline(table.epoch[table.stage == 1].max() + 0.5, color="0.35", ls="--", lw=1.2)
    axes.set(xlim=(0.5, len(history) + 0.5), xlabel="Epoch", ylabel=label)
    axes.xaxis.set_major_locator(MaxNLocator(15, integer=True, min_n_ticks=1))
    axes.grid(alpha=0.3)
    sns.despine(ax=axes)
    figure.legend(loc="outside lower center", ncols=3, frameon=False)
    return figure


def plot_confusion_matrix(confusion, class_names, split):
    """Heat map of `confusion` (int [classes, classes], rows true) beside its most confused pairs."""
    classes, named = len(class_names), len(class_names) <= 150
    side = max(6.5, 0.12 * classes) if named else 12  # inches: names can be read from 0.12 a class
    cell, size = 72 * side / classes, min(18, 1.5 * side)  # points
    figure = Figure((side, side))  # png_bytes makes room for all that stands outside the axes
    axes, bar = figure.add_axes((0, 0, 1, 1)), figure.add_axes((1.05, 0, 0.4, 0.012))
    share = confusion / np.maximum(confusion.sum(1, keepdims=True), 1)
    norm = PowerNorm(0.5, vmin=0, vmax=1)  # the root lifts single mistakes off the white of the empty cells
    sns.heatmap(share, mask=confusion == 0, norm=norm, cmap="mako_r", ax=axes, cbar_ax=bar,
                xticklabels=class_names if named else False, yticklabels=class_names if named else False,
                annot=confusion if named else None, fmt="d", annot_kws={"size": min(14, 0.6 * cell)},
                cbar_kws={"orientation": "horizontal", "ticks": [0.01, 0.1, 0.25, 0.5, 1],
                          "format": PercentFormatter(1, 0, " %"), "label": "share of the true class"})
    if named:
        letters = min(12, 0.85 * cell)
        turned = 0.6 * letters * max(map(len, class_names)) > cell
        axes.tick_params("x", length=0, pad=2, labelsize=letters, rotation=90 * turned)
        axes.tick_params("y", length=0, pad=2, labelsize=letters, rotation=0)
        axes.hlines(range(classes), 0, classes, color="0.9", lw=0.3)
        axes.vlines(range(classes), 0, classes, color="0.9", lw=0.3)
    axes.spines[:].set(visible=True, color="0.7")
    axes.set_xlabel("predicted class", size=size)
    axes.set_ylabel("true class", size=size)
    right = f"{np.trace(confusion)} of {confusion.sum()} images right"
    axes.set_title(f"Confusion matrix, {split} split: {right}", size=size, pad=size)
    pairs = ["\n".join(pair) for pair in most_confused(confusion, class_names)]
    axes.text(1.05, 1, "\n\n".join(["Most confused", *pairs]), transform=axes.transAxes, size=size, va="top")
    return figure


def plot_mistakes(model, split, name, probabilities, class_names, run, limit=12):
    """The most confident mistakes, each beside its class activation map (CAM, Zhou et al., 2016)."""
    confidence, predicted = probabilities.max(1)
    wrong = (predicted != split.labels).nonzero().flatten()
    chosen = wrong[confidence[wrong].argsort(descending=True)[:limit]].tolist()
    part, evidence = FrozenPart(model.features, run), model.classifier[1].weight.detach()
    evidence = evidence - evidence.mean(0)  # what all classes share says nothing about one of them
    rows = max(1, -(-len(chosen) // 4))
    columns = max(1, -(-len(chosen) // rows))
    width = max(3.6, 6 / columns)  # inches; 3.6 hold a name of 27 letters
    tall = width / 2 * run.cfg.img_size[0] / run.cfg.img_size[1] if chosen else 0
    figure = Figure((columns * width, rows * (tall + 0.42) + 0.4), layout="constrained")
    figure.subplots(rows, columns, subplot_kw={"anchor": "N", "frame_on": False, "xticks": [], "yticks": []})
    for axes, i in zip(figure.axes, chosen):
        photo, label, taken = split.images[i].numpy() / 255, split.labels[i], predicted[i]
        cam = torch.einsum("chw,c->hw", part(split.images[i:i + 1])[0].float(), evidence[taken]).cpu().numpy()
        cam = Image.fromarray((cam - cam.min()) / max(np.ptp(cam), 1e-9)).resize(photo.shape[1::-1])
        cam = np.asarray(cam).clip(0, 1)[..., None]
        # On the grey photograph all colour is the map's, whatever the colour of the flower.
        heat, alpha = sns.color_palette("inferno", as_cmap=True)(cam[..., 0])[..., :3], 0.25 + 0.4 * cam
        heat = alpha * heat + (1 - alpha) * photo.mean(2, keepdims=True)
        axes.imshow(np.hstack([photo, np.ones_like(photo[:, ::50]), heat]))
        axes.set_title(f"is {class_names[label]} ({100 * probabilities[i, label].item():.0f} %)\ntaken for "
                       f"{class_names[taken]} ({100 * confidence[i].item():.0f} %)", loc="left", size=10)
    words = f"Most confident of {len(wrong)} mistakes in {len(predicted)} images, {name} split"
    figure.suptitle(words, size=14)
    return figure


def png_bytes(figure, dpi=150):
    """`figure` as PNG; 32 levels per colour channel look the same and halve the weight of photographs."""
    drawn, light = io.BytesIO(), io.BytesIO()
    figure.savefig(drawn, format="png", dpi=dpi, bbox_inches="tight")
    Image.open(drawn).convert("RGB").point(lambda level: level // 8 * 255 // 31).save(light, "png")
    return light.getvalue()


def report(model, data, history, run):
    """Evaluate the best checkpoint, write its files (pictures: first split) and return {split: figures}."""
    cfg, names, metrics, texts, tables = run.cfg, np.array(data.class_names), {}, [], []
    classes = range(len(names))
    model.load_state_dict(load_checkpoint(run.file("best.pth"))["model"])
    frozen, blocks = split_model(model.eval(), cfg.unfreeze_last_blocks)
    for name in cfg.eval_splits:
        split, views = data.splits[name], cache_activations(frozen, name, data, run)
        of_views = [predict_logits(blocks, model.classifier, view, run).softmax(1) for view in views]
        probabilities = of_views[0]
        values, likeliest = (top.numpy() for top in probabilities.topk(min(5, len(names))))
        labels, predicted = split.labels.numpy(), likeliest[:, 0]
        confusion = confusion_matrix(labels, predicted, labels=classes)
        metrics[name] = measure(probabilities, split.labels)
        if cfg.test_time_flip:
            metrics[f"{name} flip"] = measure(sum(of_views) / 2, split.labels)
        f1 = pd.Series(f1_score(labels, predicted, labels=classes, average=None, zero_division=0), names)
        worst = f1.nsmallest(10).to_string(float_format="%.3f")
        pairs = "\n".join(" ".join(pair) for pair in most_confused(confusion, names))
        table = classification_report(labels, predicted, labels=classes, target_names=names, digits=3,
                                      zero_division=0)
        texts += [f"lowest F1, {name}\n{worst}", f"most confused, {name}\n{pairs}",
                  f"each class, {name}\n{table}"]
        tables.append(pd.DataFrame({
            "file": [os.path.relpath(path, cfg.data_dir) for path in split.paths], "split": name,
            "true": names[labels], "predicted": names[predicted], "probability": values[:, 0].round(4),
            "top5": ["; ".join(five) for five in names[likeliest]]}))
        if name == cfg.eval_splits[0]:
            figure = plot_mistakes(model, split, name, probabilities, names, run)
            write_file(run.file("mistakes.png"), png_bytes(figure, dpi=100))
            figure = plot_confusion_matrix(confusion, names, name)
            write_file(run.file("confusion_matrix.png"), png_bytes(figure))
    for key, label in (("loss", "Cross-entropy loss"), ("acc", "Accuracy (%)")):
        write_file(run.file(f"{key}.png"), png_bytes(plot_curves(history, key, label, cfg.cross_fit)))
    write_file(run.file("report.txt"), "\n\n".join([*map(summary, metrics, metrics.values()), *texts]))
    write_file(run.file("history.csv"), pd.DataFrame(history).to_csv(index=False))
    write_file(run.file("predictions.csv"), pd.concat(tables).to_csv(index=False))
    return metrics


# ---- Prediction ------------------------------------------------------------------------------------------


def predict(run):
    """Print the five likeliest classes of each image that --predict names or holds; returns the exit code."""
    paths, failed = [], False
    for path in map(Path, run.cfg.predict):
        inside = sorted(file for file in path.rglob("*") if file.suffix.lower() in IMG_EXTENSIONS)
        if not inside and not path.is_file():
            raise UserError(f"{path} does not exist or has no images: name images or folders")
        paths += inside or [path]
    state = load_checkpoint(Path(run.cfg.checkpoint) if run.cfg.checkpoint else run.file("best.pth"))
    run.cfg.img_size, names = state["config"]["img_size"], state["class_names"]
    model = build_model(len(names), state["model"]).to(run.device)
    features = FrozenPart(split_model(model, 0)[0], run)
    size = run.inference_batch_size
    for chunk in (paths[start:start + 2048] for start in range(0, len(paths), 2048)):
        decoded, unreadable = decode(chunk, run.cfg)
        images = with_mirror_images(decoded, run.cfg)
        with torch.no_grad():
            pooled = collected(map(features, progress(images.split(size), size, "predicting")), len(images))
            probabilities = model.classifier(pooled.float()).softmax(1).unflatten(0, (-1, len(chunk))).mean(0)
            values, likeliest = probabilities.cpu().topk(min(5, len(names)))
        for path, *five in zip(chunk, values.tolist(), likeliest.tolist()):
            if path in unreadable:
                print(f"{path}: cannot be read ({unreadable[path]})", file=sys.stderr)
            else:
                print(path, *(f"  {100 * value:5.1f} %  {names[i]}" for value, i in zip(*five)), sep="\n")
        failed = failed or bool(unreadable)
    return int(failed)


# ---- Command line ----------------------------------------------------------------------------------------

# The constants of the Configuration section by lower-case name: (value, its comment in this very file).
SOURCE = Path(__file__).read_text(encoding="utf-8").split("# ---- Configuration")[1].split("# ---- Run")[0]
CONSTANTS = {name.lower(): (globals()[name], comment)
             for name, comment in re.findall(r"^([A-Z]\w+) = .+?(?:  # (.+))?$", SOURCE, re.MULTILINE)}
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
    ("shrinkage", (int, float), lambda v: 0 < v <= 1, "above 0, at most 1"),
    ("lr_stage1 lr_stage2 blocks_lr_factor", (int, float), lambda v: 0 < v < math.inf, "a number above 0"),
    ("test_time_flip cross_fit refit_head amp deterministic", bool, lambda v: True, "True or False"),
)


def parse_command_line(argv):
    """The configuration as a namespace: every constant by its lower-case name, and the modes."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0], allow_abbrev=False)
    parser.error = lambda message: parser.exit(2, f"error: {message} (see --help)\n")  # one line
    parser.add_argument("--demo", action="store_true", help="a run on drawn flowers, without any download")
    parser.add_argument("--fresh", action="store_true", help="start anew; earlier files are moved aside")
    parser.add_argument("--predict", nargs="+", metavar="PATH", help="name the flowers in images and folders")
    parser.add_argument("--checkpoint", metavar="FILE", help="with --predict: another than the run's best")
    group = parser.add_argument_group("constants")
    fractions = {name for names, kind, *_ in CHECKS if kind == (int, float) for name in names.split()}
    for name, (value, comment) in CONSTANTS.items():
        shown, how = value, {"type": str if value is None else type(value), "metavar": "X"}
        if name in fractions and isinstance(value, int):
            how["type"] = float
        elif isinstance(value, bool):
            how = {"action": argparse.BooleanOptionalAction}
        elif isinstance(value, tuple):
            shown, how = " ".join(map(str, value)), {"type": type(value[0]), "nargs": "+", "metavar": "X"}
        words = f"{comment.replace('%', '%%')} (default: {shown})"
        group.add_argument("--" + name.replace("_", "-"), default=value, help=words, **how)
    if "--demo" in argv:
        parser.set_defaults(**DEMO)
    cfg = parser.parse_args(argv)
    for names, kind, valid, words in CHECKS:
        for name in names.split():
            value = getattr(cfg, name)
            value = tuple(value) if isinstance(value, list) else value
            setattr(cfg, name, value)
            if not isinstance(value, kind) or not valid(value):
                parser.error(f"{name.upper()} must be {words}, not {value!r}")
    if cfg.epochs_stage1 + cfg.epochs_stage2 == 0:
        parser.error("EPOCHS_STAGE1 and EPOCHS_STAGE2 must not both be 0")
    if cfg.checkpoint and not cfg.predict:
        parser.error("--checkpoint goes with --predict")
    return cfg


def start_run(cfg):
    """The run on its device, in its precision."""
    name = cfg.device
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # DETERMINISTIC needs it before CUDA starts
    try:
        device = torch.device(name)
        torch.zeros(1, device=device).item()
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise UserError(f"no device {name!r} here ({one_line(error)}): set --device to auto or cpu") from None
    if device.type == "cuda":
        torch.backends.cudnn.deterministic = cfg.deterministic
        torch.use_deterministic_algorithms(cfg.deterministic, warn_only=True)
        return Run(cfg, device, torch.float16 if cfg.amp else torch.float32)
    processor = torch.cpu.get_capabilities()
    native = device.type == "cpu" and (processor.get("avx512_bf16") or processor.get("bf16"))
    return Run(cfg, device, torch.bfloat16 if cfg.amp and native else torch.float32)


def prepare_folder(run):
    """Make OUT_DIR, see that it can be written to, and remove what a killed run left unfinished there."""
    try:
        Path(run.cfg.out_dir).mkdir(parents=True, exist_ok=True)
        for name in RUN_FILES:
            run.file(name + ".tmp").touch()
            run.file(name + ".tmp").unlink()
    except OSError as error:
        raise UserError(f"cannot write to {run.cfg.out_dir} ({error.strerror}): "
                        "set --out-dir to another folder") from None


def train_and_report(run):
    """The whole run: data, model, both stages, reports."""
    cfg, start = run.cfg, time.perf_counter()
    prepare_folder(run)
    print(f"device     {run.device}, {str(run.dtype).removeprefix('torch.')}", flush=True)
    if cfg.demo:
        print("demo       drawn flowers, no pretrained weights: a demonstration, no result")
        draw_demo_images(Path(cfg.data_dir))
    with run.phase("decoding"):
        data = load_data(cfg)
    sizes = ", ".join(f"{len(split.labels)} {name}" for name, split in data.splits.items())
    print(f"data       {cfg.data_dir}: {len(data.class_names)} classes; images: {sizes}", flush=True)
    pretrained = load_pretrained(cfg.weights)
    model = build_model(len(data.class_names), pretrained, cfg.seed).to(run.device)
    frozen, unfrozen = split_model(model, cfg.unfreeze_last_blocks)
    total, head, blocks = (sum(p.numel() for p in part.parameters())
                           for part in (model, model.classifier, unfrozen))
    print(f"model      EfficientNet-B3, weights {cfg.weights}: {total:,} parameters, trained in stage 1 "
          f"{head:,}, in stage 2 {head + blocks:,}\n", flush=True)
    config = fingerprint(data, pretrained, run)
    check_memory(frozen, data, run)
    state = find_state(config, run)
    if state:
        model.load_state_dict(state["model"])
    elif pretrained is None:
        start_without_pretraining(model, data.splits["train"].images, run)
    history = fit(model, data, state, config, run)
    for name in cfg.eval_splits:
        cache_activations(frozen, name, data, run)
    with run.phase("reports"):
        metrics = report(model, data, history, run)
    content = {"best_epoch": best_epoch(history)["epoch"], "splits": metrics, "seconds": run.seconds}
    write_file(run.file("metrics.json"), json.dumps(content, indent=1) + "\n")
    constants = {name: getattr(cfg, name) for name in CONSTANTS}
    write_file(run.file("config.json"), json.dumps(constants | config, indent=1) + "\n")
    print(f"\nbest       epoch {content['best_epoch']} of {len(history)}")
    print(*map(summary, metrics, metrics.values()), sep="\n")
    print(f"files      {run.file('*')}\ntime       {time.perf_counter() - start:.0f} s")


def stop(number, _frame):
    """Signal handler: an exception, so that worker processes are ended on the way out."""
    raise KeyboardInterrupt(number)


def main(argv=None):
    """The program; returns its exit code: 2 for bad input, 1 for a failed run, 128 + number for a signal."""
    cfg = parse_command_line(sys.argv[1:] if argv is None else argv)
    try:
        run = start_run(cfg)
        if cfg.predict:
            return predict(run)
        train_and_report(run)
        return 0
    except (UserError, RunError) as error:
        code, message = 2 if isinstance(error, UserError) else 1, f"error: {error}"
    except OSError as error:
        if error.filename is None:
            raise
        code, message = 2, f"error: cannot use {error.filename} ({error.strerror}): name another"
    except (MemoryError, RuntimeError) as error:
        # A processor's allocator and a worker that the system has killed raise a plain RuntimeError.
        if not isinstance(error, (MemoryError, torch.OutOfMemoryError)) and not re.search(
                r"you tried to allocate|DataLoader worker \(pid", str(error)):
            raise
        code, message = 1, f"error: out of memory: lower BATCH_SIZE, VIEWS or IMG_SIZE ({one_line(error)})"
    except KeyboardInterrupt as error:
        code = 128 + (error.args[0] if error.args else signal.SIGINT)
        message = "stopped"
        if not cfg.predict:
            message += ": finished epochs are saved; the same command without --fresh continues after them"
    print(message, file=sys.stderr)
    return code


if __name__ == "__main__":
    signal.signal(signal.SIGINT, stop)
    signal.signal(signal.SIGTERM, stop)
    sys.exit(main())
