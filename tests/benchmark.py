"""How much faster than a plain training loop is the program, and where does its time go?

    python tests/benchmark.py [--data-dir data] [--weights FILE] [any other option of the program]

The plain loop decodes and augments each image in every epoch in the main process and sends it through all of B3 in
float32, for training and for validation. A few batches of each of its stages are timed before and after the runs of
the program, and the medians are extrapolated to the full schedule. The program runs from nothing, then again with
other constants of stage 2, then on a tenth of the training images (to compare the memory), and names the flowers of
all images. Without --data-dir it draws its own images.
"""
import json
import os
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import pandas as pd
import torch
from PIL import Image
from torch import nn
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms import v2

sys.path.insert(0, str(Path(__file__).parent.parent))
import efficientnet_b3 as program  # noqa: E402

BATCHES = 2  # of each kind that are timed in a round, after one that warms up
ROUNDS = 2  # before the program's runs, and as many after them


class Images(Dataset):
    """Files decoded, resized and augmented (or not) each time they are asked for."""

    def __init__(self, split, cfg, augment):
        transforms = program.make_transforms(cfg)
        self.paths, self.labels = split.paths, split.labels
        last = transforms.augment if augment else transforms.centre
        self.transform = v2.Compose([transforms.resize, last, v2.ToImage(), transforms.normalize])

    def __len__(self):
        return len(self.paths)

    def __getitem__(self, index):
        return self.transform(Image.open(self.paths[index]).convert("RGB")), self.labels[index]


class PlainLoop:
    """The textbook loop: no workers, float32, the whole model on every image in every epoch."""

    def __init__(self, data, cfg):
        self.cfg = cfg
        self.model = program.build_model(len(data.class_names), program.load_pretrained(cfg.weights)).to(cfg.device)
        self.loaders = {name: DataLoader(Images(data.splits[name], cfg, augment=name == "train"), cfg.batch_size,
                                         shuffle=True) for name in ("train", "val")}

    def seconds_per_image(self, kind):
        """Of `kind` "stage 1", "stage 2" (training), "validation" or "forward" (without making the batches)."""
        blocks = {"stage 1": 0, "stage 2": self.cfg.unfreeze_last_blocks}.get(kind)
        self.model.requires_grad_(False).train(blocks is not None)
        if blocks is not None:
            self.model.classifier.requires_grad_(True)
            self.model.features[len(self.model.features) - blocks:].requires_grad_(True)
            optimizer = torch.optim.Adam(p for p in self.model.parameters() if p.requires_grad)
        batches = iter(self.loaders["val" if blocks is None else "train"])
        if kind == "forward":
            batches = iter([next(batches)] * (BATCHES + 1))
        for number in range(BATCHES + 1):
            if number == 1:
                start = time.perf_counter()
            images, labels = (part.to(self.cfg.device) for part in next(batches))
            loss = nn.functional.cross_entropy(self.model(images), labels)
            if blocks is not None:
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
            loss.item()  # waits for the device
        return (time.perf_counter() - start) / BATCHES / len(images)


def memory_of_group(leader):
    """Bytes of anonymous and shared memory of all processes of a group, each byte counted once (Linux; elsewhere 0)."""
    total = 0
    for process in Path("/proc").glob("[0-9]*"):
        try:
            if os.getpgid(int(process.name)) == leader:
                rows = (process / "smaps_rollup").read_text()
                total += 1024 * sum(map(int, re.findall(r"^Pss_(?:Anon|Shmem): +(\d+)", rows, re.MULTILINE)))
        except OSError:
            pass  # ended meanwhile
    return total


def whole_run(argv):
    """The program from the start of Python to its end: seconds, peak memory in bytes, what it printed."""
    start, peak, ended = time.perf_counter(), 0, threading.Event()
    process = subprocess.Popen([sys.executable, program.__file__, *argv], start_new_session=True, text=True,
                               stdout=subprocess.PIPE, stderr=subprocess.STDOUT)

    def watch():
        nonlocal peak
        while not ended.wait(0.5):
            peak = max(peak, memory_of_group(process.pid))

    watcher = threading.Thread(target=watch)
    watcher.start()
    printed = process.communicate()[0]
    seconds = time.perf_counter() - start
    ended.set()
    watcher.join()
    if process.returncode:
        sys.exit(f"the program ended with code {process.returncode}:\n{printed}")
    return seconds, peak, printed


def draw_images(folder):
    """102 classes, ten copies of one drawn flower of 500 pixels in train and in val."""
    for species in range(102):
        for number, split in enumerate(("train", "val")):
            path = Path(folder, split, f"{species:03d}")
            path.mkdir(parents=True)
            picture = program.draw_flower(species, number, 500)
            for copy in range(10):
                picture.save(path / f"{copy}.jpg", quality=90)


def benchmark(argv, folder):
    """Measure everything and print the tables."""
    if "--data-dir" not in argv:
        draw_images(Path(folder, "drawn"))
        argv = [*argv, "--data-dir", str(Path(folder, "drawn")), "--weights", "none"]
    argv = [*argv, "--out-dir", folder, "--run-name", "b", "--eval-splits", "val"]
    cfg = program.parse_command_line(argv)
    program.choose_device(cfg)
    data = program.find_images(cfg)
    plain, rounds = PlainLoop(data, cfg), []

    def measure_rounds():
        for _ in range(ROUNDS):
            rounds.append({kind: plain.seconds_per_image(kind)
                           for kind in ("stage 1", "stage 2", "validation", "forward")})

    measure_rounds()
    seconds, peak, printed = whole_run(argv)
    history = pd.read_csv(Path(folder, "b_history.csv"))
    metrics = json.loads(Path(folder, "b_metrics.json").read_text())["splits"]["val"]
    again, _, _ = whole_run([*argv, "--lr-stage2", str(2 * cfg.lr_stage2), "--epochs-stage2", str(cfg.epochs_stage2 + 1)])
    paths = [path for split in ("train", "val") for path in data.splits[split].paths]
    predicted, _, _ = whole_run([*argv, "--predict", *map(str, paths)])
    small = Path(folder, "tenth")
    for split, part in data.splits.items():
        for path, label in list(zip(part.paths, part.labels.tolist()))[::1 if split == "val" else 10]:
            place = small / split / f"{label:03d}" / path.name
            place.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(path, place)
    for label in range(len(data.class_names)):  # each class keeps an image
        if not (small / "train" / f"{label:03d}").exists():
            path = data.splits["train"].paths[data.splits["train"].labels.tolist().index(label)]
            (small / "train" / f"{label:03d}").mkdir()
            shutil.copy(path, small / "train" / f"{label:03d}")
    _, small_peak, _ = whole_run([*argv, "--data-dir", str(small), "--run-name", "tenth"])
    measure_rounds()
    cost = {kind: statistics.median(part[kind] for part in rounds) for kind in rounds[0]}
    train, val = (len(data.splits[name].paths) for name in ("train", "val"))
    plain_seconds = (cfg.epochs_stage1 * (train * cost["stage 1"] + val * cost["validation"])
                     + cfg.epochs_stage2 * (train * cost["stage 2"] + val * cost["validation"]))
    device = torch.cuda.get_device_name() if cfg.device.type == "cuda" else f"{os.cpu_count()} processor cores"
    print(f"{device}, torch {torch.__version__}, {train} training and {val} validation images; medians of "
          f"{len(rounds)} rounds\n\nplain loop, float32               images/s")
    for kind, words in (("forward", "forward pass alone"), ("stage 1", "training, stage 1"),
                        ("stage 2", "training, stage 2"), ("validation", "validation")):
        print(f"  {words:30} {1 / cost[kind]:9.1f}")
    print("\nprogram, phases of five seconds and more, as it tells them")
    print(*re.findall(r"^[a-z ]+: [0-9,]+ images in \d+ s$", printed, re.MULTILINE), sep="\n")
    for stage, rows in history.groupby("stage"):
        print(f"stage {stage}: {rows.seconds.sum():.1f} s, an epoch {rows.seconds.median():.1f} s")
    print(f"\nplain loop, extrapolated from a few batches to all {cfg.epochs_stage1} + {cfg.epochs_stage2} epochs: "
          f"{plain_seconds:.0f} s\nprogram, from the start of Python to its last file: {seconds:.0f} s, "
          f"{plain_seconds / seconds:.1f} times faster\n"
          f"run again with another LR_STAGE2 and one epoch more: {again:.0f} s, {plain_seconds / again:.1f} times faster\n"
          f"prediction, with its start: {len(paths)} images in {predicted:.0f} s, {len(paths) / predicted:.1f} images/s\n"
          f"peak memory of the program and its workers: {peak / 2**30:.2f} GiB; with a tenth of the training images "
          f"{small_peak / 2**30:.2f} GiB\nvalidation accuracy of this run: {metrics['accuracy']:.2%}")


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as temporary:
        benchmark(sys.argv[1:], temporary)
