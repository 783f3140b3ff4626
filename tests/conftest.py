"""Images that the tests draw themselves, and options that make a run take seconds."""
import hashlib
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from scipy.io import savemat
from torchvision.datasets import Flowers102, flowers102

sys.path.insert(0, str(Path(__file__).parent.parent))
COLOURS = {"blue": (40, 60, 220), "red": (220, 40, 50), "yellow": (230, 220, 60)}


def draw(path, colour, seed):
    """A noisy picture of one colour."""
    noise = np.random.default_rng(seed).integers(-30, 30, (40, 48, 3))
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray((np.array(colour) + noise).clip(0, 255).astype(np.uint8)).save(path)


@pytest.fixture
def own_images(tmp_path):
    """A folder of own images: three classes, six images of each to train on, three for validation, two to test."""
    for split, count in (("train", 6), ("val", 3), ("test", 2)):
        for offset, (name, colour) in enumerate(COLOURS.items()):
            for number in range(count):
                draw(tmp_path / "own" / split / name / f"{number}.png", colour, 100 * offset + 10 * count + number)
    return tmp_path / "own"


@pytest.fixture
def flowers(tmp_path, monkeypatch):
    """Flowers-102's own layout with 30 drawn images of three species; its checksums are those of the drawn files."""
    base = tmp_path / "data" / "flowers-102"
    for number in range(1, 31):
        draw(base / "jpg" / f"image_{number:05d}.jpg", list(COLOURS.values())[number % 3], number)
    savemat(base / "imagelabels.mat", {"labels": [[1 + number % 3 for number in range(1, 31)]]})
    savemat(base / "setid.mat", {"trnid": [range(1, 16)], "valid": [range(16, 25)], "tstid": [range(25, 31)]})
    sums = {key: (name, hashlib.md5((base / name).read_bytes()).hexdigest())
            for key, name in (("label", "imagelabels.mat"), ("setid", "setid.mat"))}
    monkeypatch.setattr(Flowers102, "_file_dict", {"image": ("102flowers.tgz", "0" * 32), **sums})
    monkeypatch.setattr(Flowers102, "classes", ["blue", "red", "yellow"])
    return tmp_path / "data"


@pytest.fixture
def options(own_images, tmp_path):
    """Options of a run of seconds on own images; later options override these."""
    torch.set_num_threads(1)
    return ["--data-dir", str(own_images), "--out-dir", str(tmp_path / "runs"), "--run-name", "t", "--weights", "none",
            "--img-size", "32", "32", "--views", "2", "--folds", "2", "--batch-size", "8", "--epochs-stage1", "2",
            "--epochs-stage2", "2", "--eval-splits", "val", "--num-workers", "0"]


@pytest.fixture
def no_network(monkeypatch):
    """Every download fails as it does without a network."""
    import efficientnet_b3

    def fail(*_args, **_kwargs):
        raise OSError("no network")

    for module, name in ((efficientnet_b3, "download_and_extract_archive"), (flowers102, "download_url"),
                         (flowers102, "download_and_extract_archive"), (torch.hub, "download_url_to_file")):
        monkeypatch.setattr(module, name, fail)
