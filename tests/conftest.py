"""Images that the tests draw themselves, options that make a run take seconds, and how files and lines are compared."""
import hashlib
import importlib.util
import json
import linecache
import os
import shutil
import signal
import subprocess
import sys
from collections import namedtuple
from concurrent.futures import ThreadPoolExecutor
from contextlib import redirect_stdout
from functools import cache
from itertools import cycle
from pathlib import Path
from unittest.mock import MagicMock

import numpy as np
import pandas as pd
import pytest
import seaborn
import torch
from matplotlib.figure import Figure
from PIL import Image
from scipy.io import savemat
from torchvision.datasets import Flowers102, flowers102
from torchvision.models.efficientnet import EfficientNet, MBConvConfig

sys.path.insert(0, str(Path(__file__).parent.parent))
import efficientnet_b3 as program  # noqa: E402

COLOURS = {"blue": (40, 60, 220), "red": (220, 40, 50), "yellow": (230, 220, 60)}
ONE_EPOCH = ["--epochs-stage1", "1", "--epochs-stage2", "0", "--head-init", "random"]  # for tests of other matters
AS_ELSEWHERE = """
import multiprocessing, runpy, sys
import torch.multiprocessing
import efficientnet_b3  # loads all libraries as on this system
if __name__ == "__main__":
    program, *options = sys.argv[1:]
    multiprocessing.set_start_method("spawn")
    torch.multiprocessing.set_sharing_strategy("file_system")  # the one that macOS has
    sys.platform = "darwin"  # on Linux the program forks
    sys.argv = [program, *options]
    runpy.run_path(program, run_name="__main__")
"""
real = pytest.mark.skipif(not os.environ.get("FLOWERS_DIR") or not os.environ.get("WEIGHTS_FILE"),
                          reason="FLOWERS_DIR and WEIGHTS_FILE do not name the real images and weights")


def pytest_configure(config):
    signal.signal(signal.SIGINT, signal.default_int_handler)  # which a shell has its background jobs ignore
    config.addinivalue_line("markers", "cuda: needs a GPU; `pytest -m cuda` runs these alone")


@pytest.fixture(autouse=True)
def one_thread(monkeypatch):
    """Two cores are often shared; subprocesses get as many threads as this process has: the same bits."""
    torch.set_num_threads(1)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setattr(os, "fsync", lambda _file: None)  # the machine does not lose its power while tests run
    # After an error in a worker, DataLoader waits five seconds for each process before it ends it.
    monkeypatch.setattr("torch.utils.data._utils.MP_STATUS_CHECK_INTERVAL", 0.2, raising=False)


def options_of_finished(folder):
    """A run with all its figures, for tests that only look."""
    return [*options_for(draw_splits(folder / "own"), folder / "runs"), "--no-amp", "--eval-splits", "val", "test"]


def options_of_demo(folder):
    smaller = ["--views", "1", "--epochs-stage1", "2", "--epochs-stage2", "1", "--folds", "2"]
    return ["--demo", *smaller, "--data-dir", folder / "flowers", "--out-dir", folder / "runs"]


def options_of_run_elsewhere(folder):
    """A run whose workers start afresh, as on Windows and macOS."""
    for split, number in (("train", 16), ("val", 1)):
        draw_classes(folder / "own" / split, number, ["blue", "red"])
    return [*options_for(folder / "own", folder / "runs"), *ONE_EPOCH, "--num-workers", "1"]


def options_of_real_run(folder):
    """Three of each species' training photographs, and one of those for validation."""
    for split, count in (("train", 3), ("val", 1)):
        photographs = Flowers102(os.environ["FLOWERS_DIR"], split)
        table = pd.DataFrame({"path": photographs._image_files, "label": photographs._labels})
        for path, label in table.groupby("label").head(count).itertuples(index=False):
            place = folder / "own" / split / f"{label:03d}" / path.name
            place.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(path, place)
    return ["--data-dir", folder / "own", "--weights", os.environ["WEIGHTS_FILE"], "--out-dir", folder / "runs",
            "--run-name", "t", "--img-size", "96", "96", "--views", "1", "--epochs-stage1", "1", "--epochs-stage2", "1"]


LONG_RUNS = {"finished": options_of_finished, "demo": options_of_demo, "run_elsewhere": options_of_run_elsewhere,
             "real_run": options_of_real_run}
LongRun = namedtuple("LongRun", "folder options code out err")


def pytest_collection_modifyitems(items):
    """Long runs go on beside the tests, and those that look at them come last."""
    items.sort(key=lambda item: not LONG_RUNS.keys().isdisjoint(item.fixturenames))


@pytest.fixture(scope="session", autouse=True)
def long_runs(request, tmp_path_factory):
    """{name: future of a LongRun}, of those that a test asks for; they go on one after the other."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(program.__file__).parent),
                   "MPLBACKEND": "module://not_installed"}  # a notebook's, which the program does not ask for
    processes, pool = [], ThreadPoolExecutor(1)

    def run(name, folder):
        options = [str(option) for option in LONG_RUNS[name](folder)]  # of a run that nobody waits for, it may fail
        script = ["-c", AS_ELSEWHERE] if name == "run_elsewhere" else []
        process = subprocess.Popen([sys.executable, *script, program.__file__, *options], text=True, env=environment,
                                   stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        processes.append(process)
        out, err = process.communicate()
        return LongRun(folder, options, process.returncode, out, err)

    futures = {}
    for name in LONG_RUNS:
        if any(name in item.fixturenames for item in request.session.items):
            futures[name] = pool.submit(run, name, tmp_path_factory.mktemp(name))
    yield futures
    pool.shutdown(wait=False, cancel_futures=True)
    for process in processes:
        process.kill()


@pytest.fixture(scope="session")
def finished(long_runs):
    """The options of a run that is over; beside its folders, stdout.txt and stderr.txt have what it said."""
    run = long_runs["finished"].result()
    assert run.code == 0, run.err
    (run.folder / "stdout.txt").write_text(run.out)
    (run.folder / "stderr.txt").write_text(run.err)
    return run.options


@pytest.fixture(scope="session")
def demo(long_runs):
    return long_runs["demo"].result()


@pytest.fixture(scope="session")
def run_elsewhere(long_runs):
    return long_runs["run_elsewhere"].result()


@pytest.fixture(scope="session")
def real_run(long_runs):
    return long_runs["real_run"].result()


def draw(path, colour, seed, size=(40, 48)):
    """A noisy picture of one colour, in the format of its ending."""
    noise = np.random.default_rng(seed).integers(-30, 30, (*size, 3))
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray((np.array(colour) + noise).clip(0, 255).astype(np.uint8)).save(path)
    return path


def draw_classes(folder, count, names=tuple(COLOURS), ending="png"):
    """`count` images of each class, in one folder per class."""
    for offset, (name, colour) in enumerate(zip(names, cycle(COLOURS.values()))):
        for number in range(count):
            draw(folder / name / f"{number}.{ending}", colour, 100 * offset + 10 * count + number)
    return folder


def draw_splits(folder, names=tuple(COLOURS)):
    """Own images: six of each class to train on, three for validation, two to test."""
    for split, count in (("train", 6), ("val", 3), ("test", 2)):
        draw_classes(folder / split, count, names)
    return folder


def options_for(images, runs):
    """Options of a run of seconds; later options override these."""
    return ["--data-dir", str(images), "--out-dir", str(runs), "--run-name", "t", "--weights", "none",
            "--img-size", "40", "40", "--views", "2", "--folds", "2", "--batch-size", "8", "--epochs-stage1", "2",
            "--epochs-stage2", "2", "--eval-splits", "val", "--num-workers", "0", "--device", "cpu"]


@pytest.fixture(scope="session")
def drawn_once(tmp_path_factory):
    return draw_splits(tmp_path_factory.mktemp("drawn"))


@pytest.fixture
def own_images(drawn_once, tmp_path):
    return shutil.copytree(drawn_once, tmp_path / "own")


@pytest.fixture
def options(own_images, tmp_path):
    return options_for(own_images, tmp_path / "runs")


def small_efficientnet(num_classes):
    """An EfficientNet of nine blocks like B3's, but narrow and shallow."""
    rows = ((1, 3, 1, 32, 16, 1), (6, 3, 2, 16, 24, 1), (1, 5, 2, 24, 40, 1), (1, 3, 2, 40, 80, 1),
            (1, 5, 1, 80, 112, 1), (1, 5, 2, 112, 192, 1), (1, 3, 1, 192, 320, 2))
    layers = [MBConvConfig(*row, width_mult=0.25, depth_mult=1) for row in rows]
    return EfficientNet(layers, 0.3, num_classes=num_classes)


@pytest.fixture
def small_network(monkeypatch):
    """For tests of files, folders and signals, which need a network, but not the time and the megabytes of B3."""
    monkeypatch.setattr(program, "efficientnet_b3", small_efficientnet)


@pytest.fixture
def no_report(monkeypatch):
    """For tests that look at checkpoints and the history alone."""
    monkeypatch.setattr(program, "report", lambda *_args: None)


@pytest.fixture(scope="session")
def trained_once(tmp_path_factory):
    """The folder of a run of one epoch."""
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("trained")
    with redirect_stdout(None), pytest.MonkeyPatch.context() as patch:
        patch.setattr(program, "efficientnet_b3", small_efficientnet)
        assert program.main([*options_for(draw_splits(folder / "own"), folder / "runs"), *ONE_EPOCH]) == 0
    return folder / "runs"


@pytest.fixture
def trained(options, trained_once, small_network, tmp_path):
    """The options of a run of one epoch that is over and has left its files in `runs`, to be changed at will."""
    shutil.copytree(trained_once, tmp_path / "runs")
    return [*options, *ONE_EPOCH]


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
def downloads(monkeypatch):
    """Every download fails as it does without a network; the list tells which were tried."""
    tried = []

    def fail(*args, **_kwargs):
        tried.append(args)
        raise OSError("no network")

    for module, name in ((flowers102, "download_url"), (flowers102, "download_and_extract_archive"),
                         (torch.hub, "download_url_to_file")):
        monkeypatch.setattr(module, name, fail)
    return tried


@pytest.fixture
def weights(tmp_path):
    """A state dict of EfficientNet-B3 with random numbers, as somebody's own weights."""
    torch.save(program.build_model(2, seed=1).state_dict(), tmp_path / "weights.pth")
    return tmp_path / "weights.pth"


def edited(path, *changes, append=""):
    """A copy of the program in which somebody has edited lines, (old, new), imported as a module of its own."""
    source = Path(program.__file__).read_text("utf-8")
    for old, new in changes:
        assert source.count(old) == 1, f"{source.count(old)} times in the program: {old}"
        source = source.replace(old, new)
    path.write_text(source.replace("\n# ---- Helpers", f"{append}\n\n# ---- Helpers"), "utf-8")
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def execute(source, name="<cell>", namespace=None):
    """Run a source as a cell of a notebook, which linecache knows with no time of change; returns its names."""
    linecache.cache[name] = (len(source), None, source.splitlines(True), name)
    namespace = {"__name__": "edited"} if namespace is None else namespace
    exec(compile(source, name, "exec"), namespace)
    return namespace


def settings(options, *extra):
    """The configuration as the program has it once the device is chosen."""
    cfg = program.parse_command_line([str(option) for option in (*options, *extra)])
    program.choose_device(cfg)
    return cfg


def call(options):
    """The exit code of a command line, whether main returns it or argparse raises it."""
    try:
        return program.main([str(option) for option in options])
    except SystemExit as stop:
        return stop.code


def is_one_line(text, *phrases):
    return text.startswith("error: ") and text.count("\n") == 1 and all(phrase in text for phrase in phrases)


def start(*options, script=program.__file__, **environment):
    """The program as a process of its own, with a stdout as Python buffers it."""
    return subprocess.Popen([sys.executable, str(script), *map(str, options)], text=True, stdout=subprocess.PIPE,
                            stderr=subprocess.PIPE, env={**os.environ, "PYTHONUNBUFFERED": "", **environment})


def history_of(folder):
    """The rows of the history of the run `t`."""
    return pd.read_csv(folder / "t_history.csv").to_dict("records")


def figures_of(folder, split="val"):
    """What the run `t` reports of a split."""
    return json.loads((folder / "t_metrics.json").read_text())["splits"][split]


class Killed(BaseException):
    """Stands for SIGKILL: nothing in the program may catch it."""


def checkpoint(folder, name):
    """A checkpoint of the run `t` without what differs between two runs of the same command: the seconds."""
    state = torch.load(folder / f"t_{name}.pth", weights_only=False)  # the faster unpickler
    for row in state["history"]:
        del row["seconds"]
    return state


def checkpoints(folder):
    return [checkpoint(folder, name) for name in ("best", "last")]


def same(a, b):
    """Equal in every bit."""
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b


def activations(folder):
    """The activation files of all runs in a folder, with their content."""
    return {path: path.read_bytes() for path in folder.glob("activations/*.bin")}


@pytest.fixture
def undrawn(monkeypatch):
    """No figure is drawn at all, by edited copies of the program either; the program's own compute none."""
    axes = MagicMock()
    for name in ("subplots", "add_subplot", "add_axes", "legend", "suptitle"):
        monkeypatch.setattr(Figure, name, lambda *_args, **_kw: axes)
    monkeypatch.setattr(Figure, "savefig", lambda *_args, **_kw: None)
    monkeypatch.setattr(seaborn, "heatmap", lambda *_args, **_kw: None)
    for name in ("plot_confusion_matrix", "plot_mistakes", "plot_changes"):
        monkeypatch.setattr(program, name, lambda *_args: Figure())
    monkeypatch.setattr(program, "code_of", cache(program.code_of))
