"""How much faster than a plain training loop is the program, and where does its time go?

    python tests/benchmark.py [--data-dir data] [--weights FILE] [any other option of the program]

The plain loop decodes and augments each image in every epoch in the main process and sends it through all of B3 in
float32, for training and for validation. A few batches of each of its stages are timed before and after the whole run
of the program, and the medians are extrapolated to the full schedule. Without --data-dir it draws its own images.
"""
import json
import os
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
ROUNDS = 2  # before the program's run, and as many after it


class Images(Dataset):
    """Files decoded, resized and augmented (or not) each time they are asked for."""

    def __init__(self, paths, labels, cfg, augment):
        resize, views, normalize = program.make_transforms(cfg.img_size)
        self.paths, self.labels = paths, labels
        self.transform = v2.Compose([resize, *([views] if augment else []), v2.ToImage(), normalize])

    def __len__(self):
        return len(self.paths)

    def __getitem__(self, index):
        return self.transform(Image.open(self.paths[index]).convert("RGB")), self.labels[index]


class PlainLoop:
    """The textbook loop: no workers, float32, the whole model on every image in every epoch."""

    def __init__(self, found, classes, pretrained, run):
        self.cfg, self.device, self.model = run.cfg, run.device, program.build_model(classes, pretrained).to(run.device)
        self.loaders = {name: DataLoader(Images(*found[name], run.cfg, augment=name == "train"), run.cfg.batch_size,
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
            images, labels = (part.to(self.device) for part in next(batches))
            loss = nn.functional.cross_entropy(self.model(images), labels)
            if blocks is not None:
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
            loss.item()  # waits for the device
        return (time.perf_counter() - start) / BATCHES / len(images)


def seconds_per_image_of_parts(data, frozen, run):
    """Of the program's own parts that its run does not time alone: augmentation, and the frozen part."""
    few = data.splits["val"]._replace(images=data.splits["val"].images[:512])
    seconds, views = {}, program.AugmentedViews(few.images[:512 // run.cfg.views], run.cfg)
    start = time.perf_counter()
    for _ in program.batches_of(views, 4, run.cfg):
        pass
    seconds["augmentation"] = (time.perf_counter() - start) / len(views)
    start = time.perf_counter()
    program.cache_activations(frozen, "few", data._replace(splits={"few": few}), run)
    del run.activations["few"]
    seconds["frozen part"] = (time.perf_counter() - start) / len(few.images)
    return seconds


def memory_of_group(leader):
    """Bytes in use by all processes of a process group, what they share counted once (Linux; elsewhere 0)."""
    total = 0
    for process in Path("/proc").glob("[0-9]*"):
        try:
            if os.getpgid(int(process.name)) == leader:
                rows = (process / "smaps_rollup").read_text().split("Pss:")[1].split()
                total += 1024 * int(rows[0])
        except (OSError, IndexError):
            pass  # ended meanwhile
    return total


def whole_run(argv, folder):
    """The program from the start of Python to its end: seconds, peak memory in bytes, metrics, history."""
    command = [sys.executable, program.__file__, *argv, "--out-dir", folder, "--run-name", "b", "--eval-splits", "val"]
    start, peak, ended = time.perf_counter(), 0, threading.Event()
    process = subprocess.Popen(command, start_new_session=True, stdout=subprocess.DEVNULL)

    def watch():
        nonlocal peak
        while not ended.wait(0.5):
            peak = max(peak, memory_of_group(process.pid))

    watcher = threading.Thread(target=watch)
    watcher.start()
    code = process.wait()
    seconds = time.perf_counter() - start
    ended.set()
    watcher.join()
    if code:
        sys.exit(f"the program ended with code {code}")
    metrics = json.loads(Path(folder, "b_metrics.json").read_text())
    return seconds, peak, metrics, pd.read_csv(Path(folder, "b_history.csv"))


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
    cfg = program.parse_command_line([*argv, "--eval-splits", "val"])
    run, data_dir = program.start_run(cfg), Path(cfg.data_dir)
    find = program.find_own_images if (data_dir / "train").is_dir() else program.find_flowers102
    names, found = find(data_dir, ["train", "val"])
    pretrained, data = program.load_pretrained(cfg.weights), program.load_data(cfg)
    plain = PlainLoop(found, len(names), pretrained, run)
    frozen, _ = program.split_model(program.build_model(len(names), pretrained), cfg.unfreeze_last_blocks)
    rounds = []

    def measure_rounds():
        for _ in range(ROUNDS):
            rounds.append({kind: plain.seconds_per_image(kind)
                           for kind in ("stage 1", "stage 2", "validation", "forward")})
            rounds[-1] |= seconds_per_image_of_parts(data, frozen, run)

    measure_rounds()
    seconds, peak, metrics, history = whole_run(argv, folder)
    measure_rounds()
    cost = {kind: statistics.median(part[kind] for part in rounds) for kind in rounds[0]}
    train, val = (len(found[name][0]) for name in ("train", "val"))
    plain_seconds = (cfg.epochs_stage1 * (train * cost["stage 1"] + val * cost["validation"])
                     + cfg.epochs_stage2 * (train * cost["stage 2"] + val * cost["validation"]))
    phases = metrics["seconds"]
    device = torch.cuda.get_device_name() if run.device.type == "cuda" else f"{os.cpu_count()} processor cores"
    print(f"{device}, torch {torch.__version__}, {train} training and {val} validation images; medians of "
          f"{len(rounds)} rounds\n\nplain loop, float32               images/s")
    for kind, words in (("forward", "forward pass alone"), ("stage 1", "training, stage 1"),
                        ("stage 2", "training, stage 2"), ("validation", "validation")):
        print(f"  {words:30} {1 / cost[kind]:9.1f}")
    print("\nprogram                           images/s")
    stages = history.groupby("stage").seconds.median()
    rates = {"decoding": (train + val) / phases["decoding"], "augmentation alone": 1 / cost["augmentation"],
             "frozen part alone": 1 / cost["frozen part"],
             "frozen part, training views": cfg.views * train / phases["frozen part, train"],
             "frozen part, validation": val / phases["frozen part, val"],
             **{f"epoch of stage {stage}": (train + val) / stages[stage] for stage in stages.index}}
    for words, rate in rates.items():
        print(f"  {words:30} {rate:9.1f}")
    print("\nprogram, whole run                seconds    share")
    for words, part in (phases | {"start, model, checks": seconds - sum(phases.values())}).items():
        print(f"  {words:30} {part:9.1f} {part / seconds:7.1%}")
    print(f"  {'whole run':30} {seconds:9.1f}\n\nplain loop, extrapolated from a few batches to all "
          f"{cfg.epochs_stage1} + {cfg.epochs_stage2} epochs: {plain_seconds:.0f} s\n"
          f"program, measured from the start of Python to its last file: {seconds:.0f} s\n"
          f"the program is {plain_seconds / seconds:.1f} times faster; its frozen part does "
          f"{cost['forward'] / cost['frozen part']:.1f} times the images of the plain forward pass\n"
          f"peak memory of the program and its workers: {peak / 2**30:.2f} GiB\n"
          f"validation accuracy of this run: {metrics['splits']['val']['accuracy']:.2%}")


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as temporary:
        benchmark(sys.argv[1:], temporary)
