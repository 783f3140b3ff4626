"""What stands still is computed once, as the model would, and a pass that was cut short goes on to the same bits."""
import ctypes
import inspect
import json
import os
import random
import select
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import ONE_EPOCH, Killed, activations, call, checkpoints, draw, is_one_line, real, same, settings
from filelock import FileLock
from torch import nn

import efficientnet_b3 as program

pytestmark = pytest.mark.usefixtures("undrawn")


@pytest.fixture
def cfg(options, tmp_path):
    (tmp_path / "runs").mkdir()
    return settings(options, "--no-amp")


@pytest.fixture
def outputs():
    return torch.randn(300, 2, 7, 3, 3)


def never(_done):
    pytest.fail("computed again")


def batches_of(outputs, log=None):
    """What computes the outputs, four at a time, and notes in `log` from where on it was asked."""
    def compute(done):
        if log is not None:
            log.append(done)
        yield from outputs[done:].split(4)
    return compute


def files_of(folder):
    return list(enumerate(sorted(folder.glob("*/*.png"))))


def outputs_of(layers, files, views, cfg):
    return torch.cat(list(program.outputs_of_files(layers, files, views, cfg)))


# What is computed


def test_views_that_numpy_and_python_draw_are_the_same_in_workers(options, own_images, monkeypatch):
    """As augmentations do that somebody adds."""
    def noisy(image):
        return np.asarray(image) // 2 + np.random.randint(0, 100, (40, 40, 3), np.uint8) + random.randrange(20)

    make, passes = program.make_transforms, []
    monkeypatch.setattr(program, "make_transforms", lambda cfg: make(cfg)._replace(augment=noisy))
    for workers in (0, 2):
        cfg = settings(options, "--no-amp", "--num-workers", workers)
        layers = program.FrozenLayers(nn.Sequential(), cfg)
        passes.append(outputs_of(layers, files_of(own_images / "train"), 2, cfg))
    assert torch.equal(*passes) and not torch.equal(passes[0][:, 0], passes[0][:, 1])


@pytest.mark.parametrize("amp, tolerance", [("--no-amp", 1e-4), ("--amp", 0.15)])  # the latter: random weights
@pytest.mark.parametrize("blocks", [0, 2, 9])
def test_frozen_parts_say_what_the_model_itself_says(amp, tolerance, blocks, options, own_images):
    cfg, files = settings(options, amp), files_of(own_images / "val")
    model = program.build_model(3)
    program.start_without_pretraining(model, [path for _, path in files], cfg)
    images = torch.cat([torch.from_numpy(program.load_views(path, 0, 0, cfg)) for _, path in files])
    images = program.make_transforms(cfg).normalize(images.permute(0, 3, 1, 2))
    with torch.no_grad():
        expected, features = model.features[:9 - blocks](images), model.features(images).mean((2, 3))
    expected = expected if blocks else features
    frozen, unfrozen = program.split_model(model, blocks)
    cut = outputs_of(program.FrozenLayers(frozen, cfg), files, 0, cfg)
    assert cut.shape[:2] == (9, 1) and cut.dtype == cfg.dtype
    assert (cut[:, 0].float() - expected).norm() / expected.norm() < tolerance
    on = program.FrozenLayers(unfrozen, cfg)(cut)[:, 0].float()
    assert (on - features).norm() / features.norm() < 2 * tolerance


def test_a_frozen_copy_leaves_the_model_as_it_is(options):
    model = program.build_model(3)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    program.FrozenLayers(program.split_model(model, 0)[0], settings(options))
    assert same(before, dict(model.state_dict()))


def test_views_are_the_same_in_workers_and_in_any_batch(options, own_images):
    files, passes = files_of(own_images / "train"), []
    for extra in (["--num-workers", "0"], ["--num-workers", "2"]):
        cfg = settings(options, "--no-amp", *extra)
        layers = program.FrozenLayers(torch.nn.Sequential(), cfg)  # lets the normalized views through
        for layers.at_once in (2, 12):
            passes.append(outputs_of(layers, files, 2, cfg))
    assert passes[0].shape == (18, 3, 3, 40, 40) and all(torch.equal(other, passes[0]) for other in passes)


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("CUDA out of memory."),
                                   RuntimeError("MPS backend out of memory")])
def test_where_memory_is_short_fewer_images_are_taken_at_a_time(error, options, own_images):
    cfg, views = settings(options, "--no-amp"), torch.randint(0, 255, (5, 2, 40, 40, 3), dtype=torch.uint8)
    layers, sizes = program.FrozenLayers(nn.Sequential(), cfg), []

    def short_of_memory(batch):
        sizes.append(len(batch))
        if len(batch) > smallest:
            raise error
        return batch

    expected, layers.layers, smallest = layers(views), short_of_memory, 1
    assert torch.equal(layers(views), expected) and sizes == [4, 2, *[1] * 10]
    smallest = 0
    with pytest.raises(RuntimeError, match=str(error)):
        layers(views)


@pytest.mark.skipif(sys.platform != "linux" or not hasattr(ctypes.CDLL(None), "mallopt"), reason="another malloc")
def test_memory_that_a_step_frees_serves_the_next_one():
    script = f"""import ctypes, resource, sys
{inspect.getsource(program.keep_freed_memory)}
keep_freed_memory()
for _ in range(3):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    b"x" * 2**26
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)"""
    faults = int(subprocess.run([sys.executable, "-c", script], check=True, capture_output=True).stdout)
    assert faults < 1000  # else 16,384 pages of 4 kB are mapped anew


def test_the_smallest_images_work(small_network, options):
    """What remains of them is one pixel high, and its layout in memory is ambiguous."""
    assert call([*options, *ONE_EPOCH, "--views", "1", "--img-size", "32", "32"]) == 0


@real
def test_fast_frozen_part_says_what_the_plain_one_says(tmp_path):
    """On a real image of each sixth class: relative error below 6 %, and a head is right as often, but for one."""
    cfg = settings(["--eval-splits", "val", "--img-size", "128", "128", "--folds", "2", "--out-dir", str(tmp_path)])
    _, _, table = program.find_flowers102(Path(os.environ["FLOWERS_DIR"]), cfg)
    table = table[table.label % 6 == 0].assign(label=table.label // 6)
    tables = {split: table[table.split == split].groupby("label").head(count) for split, count in
              (("train", 2), ("val", 1))}
    model = program.build_model(17, program.load_pretrained(os.environ["WEIGHTS_FILE"]))
    layers = program.FrozenLayers(program.split_model(model, 0)[0], cfg)
    train, fast = (outputs_of(layers, list(enumerate(tables[name].path)), 0, cfg) for name in ("train", "val"))
    train_labels, labels = (torch.tensor(tables[name].label.tolist()) for name in ("train", "val"))
    heads = program.Heads(model.classifier[1], train_labels, cfg)
    heads.fit_closed_form(train)
    normalize, plain = program.make_transforms(cfg).normalize, []
    with torch.no_grad():
        for path in tables["val"].path:
            image = normalize(torch.from_numpy(program.load_views(path, 0, 0, cfg)).permute(0, 3, 1, 2))
            plain.append(model.features(image).mean((2, 3)))
    plain = torch.cat(plain)[:, None]
    logits = (features[:, 0].float() @ heads.weight[-1].T + heads.bias[-1] for features in (fast, plain))
    right_by_fast, right_by_plain = ((part.argmax(1) == labels).sum() for part in logits)
    assert (fast.float() - plain).norm() / plain.norm() < 0.06
    assert right_by_plain > 0.2 * len(labels) and abs(right_by_fast - right_by_plain) <= 1


# Files of activations


def test_a_tensor_is_computed_once_for_what_it_depends_on(cfg, outputs, tmp_path):
    log, other = [], outputs + 1
    assert same(program.compute_once("a" * 64, 300, batches_of(outputs, log), cfg), outputs) and log == [0]
    assert same(program.compute_once("a" * 64, 300, never, cfg), outputs)
    assert same(program.compute_once("b" * 64, 300, batches_of(other), cfg), other)
    assert same(program.compute_once("a" * 64, 300, never, cfg), outputs)
    assert len(activations(tmp_path / "runs")) == 2


def test_what_a_reader_changes_in_a_tensor_changes_no_file(cfg, outputs):
    program.compute_once("a" * 64, 300, batches_of(outputs), cfg).zero_()
    assert same(program.compute_once("a" * 64, 300, never, cfg), outputs)


@pytest.fixture
def noted_at_once(monkeypatch):
    """A clock by which every part of a pass takes longer than the time between two notes."""
    ticks = iter(range(0, 10**9, 60))
    monkeypatch.setattr(program, "time", SimpleNamespace(**vars(time) | {"monotonic": lambda: next(ticks)}))


def die():
    os.kill(os.getpid(), signal.SIGKILL)


def killed(work):
    """Does some work in a process of its own, which is killed in it."""
    child = os.fork()
    if not child:
        try:
            work()
        finally:
            os._exit(0)
    status = os.waitpid(child, 0)[1]
    assert os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL


@pytest.mark.parametrize("rows", [0, 4, 136, 296])
def test_a_pass_killed_after_any_note_goes_on_from_it_to_the_same_bits(rows, cfg, outputs, noted_at_once):
    log = []

    def compute_and_die(_done):
        for first in range(0, rows, 4):
            yield outputs[first:first + 4]
        die()

    killed(lambda: program.compute_once("a" * 64, 300, compute_and_die, cfg))
    assert same(program.compute_once("a" * 64, 300, batches_of(outputs, log), cfg), outputs) and log == [rows]
    assert same(program.compute_once("a" * 64, 300, never, cfg), outputs)


@pytest.mark.parametrize("moment", ["fsync", "replace", "truncate"])
def test_a_pass_killed_while_it_notes_loses_no_note_before(moment, cfg, outputs, noted_at_once):
    """The fifth note is cut short: rows are on the disk that no note tells of, or half of the next start is done."""
    log = []

    def fifth(call, *args):
        log.append(args)
        if len(log) == 5:
            die()
        return call(*args)

    def work():
        if moment != "truncate":
            call = getattr(os, moment)
            setattr(os, moment, lambda *args: fifth(call, *args))
            program.compute_once("a" * 64, 300, batches_of(outputs), cfg)
        else:  # killed twice
            program.compute_once("a" * 64, 300, lambda _done: [*outputs[:16].split(4), die()], cfg)

    killed(work)
    log.clear()
    assert same(program.compute_once("a" * 64, 300, batches_of(outputs, log), cfg), outputs)
    assert log[0] % 4 == 0 and (log[0] >= 8 or moment == "truncate")


@pytest.fixture
def unfinished(cfg, outputs, tmp_path, monkeypatch):
    """A pass that died after 256 rows, of which all are noted."""
    def compute_and_die(_done):
        yield outputs[:128]
        yield outputs[128:256]
        raise Killed

    with monkeypatch.context() as patch:
        ticks = iter(range(0, 10**9, 60))
        patch.setattr(program, "time", SimpleNamespace(**vars(time) | {"monotonic": lambda: next(ticks)}))
        with pytest.raises(Killed):
            program.compute_once("a" * 64, 300, compute_and_die, cfg)
    path, = activations(tmp_path / "runs")
    assert len(path.read_bytes()) == 256 * outputs[0].nbytes
    return path


ROW = 2 * 7 * 3 * 3 * 4  # bytes


@pytest.mark.parametrize("change, kept", [
    (lambda content: content + bytes(50 * ROW), 256),  # what was never noted may be anything, as after a power cut
    (lambda content: content + b"x" * (20 * ROW + 17), 256),
    (lambda content: content[:-1], 0), (lambda content: content[:128 * ROW], 0), (lambda _content: b"", 0)])
def test_an_unfinished_file_goes_on_from_what_is_surely_there(change, kept, unfinished, cfg, outputs):
    """A file that is shorter than noted was cut by somebody, who may have changed the rest too."""
    unfinished.write_bytes(change(unfinished.read_bytes()))
    log = []
    assert same(program.compute_once("a" * 64, 300, batches_of(outputs, log), cfg), outputs) and log == [kept]


def test_an_unfinished_file_that_is_missing_or_not_noted_begins_anew(unfinished, cfg, outputs):
    for path in (unfinished, unfinished.with_suffix(".json")):
        path.unlink()
        log = []
        assert same(program.compute_once("a" * 64, 300, batches_of(outputs, log), cfg), outputs) and log == [0]


@pytest.mark.parametrize("size", [0, 100, 299 * ROW, 300 * ROW - 1])
def test_a_whole_file_that_lost_its_tail_is_mended(size, cfg, outputs, tmp_path):
    program.compute_once("a" * 64, 300, batches_of(outputs), cfg)
    path, = activations(tmp_path / "runs")
    os.truncate(path, size)
    assert same(program.compute_once("a" * 64, 300, batches_of(outputs), cfg), outputs)
    assert same(program.compute_once("a" * 64, 300, never, cfg), outputs)


def test_a_disk_too_small_is_one_line_before_the_pass(small_network, options, tmp_path, monkeypatch, capsys):
    usage, loaded, load = shutil.disk_usage(tmp_path), [], program.load_views
    monkeypatch.setattr(program.shutil, "disk_usage", lambda _path: usage._replace(free=10_000))
    monkeypatch.setattr(program, "load_views", lambda *args: loaded.append(args) or load(*args))
    assert call([*options, "--views", "7"]) == 2
    assert is_one_line(capsys.readouterr().err, "--views", "GB")
    assert len([args for args in loaded if args[2]]) <= 1
    assert not any(activations(tmp_path / "runs").values())


# Runs that share them


def test_a_run_of_another_name_and_other_rates_computes_no_frozen_pass(trained, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(program, "batch_of_views", None)
    before = activations(tmp_path / "runs")
    assert len(before) == 4  # training views and validation, and the pooled features of both
    assert call([*trained, "--run-name", "u", "--lr-stage1", "3e-4", "--epochs-stage1", "2", "--batch-size", "4"]) == 0
    assert activations(tmp_path / "runs") == before and "new run" not in capsys.readouterr().out
    assert call([*trained, "--lr-stage1", "3e-4"]) == 0
    assert "changed: lr_stage1;" in capsys.readouterr().out and activations(tmp_path / "runs") == before


def test_what_they_depend_on_is_computed_anew(small_network, options, own_images, weights, monkeypatch):
    """One run after the other, each with one more change, up to the name of its first file."""
    names = []

    def name_and_stop(fingerprint, *_args):
        names.append(fingerprint)
        raise Killed

    monkeypatch.setattr(program, "compute_once", name_and_stop)
    torch.save(program.build_model(2, seed=1).state_dict(), weights)
    options = [*options, "--weights", weights]
    half = settings(options).dtype != torch.float32  # some processors have no half precision
    for change in (["--amp"], ["--views", "3"], ["--seed", "1"], ["--img-size", "40", "48"], ["--crop", "0.9"],
                   ["--unfreeze-last-blocks", "1"], *[["--no-amp"]] * half, "image", "weights"):
        if change == "image":
            draw(own_images / "train" / "red" / "0.png", (250, 10, 10), 99)
        elif change == "weights":
            torch.save(program.build_model(2, seed=5).state_dict(), weights)
        else:
            options += change
        with pytest.raises(Killed):
            call(options)
        assert names[-1] not in names[:-1], change
    with pytest.raises(Killed):
        call([*options, "--lr-stage1", "1", "--batch-size", "3", "--epochs-stage1", "7", "--run-name", "u",
              "--num-workers", "1", "--shrinkage", "0.5"])
    assert names[-1] == names[-2]
    with pytest.raises(Killed):
        call([*options, "--folds", "3"])
    assert names[-1] == names[-2], "folds"


def test_layers_of_the_same_weights_and_of_another_form_are_other_layers(cfg):
    """Such as another pooling or activation function, which somebody puts into the model after it was built."""
    tensor = torch.linspace(-1, 1, 75).view(1, 1, 3, 5, 5)
    given = program.Activations(tensor, torch.tensor([0]), "0")
    for layer in (nn.SiLU(), nn.ReLU(), nn.Hardtanh(), nn.Hardtanh(-0.1, 0.1)):
        told = program.pooled_features(given, nn.Sequential(layer), cfg).tensor
        assert torch.equal(told, layer(tensor.to(cfg.dtype)))


def test_layers_of_other_weights_or_precision_are_other_layers(cfg):
    layers, seen = nn.Sequential(nn.Conv2d(3, 4, 1)), set()
    for weight in (0.5, 0.25):
        nn.init.constant_(layers[0].weight, weight)
        for cfg.dtype in (torch.float32, torch.float16, torch.bfloat16):
            seen |= {program.FrozenLayers(layers, cfg).digest, program.FrozenLayers(layers, cfg).digest}
    assert len(seen) == 6


def test_files_of_other_splits_and_views_are_not_computed_again(trained, tmp_path):
    before = activations(tmp_path / "runs")
    assert call([*trained, "--eval-splits", "val", "test", "--views", "1"]) == 0
    after = activations(tmp_path / "runs")  # new are those of training views and of test, and what is made of both
    assert before.items() <= after.items() and len(after) == len(before) + 4


@pytest.mark.parametrize("moment", [7, 20])
def test_killed_during_the_frozen_pass_and_continued_is_never_interrupted(moment, trained, tmp_path, monkeypatch,
                                                                          noted_at_once, capsys):
    """Of 18 images for training and 9 for validation, one and four in a batch."""
    load, calls, folder = program.load_views, [], tmp_path / "killed"

    def in_the_pass(path, _index, num_views, _cfg):  # random weights look at plain training images before it
        return num_views or path.parts[-3] != "train"

    def load_or_die(*args):
        calls.extend([args] if in_the_pass(*args) else [])
        if len(calls) == moment:
            raise Killed
        return load(*args)

    monkeypatch.setattr(program, "load_views", load_or_die)
    with pytest.raises(Killed):
        call([*trained, "--out-dir", folder])
    assert not (folder / "t_last.pth").exists()
    rest = []
    monkeypatch.setattr(program, "load_views", lambda *args: rest.append(args) or load(*args))
    monkeypatch.setattr(program, "plot_mistakes", lambda *_args: program.Figure())
    assert call([*trained, "--out-dir", folder]) == 0
    assert same(checkpoints(tmp_path / "runs"), checkpoints(folder))
    assert activations(tmp_path / "runs") == {tmp_path / "runs" / path.relative_to(folder): content
                                              for path, content in activations(folder).items()}
    assert len(calls) - 1 + len([args for args in rest if in_the_pass(*args)]) <= 27 + 3  # a batch was lost


def old_files(folder, *sizes):
    """Files of activations that other runs have left, the first one used least recently."""
    (folder / "activations").mkdir(parents=True, exist_ok=True)
    paths = [folder / "activations" / f"{number:032d}.bin" for number in range(len(sizes))]
    for number, (path, size) in enumerate(zip(paths, sizes)):
        with open(path, "wb") as file:
            file.truncate(size)
        path.with_suffix(".json").write_text(json.dumps({"rows": 1, "row_bytes": size, "shape": [1, 1, size]}))
        os.utime(path, (1000 + number, 1000 + number))
    return paths


def test_what_was_not_used_for_longest_is_removed_beyond_keep_gb_and_nothing_in_use(trained, tmp_path):
    runs = tmp_path / "runs"
    mine = activations(runs)
    oldest, older, old = old_files(runs, 10**6, 10**6, 10**6)
    assert call([*trained, "--keep-gb", "0.0021", "--num-workers", "0"]) == 0
    assert not oldest.exists() and older.exists() is (sum(map(len, mine.values())) < 100_000) and old.exists()
    assert not oldest.with_suffix(".json").exists() and old.with_suffix(".json").exists()
    assert call([*trained, "--keep-gb", "0", "--num-workers", "0"]) == 0
    assert not older.exists() and not old.exists()
    frozen = {path: content for path, content in activations(runs).items() if path in mine}
    assert len(frozen) >= 2 and all(mine[path] == content for path, content in frozen.items())


def test_nothing_is_removed_while_another_run_is_going_on(trained, tmp_path):
    old, = old_files(tmp_path / "runs", 10**6)
    others = tmp_path / "runs" / "activations" / "layer3.bin"  # is none of the program's files
    others.write_bytes(b"mine")
    lock = FileLock(tmp_path / "runs" / ".other.lock")
    with lock:
        assert call([*trained, "--keep-gb", "0"]) == 0 and old.exists()
    (tmp_path / "runs" / ".another_users.lock").mkdir()  # cannot be opened, like a file of somebody else
    assert call([*trained, "--keep-gb", "0"]) == 0 and old.exists()
    (tmp_path / "runs" / ".another_users.lock").rmdir()
    assert call([*trained, "--keep-gb", "0"]) == 0 and not old.exists() and others.exists()


def test_a_second_run_says_that_it_waits_for_the_rows_that_another_computes(cfg, outputs, monkeypatch, tmp_path):
    """Two runs of other names that start together need the same activations."""
    pipe, child = os.pipe(), 0
    log, lock = [], tmp_path / "runs" / "activations" / f"{'a' * 32}.lock"

    def compute(done):
        nonlocal child
        child = os.fork()
        if not child:
            monkeypatch.setattr("builtins.print", lambda line: os.write(pipe[1], line.encode()))
            again = program.compute_once("a" * 64, 300, batches_of(outputs, log), cfg)
            os._exit(0 if same(again, outputs) and not log else 1)
        assert select.select([pipe[0]], [], [], 60)[0], "it waits without a word"
        told = os.read(pipe[0], 500).decode()
        assert told.startswith("waiting    for another run") and told.endswith(f"delete {lock}")
        yield from batches_of(outputs)(done)

    assert same(program.compute_once("a" * 64, 300, compute, cfg), outputs)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


# Processes that are left


def processes_of(group):
    """The living processes of a process group."""
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            state, _, its_group = path.read_text().rpartition(")")[2].split()[:3]
        except OSError:
            continue  # has ended meanwhile
        if int(its_group) == group and state not in "ZX":
            found.append(int(path.parent.name))
    return found


@pytest.fixture
def in_frozen_pass(small_network, options, monkeypatch, tmp_path):
    """Starts a run in a process group of its own and waits until its two workers work; returns the group."""
    options = [*options, *ONE_EPOCH, "--num-workers", "2", "--unfreeze-last-blocks", "9"]  # much for a pipe
    groups = []

    def start():
        ready, child = os.pipe(), os.fork()
        if not child:
            os.setsid()
            os.dup2(os.open(tmp_path / "stderr.txt", os.O_WRONLY | os.O_CREAT), 2)
            sys.stdout, sys.stderr = open(os.devnull, "w"), open(2, "w", buffering=1, closefd=False)
            parts = program.outputs_of_files

            def first_part_then_wait(*args):
                for part in parts(*args):
                    yield part
                    os.write(ready[1], b"1")
                    signal.pause()

            program.outputs_of_files = first_part_then_wait
            try:
                os._exit(program.main(options))
            finally:
                os._exit(99)
        groups.append(child)
        assert os.read(ready[0], 1) == b"1" and len(processes_of(child)) == 3
        return child

    yield start, options
    for group in groups:
        for process in processes_of(group):
            os.kill(process, signal.SIGKILL)


def all_gone(group, seconds=30):
    """Whether no process of a group is left, at the latest after so many seconds."""
    end = time.monotonic() + seconds
    while processes_of(group):
        if time.monotonic() > end:
            return False
    return True


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="looks for processes in /proc")
@pytest.mark.parametrize("how", ["SIGKILL of the main process", "SIGTERM to the group", "SIGINT to the group"])
def test_no_process_is_left_of_a_run_that_is_stopped_and_the_next_start_goes_on(how, in_frozen_pass, tmp_path, capfd):
    start, options = in_frozen_pass
    group = start()
    number = getattr(signal, how.split()[0])
    (os.killpg if "group" in how else os.kill)(group, number)
    code = os.waitstatus_to_exitcode(os.waitpid(group, 0)[1])
    assert all_gone(group)
    error = (tmp_path / "stderr.txt").read_text()
    if number == signal.SIGINT:
        assert code == 130 and error.count("\n") == 1 and "stopped: " in error
    else:
        assert code == -number and error == ""
    assert call([*options, "--num-workers", "0"]) == 0


# Images that change under the run's feet, and mistakes in transforms


def test_a_worker_that_the_system_has_killed_is_told_as_that(small_network, options, monkeypatch, capfd):
    """As Linux does where memory is short."""
    main_process = os.getpid()

    def killed(*_args, **_kw):
        assert os.getpid() != main_process
        os.kill(os.getpid(), signal.SIGKILL)

    monkeypatch.setattr(program, "batch_of_views", killed)
    assert call([*options, "--num-workers", "1"]) == 1
    assert is_one_line(capfd.readouterr().err, "out of memory", "NUM_WORKERS", "worker")


def test_an_image_that_breaks_during_the_run_is_named(small_network, options, own_images, monkeypatch, capsys):
    broken, find = own_images / "train" / "red" / "3.png", program.find_images

    def find_and_break(cfg):
        data = find(cfg)
        broken.write_bytes(b"no longer an image")
        return data

    monkeypatch.setattr(program, "find_images", find_and_break)
    assert call(options) == 2
    assert is_one_line(capsys.readouterr().err, str(broken))


@pytest.mark.parametrize("workers", [0, 1])
def test_a_mistake_in_the_transforms_is_not_called_an_unreadable_image(workers, small_network, options, monkeypatch,
                                                                       capsys):
    real_transforms = program.make_transforms

    def broken(_image):
        raise RuntimeError("views of unlike sizes")

    monkeypatch.setattr(program, "make_transforms", lambda cfg: real_transforms(cfg)._replace(augment=broken))
    with pytest.raises(RuntimeError, match="views of unlike sizes"):
        call([*options, "--num-workers", workers])
    assert "cannot read" not in capsys.readouterr().err
