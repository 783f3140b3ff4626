"""How much faster than a plain training loop is the program, and where does its time go?

    python tests/benchmark.py [--curves FILE.csv] [--data-dir data] [--weights FILE] [any other option of the program]
    ... --plain-full --curves FILE.csv           nothing but the plain loop, in full (1.5 to 2 hours on two cores)
    ... --label "longer run" --curves FILE.csv   nothing but one run of the program, under this name
    ... --plot FIGURE.png --curves FILE.csv      accuracy against seconds, as the others have put them into FILE.csv

The plain loop is the textbook's: each image decoded, augmented and sent through all of B3 in every epoch, BatchNorm in
train mode, validation after each epoch and a last evaluation. On CUDA it has AMP, channels_last, a worker per core and
pinned memory, and runs in full; on a CPU, in float32 and without workers, a few batches of each kind are timed before
and after the runs of the program, and their medians extrapolated. The program runs from nothing, then again after an
edit (LR_STAGE2 doubled), and names the flowers of all images; two more runs, after another edit and on a tenth of the
training images, tell of the memory. All seconds of real runs count from the start of Python. Without --data-dir it
draws its own images.
"""
import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from functools import partial
from itertools import chain, islice, repeat
from pathlib import Path

import pandas as pd
import torch
from PIL import Image
from sklearn.metrics import classification_report
from torch import nn
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms import v2

sys.path.insert(0, str(Path(__file__).parent.parent))
import efficientnet_b3 as program  # noqa: E402

BATCHES = 2  # of each kind that are timed in a round, after one that warms up
ROUNDS = 2  # before the program's runs, and as many after them
EPOCH = r" +[12] +\d+ "  # how a line of the program's table of epochs starts


class Images(Dataset):
    """Files decoded, resized and augmented (or not) each time they are asked for."""

    def __init__(self, table, cfg, augment):
        transforms = program.make_transforms(cfg)
        self.paths, self.labels = table.path.tolist(), table.label.tolist()
        last = transforms.augment if augment else transforms.centre
        self.transform = v2.Compose([transforms.resize, last, v2.ToImage(), transforms.normalize])

    def __len__(self):
        return len(self.paths)

    def __getitem__(self, index):
        return self.transform(Image.open(self.paths[index]).convert("RGB")), self.labels[index]


class PlainLoop:
    """The textbook's loop: every image through the whole model in every epoch."""

    def __init__(self, data, cfg):
        self.cfg, self.device, self.on_cuda = cfg, cfg.device, cfg.device.type == "cuda"
        self.layout = torch.channels_last if self.on_cuda else torch.preserve_format
        torch.use_deterministic_algorithms(False)  # which the program demands of itself
        model = program.efficientnet_b3(num_classes=len(data.class_names))
        model.load_state_dict(model.state_dict() | (program.load_pretrained(cfg.weights) or {}))
        self.model = model.to(self.device, memory_format=self.layout)
        fast = {"num_workers": program.cpu_count(), "pin_memory": True, "persistent_workers": True}
        loader = partial(DataLoader, **fast if self.on_cuda else {})
        self.training = loader(Images(data.tables["train"], cfg, augment=True), 32, shuffle=True)
        self.validation = loader(Images(data.tables["val"], cfg, augment=False), 128 if self.on_cuda else 32)

    def start_stage(self, blocks, rate):
        """Train the head and so many of the last blocks from now on."""
        self.model.requires_grad_(False)
        self.model.classifier.requires_grad_(True)
        self.model.features[len(self.model.features) - blocks:].requires_grad_(True)
        self.optimizer = torch.optim.Adam([p for p in self.model.parameters() if p.requires_grad], rate)
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=self.on_cuda)

    def logits(self, images):
        images = images.to(self.device, non_blocking=True, memory_format=self.layout)
        with torch.autocast(self.device.type, torch.float16, enabled=self.on_cuda):
            return self.model(images)

    def train(self, batches):
        self.model.train()
        for images, labels in batches:
            loss = nn.functional.cross_entropy(self.logits(images), labels.to(self.device, non_blocking=True))
            self.optimizer.zero_grad()
            self.scaler.scale(loss).backward()
            self.scaler.step(self.optimizer)
            self.scaler.update()

    @torch.inference_mode()
    def evaluate(self, batches):
        """Labels and predictions."""
        self.model.eval()
        pairs = [(labels, self.logits(images).argmax(1).cpu()) for images, labels in batches]
        return map(torch.cat, zip(*pairs))

    def in_full(self, begun):
        """Train all epochs; returns a table of the seconds since `begun` and the validation accuracy after each."""
        rows = []
        for epochs, blocks, rate in ((self.cfg.epochs_stage1, 0, 1e-3),
                                     (self.cfg.epochs_stage2, self.cfg.unfreeze_last_blocks, 1e-4)):
            self.start_stage(blocks, rate)
            for _ in range(epochs):
                self.train(self.training)
                labels, predicted = self.evaluate(self.validation)
                rows.append((time.perf_counter() - begun, (labels == predicted).float().mean().item()))
        classification_report(*self.evaluate(self.validation), zero_division=0)
        rows.append((time.perf_counter() - begun, rows[-1][1]))
        return pd.DataFrame(rows, columns=["seconds", "accuracy"])

    def seconds_per_image(self):
        """Of each kind of work, by a few batches, which are read meanwhile unless it is "forward alone"."""
        seconds = {}
        for kind in ("forward alone", "stage 1", "stage 2", "validation"):
            self.start_stage(self.cfg.unfreeze_last_blocks if kind == "stage 2" else 0, 1e-9)
            training = kind.startswith("stage")
            work, loader = (self.train, self.training) if training else (self.evaluate, self.validation)
            batches = chain.from_iterable(repeat(loader))
            if kind == "forward alone":
                batches = repeat(next(batches))
            work([next(batches)])
            start = time.perf_counter()
            work(islice(batches, BATCHES))
            seconds[kind] = (time.perf_counter() - start) / (BATCHES * loader.batch_size)
        return seconds


def plain_loop_in_full(data, cfg, file):
    """Print and keep the curve of the plain loop; returns its seconds, with those of importing what it needs."""
    begun = time.perf_counter()
    imports = f"import torch, torchvision, sklearn.metrics; torch.zeros(1, device={str(cfg.device)!r})"
    subprocess.run([sys.executable, "-c", imports], check=True)
    curve = PlainLoop(data, cfg).in_full(begun)
    keep({"plain loop": curve}, file)
    print("\nplain loop in full", curve.to_string(), sep="\n")
    return curve.seconds.iloc[-1]


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


def whole_run(argv, watched=False):
    """The program from the start of Python to its end: seconds, peak memory in bytes, [(seconds, printed line)].

    The memory is watched only if told so, as each look stops the program's allocations meanwhile.
    """
    start, peak, ended, lines = time.perf_counter(), 0, threading.Event(), []
    process = subprocess.Popen([sys.executable, program.__file__, *argv], start_new_session=True, text=True,
                               stdout=subprocess.PIPE, stderr=subprocess.STDOUT)

    def watch():
        nonlocal peak
        while watched and not ended.wait(0.5):
            peak = max(peak, memory_of_group(process.pid))

    watcher = threading.Thread(target=watch)
    watcher.start()
    for line in process.stdout:
        lines.append((time.perf_counter() - start, line.rstrip()))
    code, seconds = process.wait(), time.perf_counter() - start
    ended.set()
    watcher.join()
    if code:
        sys.exit("\n".join([f"the program ended with code {code}:", *(line for _, line in lines)]))
    return seconds, peak, lines


def curve_of(lines, folder):
    """The curve of a run of the program: its accuracies, and when it printed their lines."""
    times = [seconds for seconds, line in lines if re.match(EPOCH, line)]
    return pd.DataFrame({"seconds": times, "accuracy": pd.read_csv(Path(folder, "b_history.csv")).val_acc})


def keep(curves, file):
    """Put {label: curve} in place of earlier ones of these labels into the file that --plot reads."""
    if file:
        old = pd.read_csv(file) if file.exists() else pd.DataFrame({"label": []})
        new = [table.assign(label=label) for label, table in curves.items()]
        pd.concat([old[~old.label.isin(list(curves))], *new]).to_csv(file, index=False)


def plot(curves, file):
    """Validation accuracy against seconds on a logarithmic scale, a line for each label."""
    figure = program.Figure((7.5, 4.2), layout="constrained")
    axes, colours = figure.subplots(), program.sns.color_palette("colorblind")
    for colour, (label, rows) in zip(colours, curves.groupby("label", sort=False)):
        axes.plot(rows.seconds, 100 * rows.accuracy, ".-", c=colour, lw=2,
                  label=f"{label}: {rows.accuracy.max():.1%}, {rows.seconds.max():,.0f} s")
    ticks = {10: "10 s", 30: "30 s", 60: "1 min", 300: "5 min", 600: "10 min", 1800: "30 min", 3600: "1 h", 7200: "2 h"}
    axes.set(xscale="log", xlabel="Time since the start of Python", ylabel="Validation accuracy (%)")
    axes.set_xticks(list(ticks), list(ticks.values()))
    axes.minorticks_off()
    axes.set_xlim(0.8 * curves.seconds.min(), 1.25 * curves.seconds.max())
    axes.grid(alpha=0.3)
    axes.legend(title="best accuracy, time of the last epoch")
    figure.savefig(file, dpi=150)


def draw_images(folder):
    """102 classes, ten copies of one drawn flower of 500 pixels in train and in val."""
    for species in range(102):
        for number, split in enumerate(("train", "val")):
            path = folder / split / f"{species:03d}"
            path.mkdir(parents=True)
            picture = program.draw_flower(species, number, 500)
            for copy in range(10):
                picture.save(path / f"{copy}.jpg", quality=90)


def measure_program(argv, data, cfg, folder, file):
    """Print the seconds of all runs of the program and its memory; returns those of the first two."""
    seconds, _, lines = whole_run(argv)
    curves = {"default": curve_of(lines, folder)}
    edited, _, edited_lines = whole_run([*argv, "--lr-stage2", str(2 * cfg.lr_stage2)])
    keep(curves | {"after an edit": curve_of(edited_lines, folder)}, file)
    _, peak, _ = whole_run([*argv, "--lr-stage2", str(3 * cfg.lr_stage2)], watched=True)
    train, val = data.tables["train"], data.tables["val"]
    paths = [str(path) for path in (*train.path, *val.path)]
    predicted, _, _ = whole_run([*argv, "--predict", *paths])
    few = train.groupby("label").head(max(1, len(train) // len(data.class_names) // 10))  # each class keeps an image
    for row in pd.concat([few, val]).itertuples():
        place = folder / "tenth" / row.split / f"{row.label:03d}" / row.path.name
        place.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(row.path, place)
    _, small_peak, _ = whole_run([*argv, "--data-dir", str(folder / "tenth"), "--run-name", "tenth"], watched=True)
    print(f"\n{len(train)} training and {len(val)} validation images; seconds at which the program printed its lines")
    told = f"(device|data|model|frozen|best epoch|stage epoch)\\b|{EPOCH}|val, "
    for title, printed in (("\nfrom nothing", lines), ("\nafter an edit", edited_lines)):
        print(title, *(f"{at:6.1f} {line}" for at, line in printed if re.match(told, line)), sep="\n")
    print(f"\nprediction, with its start: {len(paths)} images, {predicted:.0f} s, {len(paths) / predicted:.1f} per s\n"
          f"peak memory with workers: after an edit {peak / 2**30:.2f} GiB; from nothing, with a tenth "
          f"of the training images, {small_peak / 2**30:.2f} GiB")
    return seconds, edited


def benchmark(args, argv, folder):
    """Measure everything, or what `args` name, and print it."""
    if "--data-dir" not in argv:
        draw_images(folder / "drawn")
        argv = [*argv, "--data-dir", str(folder / "drawn"), "--weights", "none"]
    argv = [*argv, "--out-dir", str(folder), "--run-name", "b", "--eval-splits", "val"]
    if args.label:
        seconds, _, lines = whole_run(argv)
        keep({args.label: curve_of(lines, folder)}, args.curves)
        return print(*(line for _, line in lines), f"\n{args.label}: {seconds:.0f} s", sep="\n")
    cfg = program.parse_command_line(argv)
    program.choose_device(cfg)
    data, on_cuda = program.find_images(cfg), cfg.device.type == "cuda"
    print(torch.cuda.get_device_name() if on_cuda else f"{program.cpu_count()} cores", "torch", torch.__version__)
    if args.plain_full:
        return plain_loop_in_full(data, cfg, args.curves)
    if on_cuda:
        runs = measure_program(argv, data, cfg, folder, args.curves)
        plain = plain_loop_in_full(data, cfg, args.curves)
    else:
        loop = PlainLoop(data, cfg)
        rounds = [loop.seconds_per_image() for _ in range(ROUNDS)]
        runs = measure_program(argv, data, cfg, folder, args.curves)
        rounds += [loop.seconds_per_image() for _ in range(ROUNDS)]
        cost, (train, val) = pd.DataFrame(rounds).median(), (len(data.tables[split]) for split in ("train", "val"))
        plain = train * (cfg.epochs_stage1 * cost["stage 1"] + cfg.epochs_stage2 * cost["stage 2"])
        plain += val * (cfg.epochs_stage1 + cfg.epochs_stage2 + 1) * cost["validation"]
        print(f"\nplain loop, images per second, medians of {len(rounds)} rounds, extrapolated to all epochs\n"
              f"{(1 / cost).round(1).to_string()}")
    print(f"\nplain loop: {plain:.0f} s")
    for name, seconds in zip(("program, from nothing", "after an edit (LR_STAGE2 doubled)"), runs):
        print(f"{name}: {seconds:.0f} s, {plain / seconds:.1f} times faster")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
                                     allow_abbrev=False)
    parser.add_argument("--curves", type=Path, metavar="FILE.csv", help="seconds, accuracy and label of real runs")
    parser.add_argument("--plain-full", action="store_true", help="nothing but the plain loop, in full")
    parser.add_argument("--label", help="nothing but one run of the program, under this name in --curves")
    parser.add_argument("--plot", type=Path, metavar="FIGURE.png", help="draw what --curves holds, and nothing else")
    args, argv = parser.parse_known_args()
    if (args.plot or args.plain_full or args.label) and not args.curves:
        parser.error("--plot, --plain-full and --label go with --curves FILE.csv")
    if args.plot:
        return plot(pd.read_csv(args.curves), args.plot)
    with tempfile.TemporaryDirectory() as temporary:
        benchmark(args, argv, Path(temporary))


if __name__ == "__main__":
    main()
