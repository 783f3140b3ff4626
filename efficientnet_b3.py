"""Classify the 102 flower species of Oxford Flowers-102 with EfficientNet-B3, by two-stage transfer learning.

    python efficientnet_b3.py                        train (or continue), evaluate, report
    python efficientnet_b3.py --demo                 the whole run on drawn flowers: no download, about a minute
    python efficientnet_b3.py --predict rose.jpg d/  the five likeliest names for each image
    python efficientnet_b3.py --epochs-stage2 10     any constant below, by its name in lower case with dashes

Stage 1 trains the classifier head on a frozen backbone; stage 2 fine-tunes the last feature blocks as well.
A run leaves checkpoints, curves, confusion matrix, mistakes, report and metrics in runs/.
"""

import argparse
import copy
import csv
import hashlib
import io
import json
import math
import os
import re
import signal
import sys
import time
from collections import namedtuple
from colorsys import hls_to_rgb
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import seaborn as sns
import torch
import torch.nn.functional as F
from matplotlib.colors import PowerNorm
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter
from PIL import Image, ImageDraw, ImageFilter, ImageOps
from scipy.optimize import minimize_scalar
from sklearn.metrics import balanced_accuracy_score, classification_report, confusion_matrix, f1_score
from torch import nn
from torch.utils.data import DataLoader, Dataset
from torchvision.datasets import Flowers102, ImageFolder
from torchvision.datasets.folder import IMG_EXTENSIONS
from torchvision.datasets.utils import check_integrity, download_and_extract_archive
from torchvision.models import EfficientNet_B3_Weights, efficientnet_b3
from torchvision.models.efficientnet import MBConv
from torchvision.ops import Conv2dNormActivation
from torchvision.transforms import v2
from tqdm import tqdm

# ---- Configuration ---------------------------------------------------------------------------------------

# Data
DATA_DIR = "data"  # folder of Flowers-102 (downloaded if missing), or of train/, val/ [and test/] of your own
IMG_SIZE = (300, 300)  # height and width in pixels
VIEWS = 8  # augmented views of each training image; epoch e trains on view e mod VIEWS
EVAL_SPLITS = ("val", "test")  # splits that the report covers: val, test or both
NUM_WORKERS = -1  # processes that decode and augment; -1: one per core, 0: none but the main one

# Model
WEIGHTS = "IMAGENET1K_V1"  # pretrained weights: IMAGENET1K_V1, the path of a state dict, or none
UNFREEZE_LAST_BLOCKS = 2  # of the 9 feature blocks, how many stage 2 trains; 0: the head alone
HEAD_INIT = "lda"  # the head's start: lda, linear discriminant analysis in closed form, or random
SHRINKAGE = 0.3  # of lda's covariance matrix: near 0 as measured, 1 all features alike
FOLDS = 5  # parts of the training images for cross-fitting and for the temperature

# Stage 1: the head on the frozen backbone
EPOCHS_STAGE1 = 8  # passes over the training images
LR_STAGE1 = 1e-3  # peak learning rate

# Stage 2: fine-tuning
EPOCHS_STAGE2 = 5  # passes over the training images
LR_STAGE2 = 1e-4  # peak learning rate of the head
BLOCKS_LR_FACTOR = 5.0  # times LR_STAGE2 is the peak learning rate of the unfrozen blocks
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


@dataclass
class Run:
    """A run's configuration, device, precision of inference and autocast, kept activations, seconds per phase."""

    cfg: argparse.Namespace
    device: torch.device
    dtype: torch.dtype
    activations: dict = field(default_factory=dict)
    seconds: dict = field(default_factory=dict)

    def file(self, suffix):
        """The path of a file of the run, say of "best.pth"."""
        return Path(self.cfg.out_dir) / f"{self.cfg.run_name}_{suffix}"

    @contextmanager
    def phase(self, name):
        """Add the seconds of a `with` block to those of the phase `name`."""
        start = time.perf_counter()
        yield
        self.seconds[name] = round(self.seconds.get(name, 0) + time.perf_counter() - start, 2)


def listing(items, limit=3):
    """The first few of `items` in words, and how many more there are."""
    return ", ".join(map(str, items[:limit])) + (f" and {len(items) - limit} more" if len(items) > limit else "")


def first_line(error):
    """An exception in one short line."""
    return f"{type(error).__name__}: {error}".splitlines()[0][:200]


def progress(batches, batch_size, description):
    """A progress bar that counts images where somebody watches it; nothing elsewhere."""
    return tqdm(batches, description, disable=None, leave=False, unit=" images", unit_scale=batch_size)


def mix_seed(*numbers):
    """One 64-bit seed from several whole numbers, such that neighbours get unrelated random streams."""
    return int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0])


# ---- Data ------------------------------------------------------------------------------------------------

Transforms = namedtuple("Transforms", "resize augment normalize")
Split = namedtuple("Split", "paths labels images")  # list [N], int64 [N], uint8 [N, H, W, 3]
Data = namedtuple("Data", "class_names splits")  # list of str, dict of Split


def make_transforms(img_size):
    """What an image goes through: `resize` once, `augment` once per training view, `normalize` on the device.

    The first two take and give PIL images, the last takes uint8 [B, 3, H, W]. Edit freely: an edit starts a new run.
    """
    return Transforms(
        resize=v2.Resize(img_size),
        augment=v2.Compose([
            v2.RandomHorizontalFlip(),
            v2.RandomRotation(15),
            v2.ColorJitter(brightness=0.2, contrast=0.2, saturation=0.2, hue=0.2),
        ]),
        normalize=v2.Compose([
            v2.ToDtype(torch.float32, scale=True),
            v2.Normalize(mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225)),
        ]))


def find_own_images(folder, names):
    """Class names and {split: (paths, labels)} of folder/train, folder/val, ..., one sub-folder per class in each."""
    class_names, found = None, {}
    for name in names:
        try:
            files = ImageFolder(folder / name, allow_empty=True)
        except OSError as error:
            raise UserError(f"{folder / name} must have one sub-folder of images per class ({first_line(error)})"
                            + "; or leave the test split out: --eval-splits val" * (name == "test")) from None
        class_names = class_names or files.classes
        if files.classes != class_names:
            odd = sorted(set(files.classes) ^ set(class_names))
            raise UserError(f"{folder / name} and {folder / 'train'} need the same classes; not in both: {listing(odd)}")
        empty = [c for i, c in enumerate(class_names) if i not in files.targets]
        if not files.targets or name == "train" and (empty or len(class_names) < 2):
            raise UserError(f"{folder / name} needs images of two or more classes; without any: {listing(empty)}")
        found[name] = [Path(path) for path, _ in files.samples], files.targets
    return class_names, found


def find_flowers102(folder, names):
    """Class names and {split: (paths, labels)} of Flowers-102 (Nilsback & Zisserman, 2008), downloaded if missing."""
    base, missing = folder / "flowers-102", []
    try:
        Flowers102(folder, download=True)
        splits = {name: Flowers102(folder, name) for name in names}
        missing = [path for split in splits.values() for path in split._image_files if not path.exists()]
        if missing:
            extract_flowers102(folder)
    except (OSError, RuntimeError) as error:
        wrong = [base / file for file, md5 in Flowers102._file_dict.values()
                 if (base / file).exists() and not check_integrity(base / file, md5)]
        state = f"damaged: {listing(wrong)}" if wrong else f"missing: {listing(missing or [base / 'jpg'])}"
        raise UserError(f"Flowers-102 is not whole ({state}) and cannot be downloaded ({first_line(error)}): connect to "
                        "the network and run again, set --data-dir, leave the test split out (--eval-splits val), or "
                        "try --demo, which needs no download") from None
    return Flowers102.classes, {name: (split._image_files, split._labels) for name, split in splits.items()}


def extract_flowers102(folder):
    """Unpack the images once more, downloading the archive unless it lies there whole."""
    archive, md5 = Flowers102._file_dict["image"]
    download_and_extract_archive(Flowers102._download_url_prefix + archive, str(folder / "flowers-102"), md5=md5)


def load_image(path):
    """An image file of any mode as upright RGB: transparency becomes white, an animation its first frame."""
    with Image.open(path) as image:
        image = ImageOps.exif_transpose(image)
        if image.mode.startswith("I;16"):
            image = image.point(lambda level: level / 256).convert("L")
        if image.has_transparency_data:
            image = image.convert("RGBA")
            image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
        return image.convert("RGB")


class DecodedFiles(Dataset):
    """Image files as pairs (uint8 [H, W, 3], error); of a file that cannot be read, zeros and the reason."""

    def __init__(self, paths, img_size):
        self.paths, self.img_size, self.resize = paths, img_size, make_transforms(img_size).resize

    def __len__(self):
        return len(self.paths)

    def __getitem__(self, index):
        try:
            return np.array(self.resize(load_image(self.paths[index]))), ""
        except Exception as error:  # decoders raise all kinds: OSError, SyntaxError, struct.error, ...
            return np.zeros((*self.img_size, 3), np.uint8), first_line(error)


class AugmentedViews(Dataset):
    """VIEWS views of each of `images` (uint8 [N, H, W, 3]); each depends on (SEED, view, image index) alone."""

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
    workers = min(os.cpu_count() if cfg.num_workers < 0 else cfg.num_workers, len(dataset) // batch_size)
    return DataLoader(dataset, batch_size, num_workers=workers, collate_fn=collate, worker_init_fn=ignore_interrupt)


def ignore_interrupt(_worker):
    """Ctrl-C reaches every process of a terminal; only the main one answers, and ends its workers."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def decode(paths, cfg):
    """Decode and resize once: uint8 [N, H, W, 3], and {path: reason} of the files that cannot be read."""
    images, unreadable = torch.empty((len(paths), *cfg.img_size, 3), dtype=torch.uint8), {}
    batches = batches_of(DecodedFiles(paths, cfg.img_size), 16, cfg)
    for start, (batch, errors) in zip(range(0, len(paths), 16), progress(batches, 16, "decoding")):
        images[start:start + len(batch)] = batch
        unreadable |= {path: error for path, error in zip(paths[start:], errors) if error}
    return images, unreadable


def load_data(cfg):
    """All images and labels that the run uses, decoded before any training: none can fail the run later."""
    folder, names = Path(cfg.data_dir), ["train", "val"] + ["test"] * ("test" in cfg.eval_splits)
    own = (folder / "train").is_dir()
    class_names, found = (find_own_images if own else find_flowers102)(folder, names)
    paths = [path for split_paths, _ in found.values() for path in split_paths]
    images, unreadable = decode(paths, cfg)
    if unreadable and not own:  # as an interrupted extraction leaves them
        try:
            extract_flowers102(folder)
            images, unreadable = decode(paths, cfg)
        except (OSError, RuntimeError):
            pass  # no network and no archive: the files are named below
    if unreadable:
        files = listing([f"{path} ({error})" for path, error in unreadable.items()])
        raise UserError(f"cannot read {files}: put whole images in their place and run again")
    parts = images.split([len(labels) for _, labels in found.values()])
    return Data(class_names, {name: Split(split_paths, torch.tensor(labels), part)
                              for (name, (split_paths, labels)), part in zip(found.items(), parts)})


# ---- Drawn flowers ---------------------------------------------------------------------------------------

DEMO = dict(data_dir="data/demo_flowers", img_size=(96, 96), views=4, eval_splits=("val",), weights="none",
            epochs_stage1=6, epochs_stage2=3, run_name="demo")
DEMO_NUMBERS = {"train": range(8), "val": range(8, 12)}  # of the pictures of each species
PETALS = ((0.8, 0.45, 0, 0.85), (0.75, 1, 0, 0.8), (1.3, 0.5, 0.32, 0.72), (0.6, 0.6, 0, 0.5),
          (0.9, 0.2, 0.1, 0.75), (1.9, 0.5, 0, 0.8), (0.5, 1.3, 0, 0.65))  # round, pointed, heart, narrow, ...
TONES = (0.58, 0.85), (0.84, 0.75), (0.47, 0.75), (0.7, 0.6)  # lightness and saturation of petals
CENTRES = (0.13, 0.55, 0.9), (0.07, 0.28, 0.6), (0.22, 0.5, 0.6), (0.12, 0.8, 0.8)  # yellow, brown, lime, cream
GROUNDS = (0.29, 0.28, 0.38), (0.56, 0.75, 0.5), (0.08, 0.3, 0.3)  # leaves, sky, soil


def draw_demo_images(folder):
    """Write drawn flowers of 102 species as a folder tree, as own images would lie there."""
    for split, numbers in DEMO_NUMBERS.items():
        for species in progress(range(102), len(numbers), f"drawing {split}"):
            (folder / split / f"species {species + 1:03d}").mkdir(parents=True, exist_ok=True)
            for number in numbers:
                draw_flower(species, number, 128).save(folder / split / f"species {species + 1:03d}" / f"{number}.png")


def draw_flower(species, number, size):
    """Picture `number` of a species as PIL image of `size` pixels: a species has a look, a picture pose and light."""

    def rgb(hue, lightness, saturation):
        return 255 * np.array(hls_to_rgb(hue, lightness, saturation))

    def petal(rise, fall, notch, width):  # from (0, 0) to (1, 0); rise shapes the base, fall and notch the tip
        around = np.linspace(0, 2 * math.pi, 32)
        t = (1 - np.cos(around)) / 2
        side = t**rise * (1 - t)**fall / np.max(t**rise * (1 - t)**fall)
        return np.c_[t - notch * t**6 * (1 - side), width * side * np.sign(math.pi - around)]

    def paint(outline, place, angle, length, colour, tilt=1.0):  # places and lengths are shares of the picture
        cos, sin = length * math.cos(angle), length * math.sin(angle)
        points = (outline @ np.array([[cos, sin * tilt], [-sin, cos * tilt]]) + place) * picture.width
        ImageDraw.Draw(picture).polygon(points.ravel().tolist(), tuple(colour.astype(int)))

    look, rng = np.random.default_rng(species), np.random.default_rng((species, number))
    hue = 0.53 + 0.63 * (species * 0.618034 % 1)  # golden steps, leaving out green, which would not stand out
    (lightness, saturation), (*shape, width) = TONES[species % 4], PETALS[species % 7]
    petals, rows = look.choice([4, 5, 6, 8, 12] if width > 0.7 else [6, 9, 13]), look.integers(1, 3)
    outline, core = petal(*shape, width * min(math.sin(math.pi / petals), 0.6)), look.uniform(0.14, 0.32)
    throats = (hue, lightness * 0.6, saturation), (hue + 0.12, lightness * 0.9, 0.9), (0.14, 0.88, 0.9)
    throat, centre, ground = (rgb(*look.choice(table)) for table in (throats, CENTRES, GROUNDS))
    middle, radius, tilt = rng.uniform(0.42, 0.58, 2), rng.uniform(0.32, 0.43), rng.uniform(0.8, 1)
    turn, lean, light = rng.uniform(-math.pi, math.pi), rng.normal(0, 0.15), rng.uniform(0.94, 1.06)
    colour = light * rgb(hue + rng.normal(0, 0.008), lightness + rng.normal(0, 0.015), saturation)

    leaf, stem, disc = petal(0.8, 0.9, 0, 0.2), petal(0.1, 0.1, 0, 0.013), petal(0.5, 0.5, 0, 0.5) * 2 - [1, 0]
    picture = Image.new("RGB", (48, 48), tuple(ground.astype(int)))
    for x, y, r in rng.uniform((0, 0, 0.06), (1, 1, 0.2), (18, 3)):
        paint(disc, (x, y), 0, r, ground * rng.normal(1.05, 0.18) + rng.normal(0, 5, 3))
    paint(disc, middle + 0.04, 0, 0.8 * radius, 0.65 * ground)  # the flower's shadow
    picture = picture.filter(ImageFilter.GaussianBlur(3)).resize((3 * size, 3 * size))
    green, node = light * rgb(0.27, 0.36, 0.45), middle + 0.48 * np.array([-math.sin(lean), math.cos(lean)])
    paint(stem, middle, math.pi / 2 + lean, 1, green)
    for slim, shade in (1, 0.75), (0.9, 1), (0.45, 1.12), (0.06, 0.8):
        paint(leaf * [1, slim], node, np.sign(lean) - math.pi / 2, 0.36, shade * green)
    layers = [(outline * [1.02, 1.07], 0.72 * colour)]  # a dark rim, then a gradient from colour to throat
    layers += [(outline * (1 - t), colour + (throat - colour) * t**1.3) for t in np.linspace(0, 0.8, 12)]
    for i in range(rows * petals):
        angle = turn + (i + i // petals / 2) * 2 * math.pi / petals + rng.normal(0, 0.04)
        length = radius * (1 - 0.3 * (i // petals)) * rng.normal(1, 0.03)
        for layer, tone in layers:  # lit from the upper left
            paint(layer, middle, angle, length, tone * (0.95 + 0.06 * math.cos(angle + 2.2)), tilt)
    paint(disc, middle, 0, 1.12 * radius * core, 0.5 * centre, tilt)
    for i, shade in enumerate(np.linspace(1.3, 0.8, 60)):  # seeds, in a sunflower's golden-angle spiral
        paint(disc / 9 + [i**0.5 / 8, 0], middle, 2.4 * i, radius * core, shade * centre, tilt)
    return picture.reduce(3)  # drawn three times too large, as shrinking smooths the edges


# ---- Model -----------------------------------------------------------------------------------------------


def build_model(num_classes, state=None, seed=0):
    """torchvision's EfficientNet-B3 with `num_classes`, in eval mode; `state`: weights, perhaps without a classifier."""
    torch.manual_seed(seed)
    model = efficientnet_b3(num_classes=num_classes).eval()
    if state is not None:
        missing, foreign = model.load_state_dict(state, strict=False)
        odd = foreign + [key for key in missing if not key.startswith("classifier.")]
        if odd:
            raise ValueError(f"missing or foreign keys: {listing(odd)}")
    return model


def load_pretrained(weights):
    """The backbone's state dict that WEIGHTS names, without a classifier, or None for random weights."""
    if weights == "none":
        return None
    try:
        if weights == "IMAGENET1K_V1":
            state = EfficientNet_B3_Weights.IMAGENET1K_V1.get_state_dict(progress=True, check_hash=True)
        else:
            state = torch.load(weights, map_location="cpu", weights_only=True)
        state = {key: value.float() for key, value in state.get("model", state).items() if "classifier." not in key}
        build_model(2, state)
        return state
    except OSError as error:
        raise UserError(f"cannot get the weights {weights} ({first_line(error)}): connect to the network, set --weights "
                        "to a file that exists or to none, or try --demo, which needs no download") from None
    except Exception as error:  # whatever a foreign file makes of the unpickler
        raise UserError(f"{weights} is no state dict of EfficientNet-B3 ({first_line(error)})") from None


def split_model(model, blocks):
    """The frozen and the unfrozen layers of `model.features` where its last `blocks` blocks are unfrozen.

    Both are sequences of the model's own layers: training the one trains the model. The pooling ends the unfrozen
    sequence, or, where no block is unfrozen, the frozen one.
    """
    cut = len(model.features) - blocks
    frozen, unfrozen = list(model.features[:cut]), list(model.features[cut:])
    (unfrozen if blocks else frozen).append(GlobalAveragePool())
    model.requires_grad_(False)
    return nn.Sequential(*frozen), nn.Sequential(*unfrozen).requires_grad_(True)


class GlobalAveragePool(nn.Module):
    """torchvision's `avgpool` and `flatten` in one: [B, C, H, W] to float32 [B, C]."""

    def forward(self, x):
        return x.float().mean((2, 3))


def start_without_pretraining(model, images, run):
    """Make random weights say something: identity-like blocks, then BatchNorm statistics from `images`.

    Zero-initialised residual branches (Goyal et al., 2017) and a bias that keeps SiLU in its near-linear range let
    colour and shape through 26 random layers, which would otherwise scramble them.
    """
    for module in model.features.modules():
        if isinstance(module, Conv2dNormActivation) and len(module) == 3:
            nn.init.ones_(module[1].bias)
        if isinstance(module, MBConv) and module.use_res_connect:
            nn.init.zeros_(module.block[-1][1].weight)
    layers = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
    for layer in layers:
        layer.train().momentum = None  # cumulative: the mean over all batches
    order, normalize = torch.randperm(len(images))[:1024], make_transforms(run.cfg.img_size).normalize
    with torch.no_grad():
        for batch in progress(order.split(64), 64, "BatchNorm statistics"):
            model.features(normalize(images[batch].to(run.device).permute(0, 3, 1, 2)))
    for layer in layers:
        layer.eval().momentum = 0.1


# ---- Frozen activations ----------------------------------------------------------------------------------
#
# A frozen network is a fixed function: what it says about an image need be computed once, not in every epoch.
#
#     JPEG --once--> 300x300 uint8 in memory
#          --once per view--> augmented view --> activations at the cut (232x10x10, 46 kB in half precision)
#          --in every step--> unfrozen blocks --> head --> loss
#
# With 8 views, 13 epochs cost 9,180 passes through the frozen part instead of 27,540, and as its weights are fixed,
# each pass can run in its fastest form. Further epochs cost the trainable part only.


def fast_copy(layers, run):
    """A copy of layers for inference: BatchNorm folded into the convolutions, channels_last, half precision."""
    layers = copy.deepcopy(layers).eval().requires_grad_(False)
    for block in layers.modules():
        if isinstance(block, Conv2dNormActivation):
            block[0], block[1] = nn.utils.fusion.fuse_conv_bn_eval(block[0], block[1]), nn.Identity()
    return layers.to(run.device, run.dtype, memory_format=torch.channels_last)


class FrozenPart(nn.Module):
    """Frozen layers in their fastest form, from decoded images uint8 [B, H, W, 3] to activations."""

    def __init__(self, layers, run):
        super().__init__()
        self.layers, self.device, self.dtype = fast_copy(layers, run), run.device, run.dtype
        self.normalize = make_transforms(run.cfg.img_size).normalize

    @torch.no_grad()
    def forward(self, images):
        images = images.to(self.device).permute(0, 3, 1, 2)  # of this layout, the permutation is channels_last
        return self.layers(self.normalize(images).to(self.dtype))

    def collate(self, images):
        """Batch a list of images and send it through, in whichever process calls."""
        return self(torch.stack(images))


def cache_activations(frozen, split, data, run, augment=False):
    """What `frozen` says about the images of a split: about each as it is, or about VIEWS augmented views of each.

    Returns activations [views, N, C, h, w] ([views, N, C] after pooling) on the device. A second call costs nothing.
    """
    if split in run.activations:
        return run.activations[split]
    images, size, part = data.splits[split].images, inference_batch_size(run), FrozenPart(frozen, run)
    views = AugmentedViews(images, run.cfg) if augment else images
    # A GPU is fed by all processes; processors are busiest when each one takes its batches all the way.
    collate = part.collate if run.device.type == "cpu" else torch.stack
    batches = progress(batches_of(views, size, run.cfg, collate), size, f"frozen part, {split}")
    with run.phase(f"frozen part, {split}"):
        outputs = collected(batches if run.device.type == "cpu" else map(part, batches), len(views))
        run.activations[split] = outputs.unflatten(0, (-1, len(images)))
    return run.activations[split]


def collected(batches, count):
    """One tensor [count, ...] of all batches of an iterable."""
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
    batches = activations.flatten(0, 1).split(4 * inference_batch_size(run))
    return collected(map(fast_copy(layers, run), batches), math.prod(activations.shape[:2])).unflatten(
        0, activations.shape[:2])


def inference_batch_size(run):
    """Images per pass: few enough for a processor's cache, enough to fill a GPU."""
    return 4 if run.device.type == "cpu" else 128


def check_memory(frozen, data, run):
    """UserError if the activations of all splits would not fit into memory."""
    with torch.no_grad():
        one = frozen(torch.zeros(1, 3, *run.cfg.img_size, device=run.device)).numel() * run.dtype.itemsize
    images = {name: len(split.labels) for name, split in data.splits.items()}
    need = one * (sum(images.values()) + (run.cfg.views - 1) * images["train"])
    if run.device.type == "cuda":
        there = torch.cuda.mem_get_info()[0]
    elif hasattr(os, "sysconf"):
        there = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    else:
        return
    if need > 0.8 * there:
        raise UserError(f"the activations need {need / 1e9:.1f} GB of the {there / 1e9:.1f} GB of memory: lower VIEWS, "
                        "UNFREEZE_LAST_BLOCKS or IMG_SIZE")


# ---- Heads -----------------------------------------------------------------------------------------------
#
# Ten images per class are few: a head soon knows its training images by heart, and its loss on them says nothing of
# other images. So FOLDS + 1 heads are trained side by side: head k never sees the images of fold k, the last one
# sees all and goes into the model. What the heads say of their left-out images is honest: the unfrozen blocks learn
# from it, and it sets the temperature (cross-fitting, Chernozhukov et al., 2018).


class Heads(nn.Module):
    """FOLDS + 1 linear heads on the same features; the only image of a class is in no fold, as each head needs it."""

    def __init__(self, labels, linear, cfg):
        super().__init__()
        order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(mix_seed(cfg.seed, 0)))
        folds = torch.full_like(labels, cfg.folds)
        for members in (order[labels[order] == label] for label in labels.unique()):
            if len(members) > 1:
                folds[members] = torch.arange(len(members)) % cfg.folds
        self.weight = nn.Parameter(linear.weight.detach().cpu().repeat(cfg.folds + 1, 1, 1))
        self.bias = nn.Parameter(linear.bias.detach().cpu().repeat(cfg.folds + 1, 1))
        self.register_buffer("labels", labels)
        self.register_buffer("folds", folds)

    def forward(self, features):
        """Logits [FOLDS + 1, B, classes] of features [B, D]."""
        return torch.einsum("bd,kcd->kbc", features, self.weight) + self.bias[:, None]

    def logits_by(self, heads, features):
        """Logits [B, classes] of features [B, D], image i by the head number `heads[i]`, which does not learn."""
        return torch.einsum("bd,bcd->bc", features, self.weight.detach()[heads]) + self.bias.detach()[heads]

    def seen(self, images):
        """Which head learns from which of `images` (indices [B]): bool [FOLDS + 1, B]."""
        seen = self.folds[images] != torch.arange(len(self.weight), device=images.device)[:, None]
        seen[-1] = True
        return seen

    @torch.no_grad()
    def solve(self, features, shrinkage):
        """Set all heads in closed form from features [views, N, D]: linear discriminant analysis, then a temperature.

        The weights are those of scikit-learn's LinearDiscriminantAnalysis(solver="lsqr", shrinkage=shrinkage), but
        sums that the heads share are taken once, which is many times faster. They come too confident: all logits
        are scaled by the one factor that gives the lowest cross-entropy on left-out images.
        """
        features, labels, folds = features.cpu(), self.labels.cpu(), self.folds.cpu()
        parts = []  # by fold, the sums that the analysis needs
        for fold in range(len(self.weight)):
            x, y = features[:, folds == fold].flatten(0, 1).double(), labels[folds == fold].repeat(len(features))
            sums = torch.zeros(self.weight.shape[1:], dtype=x.dtype).index_add(0, y, x)
            parts.append((x.T @ x, sums, y.bincount(minlength=len(sums))))
        totals = [sum(part) for part in zip(*parts)]
        parts[-1] = 0, 0, 0  # the last head leaves nothing out
        for head, part in enumerate(parts):
            weight, bias = discriminant(*(total - left_out for total, left_out in zip(totals, part)), shrinkage)
            self.weight[head], self.bias[head] = weight, bias
        images = (folds < len(parts) - 1).nonzero().flatten().to(self.weight.device)
        if not len(images):
            return
        logits = [self.logits_by(self.folds[images], view[images.cpu()].to(images.device)) for view in features]
        logits, targets = torch.cat(logits).cpu(), labels[images.cpu()].repeat(len(features))
        factor = math.exp(minimize_scalar(lambda log: F.cross_entropy(logits * math.exp(log), targets).item(),
                                          bounds=(-10, 5), method="bounded").x)
        self.weight.mul_(factor)
        self.bias.mul_(factor)


def discriminant(products, sums, counts, shrinkage):
    """Weights [classes, D] and bias [classes] of linear discriminant analysis with a shrunk covariance matrix.

    Of features x: the sum of x x^T [D, D], by class the sum of x [classes, D] and the number of x [classes].
    """
    means, priors = sums / counts[:, None], counts / counts.sum()
    covariance = products / counts.sum() - means.T @ (priors[:, None] * means)
    alike = covariance.trace() / len(covariance) * torch.eye(len(covariance), dtype=covariance.dtype)
    weight = torch.linalg.solve((1 - shrinkage) * covariance + shrinkage * alike, means.T).T
    return weight, priors.log() - (weight * means).sum(1) / 2


# ---- Training --------------------------------------------------------------------------------------------

# number, epochs before and with this stage (counted over both), peak learning rate, unfrozen blocks
Stage = namedtuple("Stage", "number first last lr blocks")


def stages_of(cfg):
    """Stage 1: the head on the frozen backbone; stage 2: the last feature blocks too."""
    epochs = cfg.epochs_stage1 + cfg.epochs_stage2
    return (Stage(1, 0, cfg.epochs_stage1, cfg.lr_stage1, 0),
            Stage(2, cfg.epochs_stage1, epochs, cfg.lr_stage2, cfg.unfreeze_last_blocks))


def learning_rate(stage, done):
    """The rate after `done` epochs and parts of one: linear warm-up over a tenth of the stage, then cosine to zero."""
    share = (done - stage.first) / (stage.last - stage.first)
    return stage.lr * (share / 0.1 if share < 0.1 else 0.5 + 0.5 * math.cos(math.pi * (share - 0.1) / 0.9))


def train_mode(blocks):
    """Stochastic depth on; BatchNorm keeps its pretrained statistics: a batch of 32 would estimate worse ones."""
    blocks.train()
    for module in blocks.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eval()


def features_of(blocks, activations, run):
    """Pooled features float32 [B, D] of a batch of activations."""
    with torch.autocast(run.device.type, run.dtype, enabled=run.dtype != torch.float32):
        return blocks(activations).float()


def train_one_epoch(blocks, heads, activations, optimizer, scaler, stage, epoch, run):
    """One pass over `activations` [N, ...] in random order: the mean loss and the accuracy on left-out images."""
    cfg = run.cfg
    train_mode(blocks)
    torch.manual_seed(mix_seed(cfg.seed, epoch))  # an epoch is the same whether the run was interrupted or not
    batches = torch.randperm(len(activations)).to(run.device).split(cfg.batch_size)
    loss_sum, right = 0.0, 0
    for number, images in enumerate(progress(batches, cfg.batch_size, f"epoch {epoch}"), 1):
        for group in optimizer.param_groups:
            group["lr"] = group["factor"] * learning_rate(stage, epoch - 1 + number / len(batches))
        features, targets, seen = features_of(blocks, activations[images], run), heads.labels[images], heads.seen(images)
        judges = heads.folds[images] if cfg.cross_fit else torch.full_like(images, cfg.folds)
        logits = heads.logits_by(judges, features)
        loss = F.cross_entropy(logits, targets)
        loss_of_heads = F.cross_entropy(heads(features.detach())[seen], targets.expand_as(seen)[seen], reduction="sum")
        if not torch.isfinite(loss + loss_of_heads):
            raise RunError(f"the loss is {loss.item()} in epoch {epoch}, batch {number}: lower LR_STAGE{stage.number} or "
                           "set AMP to False; the checkpoints of the epochs before are whole")
        optimizer.zero_grad()
        scaler.scale(loss + loss_of_heads / len(images)).backward()
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


def refit(heads, blocks, activations, run):
    """Solve the heads on the features of the fine-tuned blocks and take the mean with the trained heads.

    Both classify the same features; the mean of two linear heads is a linear head, and here better than either.
    """
    trained = copy.deepcopy(heads)
    heads.solve(pass_through(blocks, activations, run), run.cfg.shrinkage)
    with torch.no_grad():
        for solved, other in zip(heads.parameters(), trained.parameters()):
            solved.lerp_(other, 0.5)


def fit(model, data, state, config, run):
    """Train both stages, from the beginning or from the `state` after the last whole epoch; returns the history."""
    cfg, history = run.cfg, list(state["history"]) if state else []
    print("stage  epoch        lr  train loss   train acc  val loss   val acc  seconds  best")
    for number in range(len(history)):
        print_epoch(history[:number + 1])
    if len(history) == cfg.epochs_stage1 + cfg.epochs_stage2:
        return history
    frozen, _ = split_model(model, cfg.unfreeze_last_blocks)
    check_memory(frozen, data, run)
    train_cut = cache_activations(frozen, "train", data, run, augment=True)
    val_cut = cache_activations(frozen, "val", data, run)
    heads = Heads(data.splits["train"].labels, model.classifier[1], cfg).to(run.device)
    if state:
        heads.load_state_dict(state["heads"])
    for stage in stages_of(cfg):
        if history and len(history) >= stage.last:
            continue
        frozen_now, blocks = split_model(model, stage.blocks)
        with run.phase(f"stage {stage.number}"):
            beyond = frozen_now[len(frozen):]  # stage 1 is frozen beyond the cut, up to the head
            train, val = (pass_through(beyond, activations, run) for activations in (train_cut, val_cut))
            if not history and stage.number == 1 and cfg.head_init == "lda":
                heads.solve(train, cfg.shrinkage)
            fit_stage(stage, model, blocks, heads, train, val[0], data, history, state, config, run)
    return history


def fit_stage(stage, model, blocks, heads, train, val, data, history, state, config, run):
    """The epochs of one stage that `history` lacks; each ends with its checkpoint and its line in the table.

    `train` [views, N, ...] and `val` [M, ...] are activations at the point where the stage's frozen part ends.
    """
    optimizer = torch.optim.Adam([{"params": heads.parameters(), "factor": 1.0},
                                  {"params": blocks.parameters(), "factor": run.cfg.blocks_lr_factor}])
    scaler = torch.amp.GradScaler(run.device.type, enabled=run.dtype == torch.float16)
    if len(history) > stage.first:
        optimizer.load_state_dict(state["optimizer"])
        scaler.load_state_dict(state["scaler"])
    labels = data.splits["val"].labels
    for epoch in range(len(history) + 1, stage.last + 1):
        start = time.perf_counter()
        view = train[(epoch - 1) % len(train)]
        loss, accuracy = train_one_epoch(blocks, heads, view, optimizer, scaler, stage, epoch, run)
        if epoch == stage.last and stage.blocks and run.cfg.refit_head:
            refit(heads, blocks, train, run)
        with torch.no_grad():
            model.classifier[1].weight.copy_(heads.weight[-1])
            model.classifier[1].bias.copy_(heads.bias[-1])
        logits = predict_logits(blocks, model.classifier, val, run)
        history.append({
            "stage": stage.number, "epoch": epoch, "lr": learning_rate(stage, max(epoch - 0.5, stage.first)),
            "train_loss": loss, "train_acc": accuracy, "val_loss": F.cross_entropy(logits, labels).item(),
            "val_acc": (logits.argmax(1) == labels).float().mean().item(), "seconds": time.perf_counter() - start})
        save_epoch(model, heads, optimizer, scaler, history, data, config, run)
        print_epoch(history)


def best_epoch(history):
    """The row with the highest validation accuracy; of equals, the one with the lower loss, then the earlier one."""
    return max(history, key=lambda row: (row["val_acc"], -row["val_loss"]))


def print_epoch(history):
    """The line of the last epoch in `history`, with a mark if it is the best so far."""
    row = history[-1]
    print(f"{row['stage']:>5} {row['epoch']:>6} {row['lr']:>9.1e} {row['train_loss']:>11.4f} "
          f"{100 * row['train_acc']:>9.2f} % {row['val_loss']:>9.4f} {100 * row['val_acc']:>7.2f} % "
          f"{row['seconds']:>8.1f}  {'*' * (best_epoch(history) is row)}", flush=True)


# ---- Checkpoints -----------------------------------------------------------------------------------------

RUN_FILES = ("best.pth", "last.pth", "loss.png", "acc.png", "confusion_matrix.png", "mistakes.png", "report.txt",
             "metrics.json", "history.csv", "predictions.csv", "config.json")
# Constants that say where, how fast or how much to tell; weights and images count by their content.
WITHOUT_EFFECT = {"data_dir", "num_workers", "eval_splits", "weights", "device", "amp", "run_name", "out_dir"}


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
        raise RunError(f"cannot write {path} ({error.strerror}): what was there before is whole; make room and run the "
                       "same command again") from None


def save_checkpoint(path, state):
    """Write `state` (plain Python and tensors) as a file that `torch.load(path, weights_only=True)` reads."""
    buffer = io.BytesIO()
    torch.save(state, buffer)
    write_file(path, buffer.getbuffer())


def save_epoch(model, heads, optimizer, scaler, history, data, config, run):
    """Write the last checkpoint, and before it, if the epoch is the best so far, the best one.

    In this order: a run killed between the two repeats the epoch, with the same result, and writes both again.
    """
    state = {"model": model.state_dict(), "class_names": data.class_names, "config": config, "history": history,
             "best_accuracy": best_epoch(history)["val_acc"]}
    if best_epoch(history) is history[-1]:
        save_checkpoint(run.file("best.pth"), state)
    save_checkpoint(run.file("last.pth"), state | {"heads": heads.state_dict(), "optimizer": optimizer.state_dict(),
                                                   "scaler": scaler.state_dict()})


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
        raise UserError(f"{path} is damaged or no checkpoint of this program ({first_line(error)})") from None


def fingerprint(data, pretrained, run):
    """All that the result of a run depends on, as plain values: runs with the same fingerprint are the same run."""
    images, weights = hashlib.sha256(repr(data.class_names).encode()), hashlib.sha256()
    for split in (data.splits["train"], data.splits["val"]):
        images.update(split.labels.numpy())
        images.update(split.images.numpy())
    for key, value in sorted((pretrained or {}).items()):
        weights.update(key.encode() + value.numpy().tobytes())
    constants = {name: getattr(run.cfg, name) for name in CONSTANTS if name not in WITHOUT_EFFECT}
    return {**constants, "transforms": repr(make_transforms(run.cfg.img_size)), "images": images.hexdigest(),
            "weights": weights.hexdigest(), "device": run.device.type, "precision": str(run.dtype)}


def find_state(config, run):
    """The state of this very run after its last whole epoch, or None; the files of any other run are moved aside."""
    files = [run.file(name) for name in RUN_FILES if run.file(name).exists()]
    try:
        if run.cfg.fresh or not run.file("last.pth").exists():
            raise UserError("--fresh" if run.cfg.fresh else "no last checkpoint")
        state, best = load_checkpoint(run.file("last.pth")), load_checkpoint(run.file("best.pth"))
        changed = [key for key in config if config[key] != state["config"].get(key)]
        if not changed and best["config"] == config:
            return state
        raise UserError(f"changed: {listing(changed, 9)}" if changed else "the best checkpoint is of another run")
    except UserError as reason:
        if files:
            number = 1
            while run.file(f"old{number}").exists():
                number += 1
            run.file(f"old{number}").mkdir()
            for file in files:
                file.rename(run.file(f"old{number}") / file.name)
            print(f"new run    {reason}; the files of the earlier run are now in {run.file(f'old{number}')}")
    return None


# ---- Reports ---------------------------------------------------------------------------------------------


def measure(probabilities, labels):
    """The figures of one split from `probabilities` (float [N, classes]) and `labels` (int64 [N]), as plain numbers."""
    confidence, predicted = probabilities.max(1)
    right = (predicted == labels).float()
    share, count, z = right.mean().item(), len(labels), 1.96
    middle, half = share + z**2 / (2 * count), z * math.sqrt(share * (1 - share) / count + (z / (2 * count))**2)
    bins = (confidence * 15).long().clamp_max(14)  # ECE: Guo et al., 2017
    gaps = torch.zeros(15).index_add(0, bins, confidence - right)
    likeliest = probabilities.topk(min(5, probabilities.shape[1])).indices
    return {"images": count, "accuracy": share,
            "wilson_95": [(middle - half) / (1 + z**2 / count), (middle + half) / (1 + z**2 / count)],
            "balanced_accuracy": float(balanced_accuracy_score(labels, predicted)),
            "macro_f1": float(f1_score(labels, predicted, labels=labels.unique(), average="macro")),
            "top5_accuracy": (likeliest == labels[:, None]).any(1).float().mean().item(),
            "log_loss": F.nll_loss(probabilities.clamp_min(1e-12).log(), labels).item(),
            "expected_calibration_error": gaps.abs().sum().item() / count}


def most_confused(confusion, class_names, limit=12):
    """Lines on the largest off-diagonal cells of `confusion` (int [classes, classes], rows true)."""
    totals = confusion.sum(1)
    cells = [(int(confusion[t, p]), int(totals[t]), t, p) for t, p in np.argwhere(confusion) if t != p]
    cells.sort(key=lambda cell: (-cell[0], cell[1]))  # of equal counts, the larger share of its class first
    return [(f"{count} of {total} {class_names[t]}", f"taken for {class_names[p]}")
            for count, total, t, p in cells[:limit]]


def plot_curves(history, key, label):
    """Training and validation `key` ("loss", or "acc" in %) over the epochs of both stages."""
    scale, form = (100, "{:.1f} %") if key == "acc" else (1, "loss {:.3f}")
    epochs, stages, best = [row["epoch"] for row in history], [row["stage"] for row in history], best_epoch(history)
    figure = Figure(figsize=(7.5, 4.2), layout="constrained")
    axes, (blue, orange, green) = figure.subplots(), sns.color_palette("colorblind")[:3]
    for part, name, colour in (("train", "training (left-out folds)", blue), ("val", "validation", orange)):
        axes.plot(epochs, [scale * row[f"{part}_{key}"] for row in history], ".-", c=colour, lw=2, label=name)
    height = scale * best[f"val_{key}"]
    axes.plot(best["epoch"], height, "o", c=green, ms=10, mec="white",
              label=f"best epoch: {best['epoch']}, {form.format(height)}")
    # All words stand outside the axes, where no line can run into them.
    for stage, name, side in ((1, "head", "left"), (2, "fine-tuning", "right")):
        axes.set_title(f"stage {stage}: {name}" if stage in stages else "", loc=side, size=10, color="0.35")
    if stages[0] != stages[-1]:
        axes.axvline(epochs[stages.index(2)] - 0.5, color="0.35", ls="--", lw=1.2)
    axes.set(xlim=(epochs[0] - 0.5, epochs[-1] + 0.5), xlabel="Epoch", ylabel=label)
    axes.xaxis.set_major_locator(MaxNLocator(15, integer=True, min_n_ticks=1))
    axes.grid(alpha=0.3)
    sns.despine(ax=axes)
    figure.legend(loc="outside lower center", ncols=3, frameon=False)
    return figure


def plot_confusion_matrix(confusion, class_names, split):
    """Heat map of `confusion` (int [classes, classes], rows true) beside its most confused pairs."""
    pairs = ["\n".join(pair) for pair in most_confused(confusion, class_names)]
    classes, named = len(class_names), len(class_names) <= 150
    # Lengths in inches: 0.12 a class is what it takes to read the names. Sizes of text in points.
    side = max(6.5, 0.12 * classes) if named else 12
    cell, size = 72 * side / classes, min(18, 1.9 * side)
    name_length = 0.6 * min(12, 0.85 * cell) * max(map(len, class_names)) / 72 * named
    turned = name_length > side / classes
    panel = 0.56 * size / 72 * max([24] + [len(line) for pair in pairs for line in pair.split("\n")])
    figure = Figure((side + name_length + panel + 0.7, side + turned * name_length + 1), layout="constrained")
    axes, beside, bar = figure.subplot_mosaic("mp;mb", width_ratios=[side, panel], height_ratios=[side, 0.2]).values()
    share = confusion / np.maximum(confusion.sum(1, keepdims=True), 1)
    norm = PowerNorm(0.5, vmin=1e-9, vmax=1)  # the root lifts single mistakes off the white of the empty cells
    sns.heatmap(share, norm=norm, cmap=sns.color_palette("mako_r", as_cmap=True).with_extremes(under="white"),
                linewidths=0.3 * named, linecolor="0.9", xticklabels=False, yticklabels=False, ax=axes, cbar_ax=bar,
                cbar_kws={"orientation": "horizontal", "ticks": [0.01, 0.1, 0.25, 0.5, 1],
                          "format": PercentFormatter(1, 0, " %"), "label": "share of the true class's images"})
    if named:
        ticks, text = np.arange(classes) + 0.5, {"size": min(12, 0.85 * cell)}
        axes.set_xticks(ticks, class_names, rotation=90 * turned, **text)
        axes.set_yticks(ticks, class_names, rotation=0, **text)
        axes.tick_params(length=0, pad=2)
        for t, p in np.argwhere(confusion):
            axes.text(p + 0.5, t + 0.5, confusion[t, p], ha="center", va="center_baseline", in_layout=False,
                      color="white" if share[t, p] > 0.25 else "black",
                      size=min(14, 0.75 * cell, 1.4 * cell / len(str(confusion[t, p]))))
    axes.spines[:].set(visible=True, color="0.7")
    axes.set_xlabel("predicted class", size=size)
    axes.set_ylabel("true class", size=size)
    axes.set_title(f"Confusion matrix, {split} split: {np.trace(confusion)} of {confusion.sum()} images right", size=size,
                   pad=size)
    beside.axis("off")
    beside.set_title("Most confused", loc="left", size=size, pad=size)
    for row, pair in enumerate(pairs or ["no mistakes"]):
        beside.text(0, 1 - row / 12, pair, va="top", size=size)
    return figure


def find_mistakes(model, split, probabilities, class_names, run, limit=12):
    """The most confident mistakes on a split, each with its class activation map (Zhou et al., 2016).

    Before the pooling, the evidence for a class is the sum of the feature maps weighted with its row of the head;
    what all rows share says nothing about the class and is taken out.
    """
    confidence, predicted = probabilities.max(1)
    wrong = (predicted != split.labels).nonzero().flatten()
    chosen = wrong[confidence[wrong].argsort(descending=True)[:limit]]
    part = FrozenPart(model.features, run)
    with torch.no_grad():
        maps = [part(split.images[i:i + 1])[0].float() for i in chosen]
        rows = model.classifier[1].weight - model.classifier[1].weight.mean(0)
        cams = [torch.einsum("chw,c->hw", m, rows[predicted[i]]).cpu().numpy() for m, i in zip(maps, chosen)]
    return [{"image": split.images[i].numpy(), "cam": cam, "true": class_names[split.labels[i]],
             "predicted": class_names[predicted[i]], "p_true": probabilities[i, split.labels[i]].item(),
             "p_predicted": confidence[i].item()} for i, cam in zip(chosen.tolist(), cams)]


def plot_mistakes(mistakes, split, wrong, count):
    """Photograph and activation map of each of `mistakes` (see find_mistakes), of `wrong` in `count` images."""
    rows = max(1, -(-len(mistakes) // 4))
    columns = max(1, -(-len(mistakes) // rows))
    width = max(3.6, 6 / columns)  # inches; 3.6 hold a name of 27 letters
    tall = width / 2 * max((m["image"].shape[0] / m["image"].shape[1] for m in mistakes), default=0)
    figure = Figure((columns * width, rows * (tall + 0.42) + 0.4), layout="constrained")
    figure.subplots(rows, columns, subplot_kw={"anchor": "N", "frame_on": False, "xticks": [], "yticks": []})
    for axes, m in zip(figure.axes, mistakes):
        photo, cam = m["image"] / 255, (m["cam"] - m["cam"].min()) / max(np.ptp(m["cam"]), 1e-9)
        cam = np.asarray(Image.fromarray(cam.astype(np.float32)).resize(photo.shape[1::-1], Image.BICUBIC)).clip(0, 1)
        # On the grey photograph all colour is the map's, whatever the colour of the flower.
        heat, alpha = sns.color_palette("inferno", as_cmap=True)(cam)[..., :3], 0.25 + 0.4 * cam[..., None]
        heat = alpha * heat + (1 - alpha) * photo.mean(2, keepdims=True)
        axes.imshow(np.hstack([photo, np.ones_like(photo[:, ::50]), heat]))
        axes.set_title(f"is {m['true']} ({100 * m['p_true']:.0f} %)\ntaken for {m['predicted']} "
                       f"({100 * m['p_predicted']:.0f} %)", loc="left", size=10)
    figure.suptitle(f"Most confident of {wrong} mistakes in {count} images, {split} split", size=14)
    return figure


def png_bytes(figure, dpi=150):
    """`figure` as PNG; 32 levels per colour channel look the same and halve the weight of photographs."""
    drawn, light = io.BytesIO(), io.BytesIO()
    figure.savefig(drawn, format="png", dpi=dpi)
    Image.open(drawn).convert("RGB").point(lambda level: level // 8 * 255 // 31).save(light, "png")
    return light.getvalue()


def summary(split, figures):
    """The figures of one split in two lines."""
    low, high = figures["wilson_95"]
    return (f"{split:10} accuracy {100 * figures['accuracy']:.2f} % (95 % Wilson interval {100 * low:.1f} to "
            f"{100 * high:.1f}), macro-F1 {figures['macro_f1']:.4f}, balanced {100 * figures['balanced_accuracy']:.2f} %,\n"
            f"{'':10} top-5 {100 * figures['top5_accuracy']:.2f} %, log loss {figures['log_loss']:.4f}, expected "
            f"calibration error {figures['expected_calibration_error']:.4f}, {figures['images']} images")


def csv_text(rows):
    """Dicts with the same keys as CSV, header first."""
    text = io.StringIO()
    writer = csv.DictWriter(text, rows[0].keys(), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def report(model, data, history, run):
    """Evaluate the best checkpoint on EVAL_SPLITS and write all figures and tables; the pictures show the first."""
    cfg, names, best = run.cfg, data.class_names, best_epoch(history)
    model.load_state_dict(load_checkpoint(run.file("best.pth"))["model"])
    frozen, blocks = split_model(model.eval(), cfg.unfreeze_last_blocks)
    figures, text, rows = {}, "", []
    for name in cfg.eval_splits:
        split, activations = data.splits[name], cache_activations(frozen, name, data, run)[0]
        probabilities = predict_logits(blocks, model.classifier, activations, run).softmax(1)
        values, likeliest = probabilities.topk(min(5, len(names)))
        confusion = confusion_matrix(split.labels, likeliest[:, 0], labels=range(len(names)))
        figures[name] = measure(probabilities, split.labels)
        table = classification_report(split.labels, likeliest[:, 0], labels=range(len(names)), target_names=names,
                                      digits=3, zero_division=0)
        f1 = f1_score(split.labels, likeliest[:, 0], labels=range(len(names)), average=None, zero_division=0)
        worst = "\n".join(f"  {names[i]} {f1[i]:.3f}" for i in f1.argsort(kind="stable")[:10])
        pairs = "\n".join("  " + " ".join(pair) for pair in most_confused(confusion, names))
        text += f"{summary(name, figures[name])}\n\nlowest F1\n{worst}\n\nmost confused\n{pairs}\n\n{table}\n\n"
        rows += [{"file": os.path.relpath(path, cfg.data_dir), "split": name, "true": names[label],
                  "predicted": names[best_five[0]], "probability": f"{value:.4f}",
                  "top5": "; ".join(names[i] for i in best_five)} for path, label, value, best_five
                 in zip(split.paths, split.labels.tolist(), values[:, 0].tolist(), likeliest.tolist())]
        if name == cfg.eval_splits[0]:
            mistakes = find_mistakes(model, split, probabilities, names, run)
            count, wrong = len(split.labels), len(split.labels) - np.trace(confusion)
            write_file(run.file("mistakes.png"), png_bytes(plot_mistakes(mistakes, name, wrong, count), dpi=100))
            write_file(run.file("confusion_matrix.png"), png_bytes(plot_confusion_matrix(confusion, names, name)))
    write_file(run.file("loss.png"), png_bytes(plot_curves(history, "loss", "Cross-entropy loss")))
    write_file(run.file("acc.png"), png_bytes(plot_curves(history, "acc", "Accuracy (%)")))
    write_file(run.file("report.txt"), text)
    write_file(run.file("history.csv"), csv_text(history))
    write_file(run.file("predictions.csv"), csv_text(rows))
    metrics = {"best_epoch": best["epoch"], "splits": figures, "seconds": run.seconds}
    write_file(run.file("metrics.json"), json.dumps(metrics, indent=1) + "\n")
    print(f"\nbest       epoch {best['epoch']} of {len(history)}")
    for name in cfg.eval_splits:
        print(summary(name, figures[name]))


# ---- Prediction ------------------------------------------------------------------------------------------


def predict(run):
    """Print the five likeliest classes of each image in the files and folders of --predict; returns the exit code."""
    paths = []
    for path in map(Path, run.cfg.predict):
        inside = sorted(file for file in path.rglob("*") if file.suffix.lower() in IMG_EXTENSIONS)
        if not path.exists() or path.is_dir() and not inside:
            raise UserError(f"{path} {'has no images' if path.exists() else 'does not exist'}: name images or folders")
        paths += inside if path.is_dir() else [path]
    state = load_checkpoint(Path(run.cfg.checkpoint) if run.cfg.checkpoint else run.file("best.pth"))
    run.cfg.img_size, names, failed = state["config"]["img_size"], state["class_names"], {}
    model = build_model(len(names), state["model"]).to(run.device)
    features = FrozenPart(nn.Sequential(model.features, GlobalAveragePool()), run)
    for chunk in (paths[start:start + 2048] for start in range(0, len(paths), 2048)):
        images, unreadable = decode(chunk, run.cfg)
        size = inference_batch_size(run)
        with torch.no_grad():
            pooled = collected(map(features, progress(images.split(size), size, "predicting")), len(chunk))
            values, likeliest = model.classifier(pooled).softmax(1).cpu().topk(min(5, len(names)))
        for path, *five in zip(chunk, values.tolist(), likeliest.tolist()):
            if path in unreadable:
                print(f"{path}: cannot be read ({unreadable[path]})", file=sys.stderr)
            else:
                print(path, *(f"  {100 * value:5.1f} %  {names[i]}" for value, i in zip(*five)), sep="\n")
        failed |= unreadable
    return 1 if failed else 0


# ---- Command line ----------------------------------------------------------------------------------------


def read_constants():
    """The constants of the Configuration section by lower-case name: (value, its comment in this very file)."""
    section = Path(__file__).read_text(encoding="utf-8").split("# ---- Configuration")[1].split("# ---- Run")[0]
    return {name.lower(): (globals()[name], comment)
            for name, comment in re.findall(r"^([A-Z]\w+) = .+?  # (.+)$", section, re.MULTILINE)}


CONSTANTS = read_constants()
AT_LEAST_0, AT_LEAST_1 = (lambda v: v >= 0, "0 or more"), (lambda v: v >= 1, "1 or more")
POSITIVE = (lambda v: 0 < v < math.inf, "a number above 0")
CHECKS = {
    "img_size": (lambda v: len(v) == 2 and 32 <= min(v) and max(v) <= 2048, "two sizes from 32 to 2048"),
    "views": AT_LEAST_1,
    "eval_splits": (lambda v: v and set(v) <= {"val", "test"} and len(set(v)) == len(v), "val, test or both"),
    "num_workers": (lambda v: v >= -1, "-1 or more"),
    "unfreeze_last_blocks": (lambda v: 0 <= v <= 9, "from 0 to 9"),
    "head_init": (lambda v: v in ("lda", "random"), "lda or random"),
    "shrinkage": (lambda v: 0 < v <= 1, "above 0, at most 1"),
    "folds": (lambda v: v >= 2, "2 or more"),
    "epochs_stage1": AT_LEAST_0, "lr_stage1": POSITIVE,
    "epochs_stage2": AT_LEAST_0, "lr_stage2": POSITIVE, "blocks_lr_factor": POSITIVE,
    "batch_size": AT_LEAST_1, "seed": AT_LEAST_0,
    "run_name": (lambda v: v not in ("", ".", "..") and Path(v).name == v, "a file name without folders"),
}


class OneLineParser(argparse.ArgumentParser):
    """An argument parser whose complaint is one line."""

    def error(self, message):
        self.exit(2, f"error: {message} (see --help)\n")


def parse_command_line(argv):
    """The configuration as a namespace: every constant by its lower-case name, and the modes."""
    parser = OneLineParser(description=__doc__.split("\n\n")[0], allow_abbrev=False)
    parser.add_argument("--demo", action="store_true", help="a run on drawn flowers, without any download")
    parser.add_argument("--fresh", action="store_true", help="start anew; the files of an earlier run are moved aside")
    parser.add_argument("--predict", nargs="+", metavar="PATH", help="name the flowers in images and folders")
    parser.add_argument("--checkpoint", metavar="FILE", help="with --predict: another than the run's best one")
    group = parser.add_argument_group("constants")
    for name, (value, comment) in CONSTANTS.items():
        shown = " ".join(map(str, value)) if isinstance(value, tuple) else value
        how = {"default": value, "help": f"{comment.replace('%', '%%')} (default: {shown})"}
        if isinstance(value, bool):
            how["action"] = argparse.BooleanOptionalAction
        elif isinstance(value, tuple):
            how |= {"type": type(value[0]), "nargs": "+", "metavar": "X"}
        else:
            how |= {"type": type(value), "metavar": "X"}
        group.add_argument("--" + name.replace("_", "-"), **how)
    if "--demo" in argv:
        parser.set_defaults(**DEMO)
    cfg = parser.parse_args(argv)
    for name in CONSTANTS:
        value = getattr(cfg, name)
        value = tuple(value) if isinstance(value, list) else value
        setattr(cfg, name, value)
        valid, words = CHECKS.get(name, (lambda v: True, ""))
        if not valid(value):
            parser.error(f"{name.upper()} must be {words}, not {value!r}")
    if cfg.epochs_stage1 + cfg.epochs_stage2 == 0:
        parser.error("EPOCHS_STAGE1 and EPOCHS_STAGE2 must not both be 0")
    if cfg.checkpoint and not cfg.predict:
        parser.error("--checkpoint goes with --predict")
    return cfg


def choose_device(cfg):
    """The device, and the precision of inference and autocast on it."""
    name = cfg.device
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        device = torch.device(name)
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise UserError(f"no device {name!r} here ({first_line(error)}): set --device to auto or cpu") from None
    if device.type == "cuda":
        torch.backends.cudnn.deterministic = cfg.deterministic
        torch.use_deterministic_algorithms(cfg.deterministic, warn_only=True)
        return device, torch.float16 if cfg.amp else torch.float32
    processor = torch.cpu.get_capabilities()
    native = device.type == "cpu" and (processor.get("avx512_bf16") or processor.get("bf16"))
    return device, torch.bfloat16 if cfg.amp and native else torch.float32


def prepare_folder(run):
    """Make OUT_DIR, remove files left unfinished by a killed run, and check that new ones can be written."""
    try:
        Path(run.cfg.out_dir).mkdir(parents=True, exist_ok=True)
        for name in RUN_FILES:
            run.file(name + ".tmp").unlink(missing_ok=True)
        run.file("config.json.tmp").touch()
        run.file("config.json.tmp").unlink()
    except OSError as error:
        raise UserError(f"cannot write to the folder {run.cfg.out_dir} ({error.strerror}): set --out-dir to another "
                        "folder") from None


def train_and_report(run):
    """The whole run: data, model, both stages, reports; returns the exit code."""
    cfg, start = run.cfg, time.perf_counter()
    prepare_folder(run)
    print(f"device     {run.device}, {str(run.dtype).removeprefix('torch.')}", flush=True)
    if cfg.demo:
        print("demo       drawn flowers, no pretrained weights: this shows the program, its figures are no result")
        draw_demo_images(Path(cfg.data_dir))
    with run.phase("decoding"):
        data = load_data(cfg)
    sizes = ", ".join(f"{len(split.labels)} {name}" for name, split in data.splits.items())
    print(f"data       {cfg.data_dir}: {len(data.class_names)} classes; images: {sizes}", flush=True)
    pretrained = load_pretrained(cfg.weights)
    model = build_model(len(data.class_names), pretrained, cfg.seed).to(run.device)
    total, head = (sum(p.numel() for p in part.parameters()) for part in (model, model.classifier))
    unfrozen = sum(p.numel() for p in model.features[len(model.features) - cfg.unfreeze_last_blocks:].parameters())
    print(f"model      EfficientNet-B3, weights {cfg.weights}: {total:,} parameters, trained in stage 1 {head:,}, in "
          f"stage 2 {head + unfrozen:,}\n", flush=True)
    config = fingerprint(data, pretrained, run)
    state = find_state(config, run)
    write_file(run.file("config.json"), json.dumps({**vars(cfg), **config}, indent=1) + "\n")
    if state:
        model.load_state_dict(state["model"])
    elif not pretrained:
        start_without_pretraining(model, data.splits["train"].images, run)
    history = fit(model, data, state, config, run)
    with run.phase("reports"):
        report(model, data, history, run)
    print(f"files      {run.file('*')}\ntime       {time.perf_counter() - start:.0f} s")
    return 0


class Stopped(KeyboardInterrupt):
    """SIGINT or SIGTERM as an exception, so that worker processes are ended on the way out."""


def stop(number, _frame):
    """Signal handler."""
    raise Stopped(number)


def main(argv=None):
    """The program; returns its exit code: 2 for bad input, 1 for a run that failed, 128 + number for a signal."""
    cfg = parse_command_line(sys.argv[1:] if argv is None else argv)
    try:
        run = Run(cfg, *choose_device(cfg))
        return predict(run) if cfg.predict else train_and_report(run)
    except UserError as error:
        code, message = 2, f"error: {error}"
    except RunError as error:
        code, message = 1, f"error: {error}"
    except (torch.OutOfMemoryError, MemoryError) as error:
        code, message = 1, f"error: out of memory: lower BATCH_SIZE, VIEWS or IMG_SIZE ({first_line(error)})"
    except KeyboardInterrupt as error:
        code = 128 + (error.args[0] if error.args else signal.SIGINT)
        message = "stopped: all finished epochs are saved; the same command continues after them"
    print(message, file=sys.stderr)
    return code


if __name__ == "__main__":
    signal.signal(signal.SIGINT, stop)
    signal.signal(signal.SIGTERM, stop)
    sys.exit(main())
