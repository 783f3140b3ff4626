"""Options, machines and habits: bad input gets one line, exit code 2 and leaves the files on disk as they are; a bug of
somebody who edits the program is a traceback."""
import errno
import multiprocessing.synchronize  # noqa: F401  (patched by name)
import os
import re
import runpy
import signal
import socket
import sys
import threading
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import (ONE_EPOCH, call, checkpoints, edited, execute, history_of, is_one_line, same, settings,
                      small_efficientnet)
from filelock import FileLock
from PIL import Image

import efficientnet_b3 as program

pytestmark = pytest.mark.usefixtures("undrawn")
SOURCE = Path(program.__file__).read_text("utf-8")

# options and what the message must say
ROWS = [
    (["--img-size", "300"], "IMG_SIZE"), (["--img-size", "8", "8"], "IMG_SIZE"),
    (["--img-size", "a", "b"], "--img-size"), (["--views", "0"], "VIEWS"), (["--views", "1.5"], "--views"),
    (["--batch-size", "8.0"], "--batch-size"),
    (["--train-splits", "val"], "TRAIN_SPLITS"), (["--train-splits", "test"], "TRAIN_SPLITS"),
    (["--eval-splits", "train"], "EVAL_SPLITS"), (["--num-workers", "many"], "--num-workers"),
    (["--unfreeze-last-blocks", "-1"], "UNFREEZE_LAST_BLOCKS"),
    (["--unfreeze-last-blocks", "10"], "UNFREEZE_LAST_BLOCKS"), (["--head-init", "zero"], "HEAD_INIT"),
    (["--demo"], "--data-dir"), (["--demo", "--data-dir", "{own}/test"], "--data-dir"),
    (["--demo", "--data-dir", "{own}/train/red/0.png"], "--data-dir"),
    (["--shrinkage", "0"], "SHRINKAGE"), (["--shrinkage", "1.1"], "SHRINKAGE"), (["--shrinkage", "nan"], "SHRINKAGE"),
    (["--crop", "1.5"], "CROP"), (["--crop", "-0.1"], "CROP"), (["--crop", "nan"], "CROP"),
    (["--val-fraction", "1.1"], "VAL_FRACTION"), (["--val-fraction", "nan"], "VAL_FRACTION"),
    (["--val-fraction", "0"], "VAL_FRACTION"),
    (["--folds", "1"], "FOLDS"),
    (["--epochs-stage1", "-1"], "epochs"), (["--epochs-stage2", "-1"], "epochs"),
    (["--epochs-stage1", "two"], "--epochs-stage1"),
    (["--batch-size", "0"], "BATCH_SIZE"), (["--batch-size", ""], "--batch-size"), (["--seed", "-1"], "SEED"),
    (["--seed", "20261130022400123456789"], "SEED"), (["--lr-stage1", "-1"], "learning rates"),
    (["--lr-stage2", "nan"], "learning rates"), (["--layer-decay", "-1"], "factors"),
    (["--blocks-lr-factor", "inf"], "factors"),
    (["--weights", 300 * "x"], "there is no file"),
    (["--data-dir", 300 * "x"], "is no folder"), (["--predict", 300 * "x"], "does not exist"),
    (["--predict", "{own}/train/red/0.png", "--checkpoint", 300 * "x"], "there is no file"),
    (["--run-name", "a/b"], "RUN_NAME"), (["--run-name", ""], "RUN_NAME"), (["--run-name", ".."], "RUN_NAME"),
    (["--out-dir", "{own}", "--data-dir", "{own}/train/.."], "OUT_DIR"),
    (["--run-name", 240 * "x"], "RUN_NAME"), (["--run-name", 80 * "花"], "RUN_NAME"),
    (["--no-such-option"], "--no-such-option"), (["--epochs"], "--epochs"),
    (["two\nlines"], "two"), (["--device", "abacus"], "abacus"), (["--device", "cuda:99"], "cuda:99"),
    (["--device", "meta"], "meta"), (["--checkpoint", "x.pth"], "--predict"), (["--predict"], "--predict"),
    (["--out-dir", "{own}/train/red/0.png"], "0.png"), (["--out-dir", "{own}/train/red/0.png/x"], "0.png"),
    (["--weights", "no_such_file.pth"], "no_such_file.pth"), (["--weights", ""], "no file"),
    (["--weights", "{own}/train/red/0.png"], "0.png"), (["--weights", "IMAGENET1K_V1"], "--demo"),
    (["--data-dir", "{own}/nowhere"], "{own}/nowhere"), (["--data-dir", "{own}/train/red/0.png"], "0.png"),
    (["--data-dir", "data"], "--demo"), (["--predict", "no_such_image.jpg"], "no_such_image.jpg"),
    (["--predict", "{own}/train"], "t_best.pth"),
]


def files_below(folder):
    """All files with their content, but for locks, the list of unreadable images and an activation file just begun."""
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file() and path.name[0] != "."
            and path.name != "t_unreadable.txt" and path.parent.name != "activations"}


@pytest.mark.parametrize("row", ROWS, ids=[f"{number} {' '.join(row[0])}"[:50] for number, row in enumerate(ROWS)])
def test_one_line_and_exit_code_2(row, options, own_images, tmp_path, monkeypatch, downloads, capsys):
    extra, phrase = row
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "no_cache"))
    monkeypatch.chdir(tmp_path)
    before = files_below(tmp_path)
    code = call(options + [value.replace("{own}", str(own_images)) for value in extra])
    error = capsys.readouterr().err
    assert is_one_line(error, phrase.replace("{own}", str(own_images))) and code == 2, error
    assert files_below(tmp_path) == before


def configuration():
    """The lines of the section Configuration that set a constant."""
    section = SOURCE[SOURCE.index("# ---- Configuration"):SOURCE.index("# ---- Data")]
    return re.findall(r"^([A-Z][A-Z0-9_]*) = (.*?)  # (.*)$", section, flags=re.MULTILINE)


def test_every_constant_is_an_option_with_its_comment(monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "1000")
    assert call(["--help"]) == 0
    text = capsys.readouterr().out
    text = " ".join(text.split())
    constants = configuration()
    assert {name.lower() for name, *_ in constants} == program.CONSTANTS.keys()  # each of them has a comment
    for name, value, comment in constants:
        assert f" --{name.lower().replace('_', '-')}" in text and f" {comment} (" in text
        assert program.CONSTANTS[name.lower()] == (list(eval(value)) if "(" in value else eval(value))


def test_no_epochs_at_all_report_the_head_as_it_is_solved(small_network, options, tmp_path, capsys):
    options = [*options, "--epochs-stage1", "0", "--epochs-stage2", "0"]
    assert call(options) == 0 and [row["epoch"] for row in history_of(tmp_path / "runs")] == [0]
    assert call(options) == 0 and "new run" not in capsys.readouterr().out


def test_options_are_read_as_their_constants_type(capsys):
    cfg = program.parse_command_line("--lr-stage1 3e-4 --img-size 64 32 --no-amp --eval-splits test".split())
    assert (cfg.lr_stage1, cfg.img_size, cfg.amp, cfg.eval_splits) == (3e-4, [64, 32], False, ["test"])
    assert cfg.batch_size == program.BATCH_SIZE and not cfg.predict and not cfg.fresh and not cfg.demo


def with_constants(**constants):
    """The program's source with other constants, without their comments."""
    source = SOURCE
    for name, value in constants.items():
        source, count = re.subn(f"^{name} = .*", lambda _match: f"{name} = {value!r}", source, flags=re.MULTILINE)
        assert count == 1
    return source


def test_constants_edited_to_have_no_comment_or_to_be_lists_are_still_options():
    namespace = execute(with_constants(SEED=7, IMG_SIZE=[64, 32]))
    cfg = namespace["parse_command_line"](["--epochs-stage1", "3"])
    assert (cfg.seed, cfg.img_size, cfg.epochs_stage1) == (7, [64, 32], 3)
    assert namespace["parse_command_line"](["--seed", "8"]).seed == 8


def test_constants_that_numpy_has_computed_are_plain_ones():
    """A checkpoint may hold no others."""
    source = SOURCE.replace("LR_STAGE2 = 1e-4", "LR_STAGE2 = 1e-4 * np.sqrt(4)")
    source = source.replace("IMG_SIZE = (300, 300)", "IMG_SIZE = np.array([64, 32])")
    source = source.replace("BATCH_SIZE = 32", "BATCH_SIZE = np.int64(3)")
    namespace = execute(source.replace("# Model\n", "PAIRS = ((1, 'a'), (2,))\n\n# Model\n"))
    cfg = namespace["parse_command_line"]([])
    assert [type(value) for value in (cfg.lr_stage2, *cfg.img_size, cfg.batch_size)] == [float, int, int, int]
    assert (cfg.lr_stage2, cfg.img_size, cfg.batch_size, cfg.pairs) == (2e-4, [64, 32], 3, [[1, "a"], [2]])
    assert namespace["parse_command_line"](["--img-size", "48", "40"]).img_size == [48, 40]


def test_constants_may_be_annotated_and_written_without_spaces(tmp_path):
    module = edited(tmp_path / "other.py", ("SEED = 0", "SEED: int = 3"), ("BATCH_SIZE = 32", "BATCH_SIZE=16"))
    cfg = module.parse_command_line(["--batch-size", "8"])
    assert (cfg.seed, cfg.batch_size) == (3, 8) and module.parse_command_line(["--seed", "4"]).seed == 4
    assert module.code_of() == program.code_of()  # they count by their values


def test_no_split_to_report_is_one_line(capsys):
    namespace = execute(with_constants(EVAL_SPLITS=()))
    with pytest.raises(SystemExit):
        namespace["parse_command_line"]([])
    assert is_one_line(capsys.readouterr().err, "EVAL_SPLITS")


def test_a_file_that_may_not_be_read_is_one_line(small_network, options, weights, monkeypatch, capsys):
    def denied(path, *_args, **_kw):
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(torch, "load", denied)
    assert call([*options, "--weights", weights]) == 2
    assert is_one_line(capsys.readouterr().err, str(weights), "Permission denied")


# Notebooks and imports


def left_behind():
    """What of a process an import could change."""
    handlers = {number: signal.getsignal(number) for number in signal.valid_signals()}
    return [handlers, threading.enumerate(), list(warnings.filters), socket.getdefaulttimeout(), sys.excepthook,
            sys.unraisablehook, np.random.get_state()[1].tolist(), torch.get_rng_state().tolist(),
            torch.get_num_threads(), torch.are_deterministic_algorithms_enabled(), torch.is_grad_enabled(), sys.stdout,
            sys.stderr, os.getcwd()]


def test_importing_starts_nothing_and_nothing_stays_behind(tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    before = left_behind()
    runpy.run_path(program.__file__, run_name="efficientnet_b3")
    assert capfd.readouterr() == ("", "") and not list(tmp_path.iterdir())
    assert left_behind() == before


def test_pasted_into_a_notebook_it_runs_with_the_constants_as_they_are(
        own_images, tmp_path, monkeypatch, capsys):
    """There is no __file__, and the arguments are the notebook's; the second time, the cell goes on with its run."""
    runs = str(tmp_path / "runs")
    constants = dict(DATA_DIR=str(own_images), OUT_DIR=runs, RUN_NAME="t", WEIGHTS="none", IMG_SIZE=(40, 40), VIEWS=2,
                     FOLDS=2, BATCH_SIZE=8, EPOCHS_STAGE1=1, EPOCHS_STAGE2=0, EVAL_SPLITS=("val",), NUM_WORKERS=1)
    source = with_constants(**constants)
    monkeypatch.setattr("torchvision.models.efficientnet.efficientnet_b3", small_efficientnet)
    monkeypatch.setattr(sys, "argv", ["ipykernel_launcher.py", "-f", "kernel.json"])
    handlers = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    cell = {"__name__": "__main__", "__builtins__": __builtins__}
    execute(source, namespace=cell)
    assert "macro_f1" in capsys.readouterr().out and (tmp_path / "runs" / "t_acc.png").exists()
    execute(source, namespace=cell)
    assert "new run" not in capsys.readouterr().out
    assert cell["CONSTANTS"].keys() == program.CONSTANTS.keys()
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == handlers  # the notebook's own


def test_help_without_docstrings(capsys):
    """As `python -OO` compiles the program."""
    namespace = {"__name__": "optimized"}
    exec(compile(SOURCE, program.__file__, "exec", optimize=2), namespace)
    with pytest.raises(SystemExit) as stop:
        namespace["main"](["--help"])
    assert stop.value.code == 0 and not namespace.get("__doc__") and "--batch-size" in capsys.readouterr().out


# Machines


@pytest.mark.parametrize("cores, asked, got", [(1, -1, 1), (8, -1, 8), (64, -1, 16), (64, 40, 40), (2, 0, 0)])
def test_one_worker_per_core_but_not_too_many(cores, asked, got, options, monkeypatch):
    loaders = []
    monkeypatch.setattr(program, "cpu_count", lambda: cores)
    monkeypatch.setattr(program, "DataLoader", lambda *_args, **how: loaders.append(how) or [])
    program.map_batches(len, list(range(1000)), settings(options, "--num-workers", asked))
    assert [how["num_workers"] for how in loaders] == [got]
    if sys.platform == "linux" and got:  # also where Python's own choice is forkserver
        assert loaders[0]["multiprocessing_context"] == "fork"


@pytest.mark.parametrize("place, error", [
    ("os.fork", BlockingIOError(errno.EAGAIN, "Resource temporarily unavailable")),
    ("multiprocessing.synchronize.SemLock.__init__", OSError(errno.EROFS, "Read-only file system")),
    ("threading.Thread.start", RuntimeError("can't start new thread"))])
@pytest.mark.usefixtures("small_network")
def test_workers_that_cannot_start_are_told_as_such(place, error, options, monkeypatch, capfd):
    """A limit of processes or threads, /dev/shm that cannot be written: the system's own words, and what helps."""
    def fail(*_args, **_kwargs):
        raise error

    monkeypatch.setattr(place, fail)
    assert call([*options, "--num-workers", "2"]) == 2
    assert is_one_line(capfd.readouterr().err, str(error.args[-1]), "--num-workers 0")
    assert call([*options, *ONE_EPOCH, "--num-workers", "0"]) == 0  # which does help


@pytest.mark.parametrize("capabilities, amp, dtype", [
    ({"avx512_bf16": True}, "--amp", torch.bfloat16), ({"bf16": True}, "--amp", torch.bfloat16),
    ({"avx512_bf16": False, "amx_bf16": False}, "--amp", torch.float32), ({}, "--amp", torch.float32),
    ({"avx512_bf16": True}, "--no-amp", torch.float32)])
def test_half_precision_where_the_processor_has_it(capabilities, amp, dtype, options, monkeypatch):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities)
    assert settings(options, amp, "--device", "cpu").dtype == dtype


@pytest.mark.parametrize("error, phrase", [(PermissionError(13, "Permission denied", "/x/runs"), "/x/runs"),
                                           (OSError(30, "Read-only file system", "/x/runs"), "Read-only")])
def test_a_folder_that_cannot_be_written_is_named(error, phrase, options, monkeypatch, capsys):
    def fail(*_args, **_kwargs):
        raise error

    monkeypatch.setattr(program.Path, "mkdir", fail)
    assert call(options) == 2
    assert is_one_line(capsys.readouterr().err, phrase)


@pytest.mark.parametrize("error", [OSError(errno.ENOLCK, "No locks available"),
                                   OSError(errno.ENOSYS, "Function not implemented"),
                                   NotImplementedError("FileSystem does not appear to support flock")])
def test_a_disk_that_cannot_lock_is_told_as_that(error, options, tmp_path, monkeypatch, capsys):
    def fail(*_args, **_kwargs):
        raise error

    monkeypatch.setattr(FileLock, "_acquire", fail)
    assert call(options) == 2
    message = capsys.readouterr().err
    assert is_one_line(message, str(tmp_path / "runs" / ".t.lock"), "lock", str(error.args[-1]), "--out-dir")
    assert "another run" not in message and "room" not in message


def test_the_lock_of_a_machine_that_is_gone_is_named(options, tmp_path, capsys):
    (tmp_path / "runs").mkdir()
    with FileLock(tmp_path / "runs" / ".t.lock"):
        assert call(options) == 2
    assert is_one_line(capsys.readouterr().err, "another run", str(tmp_path / "runs" / ".t.lock"), "delete")


@pytest.mark.parametrize("workers", [0, 1])
def test_an_image_that_vanishes_meanwhile_is_one_line(workers, small_network, options, own_images, monkeypatch, capfd):
    """Once it has been checked, say from a disk that is unplugged; nobody needs a worker's traceback."""
    find = program.find_images

    def find_and_lose(cfg):
        data = find(cfg)
        (own_images / "train" / "red" / "3.png").unlink()
        return data

    monkeypatch.setattr(program, "find_images", find_and_lose)
    assert call([*options, "--num-workers", workers]) == 2
    assert is_one_line(capfd.readouterr().err, str(own_images / "train" / "red" / "3.png"), "No such file")


def test_an_unreadable_image_of_known_cause_is_named_with_its_path(options, own_images, capsys):
    Image.fromarray(np.zeros((40, 40), np.float32)).save(own_images / "train" / "red" / "deep.tif")
    assert call(options) == 2
    assert is_one_line(capsys.readouterr().err, "1 of 28", str(own_images / "train" / "red" / "deep.tif"), "32 bits")


# Bugs of those who edit the program


def with_bug(path, place, bug):
    """The program with a bug as the first statement of a function."""
    source = Path(program.__file__).read_text("utf-8")
    head = re.search(rf'( *)def {place}\(.*?\):\n( +""".*?"""\n)?', source, flags=re.DOTALL)
    before, indent = head[0], head[1] + "    "
    return edited(path, (before, f"{before}{indent}{BUGS[bug]}\n"),
                  append="\n\ndef somebodys_function():\n    return [][1]\n")


BUGS = {"NameError": "undefined_name", "FileNotFoundError": 'open("/no/such/table.csv")',
        "ValueError": 'Image.new("RGB", "large")', "IndexError": "somebodys_function()",
        "PermissionError": 'raise PermissionError("mine")'}
PLACES = ["load_image", "load_views", "build_model", "find_images", "make_transforms", "check_images",
          "load_pretrained", "frozen_activations", "batch_of_views", "train_one_epoch", "fit_closed_form", "end_epoch",
          "write_history", "measure", "plot_mistakes"]


@pytest.mark.parametrize("place, bug, workers", [
    *((place, bug, 0) for place in PLACES[:3] for bug in BUGS),
    *(("load_image", bug, 1) for bug in [*BUGS][:4]), ("load_views", "FileNotFoundError", 1),
    ("batch_of_views", "NameError", 1),
    *((place, bug, 0) for place, bug in zip(PLACES, [*BUGS] * 3) if place not in PLACES[:3])])
def test_a_bug_is_a_traceback(place, bug, workers, options, tmp_path, monkeypatch, capfd):
    """And never a user's error, a broken image or a full disk."""
    module = with_bug(tmp_path / "with_bug.py", place, bug)
    monkeypatch.setattr(module, "efficientnet_b3", small_efficientnet)
    if place == "load_pretrained":
        torch.save(small_efficientnet(2).state_dict(), tmp_path / "own.pth")
        options = [*options, "--weights", str(tmp_path / "own.pth")]
    with pytest.raises(getattr(__import__("builtins"), bug)):
        module.main([*options, *ONE_EPOCH, "--head-init", "lda", "--num-workers", str(workers)])
    assert "error: " not in capfd.readouterr().err


# Last, as it waits for the run beside


def test_workers_that_start_afresh_give_the_same_bits(run_elsewhere):
    assert run_elsewhere.code == 0 and run_elsewhere.err == ""
    assert call([*run_elsewhere.options, "--num-workers", "0", "--out-dir", run_elsewhere.folder / "here"]) == 0
    assert same(*(checkpoints(run_elsewhere.folder / name) for name in ("here", "runs")))
