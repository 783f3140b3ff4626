"""Options, machines and habits: bad input gets one line, exit code 2 and leaves the files on disk as they are."""
import importlib.util
import os
import re
import runpy
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import (ONE_EPOCH, call, checkpoints, draw_classes, history_of, is_one_line, same, settings, start,
                      without_progress)

import efficientnet_b3 as program

SOURCE = Path(program.__file__).read_text("utf-8")

# options and what the message must say
ROWS = [
    (["--img-size", "300"], "IMG_SIZE"), (["--img-size", "8", "8"], "IMG_SIZE"),
    (["--img-size", "a", "b"], "--img-size"), (["--img-size", "64", "9999"], "IMG_SIZE"), (["--views", "0"], "VIEWS"),
    (["--views", "1.5"], "--views"), (["--eval-splits", "train"], "EVAL_SPLITS"),
    (["--eval-splits", "val", "val"], "EVAL_SPLITS"), (["--num-workers", "-2"], "NUM_WORKERS"),
    (["--num-workers", "many"], "--num-workers"), (["--unfreeze-last-blocks", "-1"], "UNFREEZE_LAST_BLOCKS"),
    (["--unfreeze-last-blocks", "10"], "UNFREEZE_LAST_BLOCKS"), (["--head-init", "zero"], "HEAD_INIT"),
    (["--demo"], "--data-dir"), (["--demo", "--data-dir", "{own}/test"], "--data-dir"),
    (["--demo", "--data-dir", "x" * 300], "xxx"), (["--data-dir", "x" * 300], "xxx"), (["--predict", "x" * 300], "xxx"),
    (["--demo", "--data-dir", "{own}/train/red/0.png"], "--data-dir"),
    (["--shrinkage", "0"], "SHRINKAGE"), (["--shrinkage", "1.1"], "SHRINKAGE"), (["--shrinkage", "nan"], "SHRINKAGE"),
    (["--layer-decay", "0"], "LAYER_DECAY"), (["--layer-decay", "2"], "LAYER_DECAY"), (["--crop", "1.5"], "CROP"),
    (["--crop", "-0.1"], "CROP"), (["--crop", "nan"], "CROP"), (["--val-fraction", "0"], "VAL_FRACTION"),
    (["--val-fraction", "1"], "VAL_FRACTION"), (["--val-fraction", "nan"], "VAL_FRACTION"),
    (["--folds", "1"], "FOLDS"), (["--epochs-stage1", "-1"], "EPOCHS_STAGE1"),
    (["--epochs-stage2", "-1"], "EPOCHS_STAGE2"), (["--epochs-stage1", "two"], "--epochs-stage1"),
    (["--lr-stage1", "0"], "LR_STAGE1"),
    (["--lr-stage1=-1e-3"], "LR_STAGE1"), (["--lr-stage2", "inf"], "LR_STAGE2"), (["--lr-stage2", "nan"], "LR_STAGE2"),
    (["--blocks-lr-factor", "0"], "BLOCKS_LR_FACTOR"), (["--batch-size", "0"], "BATCH_SIZE"),
    (["--batch-size", ""], "--batch-size"), (["--seed", "-1"], "SEED"), (["--run-name", "a/b"], "RUN_NAME"),
    (["--run-name", ""], "RUN_NAME"), (["--run-name", ".."], "RUN_NAME"), (["--run-name", "x" * 300], "xxx"),
    (["--no-such-option"], "--no-such-option"), (["--epochs"], "--epochs"), (["two\nlines"], "two"),
    (["--device", "abacus"], "abacus"), (["--device", "cuda:99"], "cuda:99"), (["--device", "meta"], "meta"),
    (["--checkpoint", "x.pth"], "--predict"), (["--predict"], "--predict"),
    (["--out-dir", "{own}/train/red/0.png"], "0.png"), (["--out-dir", "{own}/train/red/0.png/x"], "0.png"),
    (["--weights", "no_such_file.pth"], "no_such_file.pth"), (["--weights", ""], "--weights"),
    (["--weights", "{own}/train/red/0.png"], "0.png"), (["--weights", "IMAGENET1K_V1"], "--demo"),
    (["--data-dir", "{own}/nowhere"], "--demo"), (["--unfreeze-last-blocks", "9", "--views", "99999999"], "VIEWS"),
    (["--predict", "no_such_image.jpg"], "no_such_image.jpg"), (["--predict", "{own}/train"], "no checkpoint"),
    (["--predict", "{own}/empty"], "no images"), (["--data-dir", "{own}/train/red/0.png"], "Not a directory"),
    (["--seed", str(2**64)], "SEED"), (["--batch-size", str(2**40)], "BATCH_SIZE"),
]


def files_below(folder):
    """All files with their content, but for the lock of a run and the list of unreadable images."""
    return {path: path.read_bytes() for path in folder.rglob("*")
            if path.is_file() and path.name not in (".t.lock", ".demo.lock", "t_unreadable.txt")}


@pytest.mark.parametrize("row", ROWS, ids=[f"{number} {' '.join(row[0])}"[:50] for number, row in enumerate(ROWS)])
def test_one_line_and_exit_code_2(row, options, own_images, tmp_path, monkeypatch, downloads, capsys):
    extra, phrase = row
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "no_cache"))
    monkeypatch.chdir(tmp_path)
    (own_images / "empty").mkdir()
    before = files_below(tmp_path)
    code = call(options + [value.replace("{own}", str(own_images)) for value in extra])
    assert is_one_line(capsys.readouterr().err, phrase) and code == 2
    assert files_below(tmp_path) == before


@pytest.mark.parametrize("name, value", [("lr_stage1", "fast"), ("img_size", 300), ("img_size", (300.0, 300.0)),
                                         ("epochs_stage1", 8.0), ("amp", 1), ("eval_splits", "val"), ("seed", None)])
def test_a_constant_edited_to_a_wrong_type_is_named(name, value, monkeypatch, capsys):
    monkeypatch.setitem(program.CONSTANTS, name, value)
    with pytest.raises(SystemExit) as stop:
        program.parse_command_line([])
    error = capsys.readouterr().err
    assert stop.value.code == 2 and is_one_line(error) and re.search(name, error.replace("-", "_"), re.IGNORECASE)


def test_a_constant_edited_to_a_whole_number_still_takes_fractions(monkeypatch):
    monkeypatch.setitem(program.CONSTANTS, "blocks_lr_factor", 5)
    assert program.parse_command_line(["--blocks-lr-factor", "2.5"]).blocks_lr_factor == 2.5


def configuration():
    """The lines of the section Configuration that set a constant."""
    section = SOURCE[SOURCE.index("# ---- Configuration"):SOURCE.index("# ---- Data")]
    return re.findall(r"^([A-Z][A-Z0-9_]*) = (.*?)  # (.*)$", section, flags=re.MULTILINE)


def test_every_constant_is_an_option_with_its_comment(capsys):
    assert call(["--help"]) == 0
    text = capsys.readouterr().out
    assert program.__doc__.strip() in text
    constants = configuration()
    assert {name.lower() for name, *_ in constants} == program.CONSTANTS.keys()  # each of them has a comment
    for name, value, comment in constants:
        assert f"{name} = {value}  # {comment}" in text
        assert program.CONSTANTS[name.lower()] == eval(value)


def test_no_epochs_at_all_report_the_head_as_it_is_solved(small_network, options, tmp_path, no_figures, capsys):
    options = [*options, "--epochs-stage1", "0", "--epochs-stage2", "0"]
    assert call(options) == 0 and [row["epoch"] for row in history_of(tmp_path / "runs")] == [0]
    assert call(options) == 0 and "new run" not in capsys.readouterr().out


def test_options_are_read_as_their_constants_type(capsys):
    cfg = program.parse_command_line("--lr-stage1 3e-4 --img-size 64 32 --no-amp --eval-splits test".split())
    assert (cfg.lr_stage1, cfg.img_size, cfg.amp, cfg.eval_splits) == (3e-4, (64, 32), False, ("test",))
    assert cfg.batch_size == program.BATCH_SIZE and not cfg.predict and not cfg.fresh and not cfg.demo


def edited(tmp_path, **constants):
    """The program's source with other constants, without their comments."""
    source = SOURCE
    for name, value in constants.items():
        source, count = re.subn(f"^{name} = .*", lambda _match: f"{name} = {value!r}", source, flags=re.MULTILINE)
        assert count == 1
    (tmp_path / "edited.py").write_text(source, "utf-8")
    return tmp_path / "edited.py"


def test_a_constant_edited_to_have_no_comment_is_still_one(tmp_path):
    spec = importlib.util.spec_from_file_location("edited", edited(tmp_path, SEED=7))
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert module.parse_command_line([]).seed == 7


# Notebooks and imports


def test_importing_starts_nothing(tmp_path, monkeypatch, capfd):
    interrupt = signal.getsignal(signal.SIGINT)
    monkeypatch.chdir(tmp_path)
    runpy.run_path(program.__file__, run_name="efficientnet_b3")
    assert capfd.readouterr() == ("", "") and not list(tmp_path.iterdir())
    assert signal.getsignal(signal.SIGINT) is interrupt


def test_pasted_into_a_notebook_it_runs_with_the_constants_as_they_are(own_images, tmp_path, monkeypatch, capsys):
    """There is no __file__, and the arguments are the notebook's; the second time, the cell goes on with its run."""
    runs = str(tmp_path / "runs")
    constants = dict(DATA_DIR=str(own_images), OUT_DIR=runs, RUN_NAME="t", WEIGHTS="none", IMG_SIZE=(40, 40), VIEWS=2,
                     FOLDS=2, BATCH_SIZE=8, EPOCHS_STAGE1=1, EPOCHS_STAGE2=0, EVAL_SPLITS=("val",), NUM_WORKERS=1)
    source = edited(tmp_path, **constants).read_text("utf-8")
    monkeypatch.setattr(sys, "argv", ["ipykernel_launcher.py", "-f", "kernel.json"])
    interrupt = signal.getsignal(signal.SIGINT)
    cell = {"__name__": "__main__", "__builtins__": __builtins__, "X": ["a name in capitals that is the notebook's own"]}
    exec(compile(source, "<cell>", "exec"), cell)
    assert "macro_f1" in capsys.readouterr().out and (tmp_path / "runs" / "t_acc.png").exists()
    exec(compile(source, "<cell>", "exec"), cell)
    assert "new run" not in capsys.readouterr().out
    assert cell["CONSTANTS"].keys() == program.CONSTANTS.keys()
    assert signal.getsignal(signal.SIGINT) is interrupt  # the notebook's own


def test_a_notebooks_backend_is_not_asked_for():
    process = start("--help", MPLBACKEND="nonsense")
    printed, error = process.communicate()
    assert process.returncode == 0 and error == "" and "BATCH_SIZE" in printed


@pytest.mark.skipif(os.name != "posix", reason="needs POSIX signals")
def test_ctrl_c_while_libraries_are_imported_prints_no_traceback():
    """The signal is sent when the process has begun to load torch."""
    process = start("--help")
    maps = Path(f"/proc/{process.pid}/maps")
    while maps.exists() and process.poll() is None and "numpy" not in maps.read_text():
        pass
    process.send_signal(signal.SIGINT)
    printed, error = process.communicate()
    assert process.returncode in (-signal.SIGINT, 130) and printed == error == ""


# Machines


AS_ELSEWHERE = """
import multiprocessing, runpy, sys
import torch.multiprocessing
import efficientnet_b3  # loads all libraries as on this system
if __name__ == "__main__":
    method, program, *options = sys.argv[1:]
    multiprocessing.set_start_method(method)
    torch.multiprocessing.set_sharing_strategy("file_system")  # the one that macOS has
    if method == "forkserver":
        multiprocessing.set_forkserver_preload(["efficientnet_b3"])
    sys.platform = "darwin"  # on Linux the program forks
    for more in (), ("--predict", options[1] + "/train/red"):
        sys.argv = [program, *options, *more]
        runpy.run_path(program, run_name="__main__")
"""


def test_workers_that_start_afresh(options, tmp_path, monkeypatch, no_figures):
    """As on Windows and macOS, and on Linux from Python 3.14: the same bits as without workers."""
    monkeypatch.setenv("PYTHONPATH", str(Path(program.__file__).parent))
    processes = {}
    for method, count in (("spawn", 6), ("forkserver", 7)):  # of 7, one worker checks the files too
        for split, number in (("train", count), ("val", 1)):
            draw_classes(tmp_path / method / "images" / split, number, ["blue", "red"])
        command = [*options, *ONE_EPOCH, "--num-workers", "1", "--out-dir", str(tmp_path / method / "runs")]
        command[1] = str(tmp_path / method / "images")
        processes[method] = subprocess.Popen([sys.executable, "-c", AS_ELSEWHERE, method, program.__file__, *command],
                                             stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    for method, process in processes.items():
        printed, error = process.communicate()
        assert process.returncode == 0 and without_progress(error) == "", error
        images, runs = tmp_path / method / "images", tmp_path / method / "here"
        assert call([*options, *ONE_EPOCH, "--data-dir", images, "--out-dir", runs]) == 0
        assert same(checkpoints(runs), checkpoints(tmp_path / method / "runs"))
        assert printed.count("train/red/") == len(list(images.glob("train/red/*")))  # predictions


@pytest.mark.filterwarnings("ignore:This DataLoader will create")
@pytest.mark.parametrize("cores, asked, got", [(1, -1, 1), (8, -1, 8), (64, -1, 16), (64, 40, 40), (2, 0, 0)])
def test_one_worker_per_core_but_not_too_many(cores, asked, got, options, monkeypatch):
    monkeypatch.setattr(program, "cpu_count", lambda: cores)
    assert program.map_batches(len, list(range(1000)), 4, settings(options, "--num-workers", asked)).num_workers == got


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU that works")
def test_a_gpu_that_does_not_work_is_left_out_and_said_to_be(options, monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert settings(options, "--device", "auto").device == torch.device("cpu")
    printed = capsys.readouterr().out
    assert "without cuda" in printed and printed.count("\n") == 1
    assert call([*options, "--device", "cuda"]) == 2
    assert is_one_line(capsys.readouterr().err, "cuda", "--device")


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
