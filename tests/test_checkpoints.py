"""Nothing is lost: a run killed anywhere goes on to the same bits, and no file of another run is overwritten."""
import errno
import os
import shutil
import signal

import pytest
import torch
from conftest import (ONE_EPOCH, Killed, activations, call, checkpoint, checkpoints, draw, figures_of, history_of,
                      is_one_line, same, start, without_progress)
from torchvision.models import efficientnet_b3
from torchvision.transforms import v2

import efficientnet_b3 as program

pytestmark = pytest.mark.usefixtures("no_figures", "small_network")


@pytest.fixture
def whole_network(small_network, monkeypatch):
    """B3 itself."""
    monkeypatch.setattr(program, "efficientnet_b3", efficientnet_b3)


def as_it_stands(folder, copy):
    """A copy of a folder; files that are only ever replaced are linked."""
    copy.mkdir()
    for path in folder.iterdir():
        if path.is_file():
            (shutil.copy if path.suffix == ".tmp" else os.link)(path, copy / path.name)


def test_killed_anywhere_and_continued_is_never_interrupted(whole_network, options, tmp_path, monkeypatch, capsys):
    """What is on the disk whenever a file is put in place is what a kill at that moment leaves.

    Of the files that the report writes one after the other, the first one stands for all.
    """
    options = [*options, "--epochs-stage1", "1", "--epochs-stage2", "2"]
    replace, moments = os.replace, []

    def keep_and_replace(source, target):
        if not str(target).endswith((".png", "predictions.csv", ".json")):
            moments.append(tmp_path / f"{len(moments):02d} before {os.path.basename(target)}")
            as_it_stands(tmp_path / "runs", moments[-1])
        replace(source, target)

    monkeypatch.setattr(program.os, "replace", keep_and_replace)
    call(options)
    monkeypatch.setattr(program.os, "replace", replace)
    whole = checkpoints(tmp_path / "runs")
    names = [moment.name for moment in moments]
    files = ("activations_train", "activations_val", "features_train", "features_val", "refit", "best.pth", "last.pth",
             "history.csv", "report.txt")
    assert all(any(file in name for name in names) for file in files)
    assert sum("last.pth" in name for name in names) == 4
    for moment in moments:
        assert call([*options, "--out-dir", moment]) == 0, moment.name
        assert same(whole, checkpoints(moment)), moment.name
        assert not list(moment.glob("*.tmp")), moment.name
        shutil.rmtree(moment)


def test_sigkill_between_epochs(whole_network, options, tmp_path, capsys):
    """A real kill of the program as people run it, sent when the line of epoch 1 appears."""
    process = start(*options)
    for line in process.stdout:
        if line.split()[:2] == ["1", "1"]:
            process.kill()
            break
    process.communicate()
    assert process.returncode == -signal.SIGKILL and not (tmp_path / "runs" / "t_report.txt").exists()
    assert call(options) == 0 and "new run" not in capsys.readouterr().out
    assert call([*options, "--out-dir", tmp_path / "whole"]) == 0
    assert same(checkpoints(tmp_path / "runs"), checkpoints(tmp_path / "whole"))


def test_signals_end_with_one_line(options, tmp_path):
    """Ctrl-C and `kill`."""
    processes = {code: start(*options, "--epochs-stage1", "9999", "--num-workers", "1", "--out-dir", tmp_path / str(code))
                 for code in (128 + signal.SIGINT, 128 + signal.SIGTERM)}
    for code, process in processes.items():
        for line in process.stdout:
            if line.split()[:2] == ["1", "2"]:
                process.send_signal(code - 128)
                break
        error = process.communicate()[1]
        assert process.returncode == code
        assert error.startswith("stopped: ") and error.count("\n") == 1


def test_a_finished_run_makes_its_reports_again(trained, tmp_path, monkeypatch):
    options = trained
    figures = figures_of(tmp_path / "runs")
    for name in program.RUN_FILES[2:]:
        (tmp_path / "runs" / f"t_{name}").unlink()
    monkeypatch.setattr(program, "train_one_epoch", None)
    assert call(options) == 0 and figures_of(tmp_path / "runs") == figures
    assert all((tmp_path / "runs" / f"t_{name}").exists() for name in program.RUN_FILES)
    assert not (tmp_path / "runs" / "t_old1").exists()


def test_what_only_says_where_or_how_much_to_tell_starts_no_new_run(trained, own_images, tmp_path, capsys):
    own_images.rename(tmp_path / "moved")
    assert call([*trained, "--data-dir", tmp_path / "moved", "--eval-splits", "test", "--num-workers", "1",
                 "--device", "cpu"]) == 0
    assert "new run" not in capsys.readouterr().out and figures_of(tmp_path / "runs", "test")["images"] == 6


def test_a_changed_run_moves_the_old_files_aside_and_says_how_to_get_back(trained, own_images, tmp_path, monkeypatch,
                                                                          capsys):
    """One run after the other, each with one more change."""
    real, options, runs = program.make_transforms, trained, tmp_path / "runs"
    changes = ("lr_stage2", "seed", "--fresh", "epochs_stage1", "transforms", "images", "class_names")
    for number, change in enumerate(changes, 1):
        before = {f"t_{name}": (runs / f"t_{name}").read_bytes() for name in program.RUN_FILES}
        if change == "transforms":
            monkeypatch.setattr(program, "make_transforms",
                                lambda cfg: real(cfg)._replace(augment=real(cfg).augment.transforms[0]))
        elif change == "images":
            draw(own_images / "train" / "red" / "0.png", (210, 30, 40), 99)
        elif change == "class_names":
            for split in ("train", "val", "test"):
                (own_images / split / "red").rename(own_images / split / "rose")
        elif change != "--fresh":
            options += ["--" + change.replace("_", "-"), "2"]
        capsys.readouterr()
        assert call([*options, "--fresh"] if change == "--fresh" else options) == 0
        line, = [line for line in capsys.readouterr().out.splitlines() if line.startswith("new run")]
        assert change in line and str(runs / f"t_old{number}") in line and "back" in line
        assert {path.name: path.read_bytes() for path in (runs / f"t_old{number}").iterdir()} == before
    assert len(history_of(runs)) == 3


def test_files_moved_back_are_the_earlier_run_again(trained, tmp_path, monkeypatch, capsys):
    before = checkpoints(tmp_path / "runs")
    call([*trained, "--lr-stage1", "2e-3"])
    for path in (tmp_path / "runs" / "t_old1").iterdir():
        path.replace(tmp_path / "runs" / path.name)
    monkeypatch.setattr(program, "train_one_epoch", None)
    assert call(trained) == 0 and same(checkpoints(tmp_path / "runs"), before)


def test_old_files_go_where_there_are_none(trained, tmp_path):
    """A folder of old files may have been deleted, and another run's name may begin alike."""
    (tmp_path / "runs" / "t_old2").mkdir()
    assert call([*trained, "--fresh"]) == 0 and (tmp_path / "runs" / "t_old1" / "t_last.pth").exists()
    assert not list((tmp_path / "runs" / "t_old2").iterdir())


def test_an_edited_transform_starts_a_new_run_even_if_its_repr_is_the_same(options, tmp_path, monkeypatch, capsys):
    real, options = program.make_transforms, [*options, *ONE_EPOCH]

    def seldom(cfg):
        return real(cfg)._replace(augment=v2.RandomApply([real(cfg).augment], 0))

    def always(cfg):
        return real(cfg)._replace(augment=v2.RandomApply([real(cfg).augment], 1))

    monkeypatch.setattr(program, "make_transforms", seldom)
    call(options)
    before = activations(tmp_path / "runs", "train")
    monkeypatch.setattr(program, "make_transforms", always)
    assert call(options) == 0
    assert "changed: transforms" in capsys.readouterr().out
    assert not before.keys() & activations(tmp_path / "runs", "train").keys()


def test_a_run_with_a_constant_that_is_no_more_is_moved_aside_and_named(trained, tmp_path, capsys):
    for path in (tmp_path / "runs" / "t_best.pth", tmp_path / "runs" / "t_last.pth"):
        state = torch.load(path, weights_only=True)
        torch.save(state | {"config": state["config"] | {"schedule": "cosine"}}, path)
    assert call(trained) == 0
    assert "changed: schedule" in capsys.readouterr().out and (tmp_path / "runs" / "t_old1").exists()


def test_damaged_checkpoints_are_moved_aside_and_named(trained, tmp_path, capsys):
    """One after the other; a checkpoint after each damage is that of a new run."""
    runs = tmp_path / "runs"
    best, last = runs / "t_best.pth", runs / "t_last.pth"
    whole = checkpoints(runs)
    for number, damage in enumerate((
            lambda: last.write_bytes(b"PK\x03\x04 broken"), best.unlink, last.unlink, lambda: torch.save([], best),
            lambda: last.write_bytes(last.read_bytes()[:-1000]), lambda: torch.save({"model": {}}, last)), 1):
        damage()
        left = {path.name: path.read_bytes() for path in (best, last) if path.exists()}
        capsys.readouterr()
        assert call(trained) == 0 and "new run" in capsys.readouterr().out
        aside = runs / f"t_old{number}"
        assert left == {path.name: path.read_bytes() for path in aside.glob("*.pth")}
        assert same(checkpoints(runs), whole)


def test_the_best_checkpoint_of_another_run_is_never_reported(trained, tmp_path, monkeypatch, capsys):
    options = trained
    call([*options, "--seed", "1", "--out-dir", tmp_path / "other"])
    best, other = (folder / "t_best.pth" for folder in (tmp_path / "runs", tmp_path / "other"))
    shutil.copy(other, best)
    assert call(options) == 0
    assert "changed: seed" in capsys.readouterr().out
    assert checkpoint(tmp_path / "runs", "best")["config"] == checkpoint(tmp_path / "runs", "last")["config"]
    train = program.train

    def train_and_swap(*args):
        train(*args)
        shutil.copy(other, best)

    monkeypatch.setattr(program, "train", train_and_swap)
    (tmp_path / "runs" / "t_report.txt").unlink()
    assert call(options) == 1
    assert is_one_line(capsys.readouterr().err, "another run") and not (tmp_path / "runs" / "t_report.txt").exists()


def test_the_second_of_two_runs_at_once_ends_with_one_line(options, tmp_path, monkeypatch, capsys):
    codes, real = [], program.train_one_epoch

    def second_run(*args):
        if not codes:
            codes.append(None)  # the second one trains too, if it is not refused
            before = {path: path.read_bytes() for path in (tmp_path / "runs").iterdir()}
            codes.append(call([*options, *ONE_EPOCH, "--fresh"]))
            assert {path: path.read_bytes() for path in (tmp_path / "runs").iterdir()} == before
            codes.append(call([*options, *ONE_EPOCH, "--run-name", "u"]))
        return real(*args)

    monkeypatch.setattr(program, "train_one_epoch", second_run)
    assert call([*options, *ONE_EPOCH]) == 0
    assert codes[1:] == [2, 0] and is_one_line(capsys.readouterr().err, "another run of t", "--run-name")


def test_a_second_signal_kills():
    before = signal.getsignal(signal.SIGINT)
    try:
        with pytest.raises(KeyboardInterrupt):
            program.stop(signal.SIGINT, None)
        assert signal.getsignal(signal.SIGINT) == signal.SIG_DFL
    finally:
        signal.signal(signal.SIGINT, before)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_a_signal_that_arrives_within_a_destructor_stops_the_run_too(options, monkeypatch, capsys):
    """Python loses an exception there."""
    loss, before = program.Heads.loss, signal.getsignal(signal.SIGINT)

    class Interrupted:
        def __del__(self):
            program.stop(signal.SIGINT, None)

    def destroy_something(*args):
        Interrupted()
        return loss(*args)

    monkeypatch.setattr(program.Heads, "loss", destroy_something)
    try:
        assert call([*options, *ONE_EPOCH]) == 130
    finally:
        signal.signal(signal.SIGINT, before)
    assert without_progress(capsys.readouterr().err).startswith("stopped: ")
    monkeypatch.setattr(program.Heads, "loss", loss)
    assert call([*options, *ONE_EPOCH]) == 0  # an earlier call's signal stops no later one


# Files


def test_a_full_disk_leaves_the_checkpoint_before(trained, tmp_path, monkeypatch, capsys):
    before = (tmp_path / "runs" / "t_last.pth").read_bytes()

    def full(_file):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(program.os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        program.write_file(tmp_path / "runs" / "t_last.pth", "half")
    assert (tmp_path / "runs" / "t_last.pth").read_bytes() == before
    assert not list((tmp_path / "runs").glob("*.tmp"))
    assert call([*trained, "--out-dir", tmp_path / "full"]) == 1
    assert is_one_line(capsys.readouterr().err, "No space left", "room")


@pytest.mark.skipif(os.name != "posix", reason="needs a limit to the size of files")
def test_a_disk_that_is_full_in_the_middle_of_a_checkpoint_says_so(tmp_path):
    import resource
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))
    try:
        with pytest.raises(OSError, match="File too large"):
            program.write_file(tmp_path / "a.pth", {"model": torch.zeros(100_000)})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert not list(tmp_path.iterdir())


def test_files_are_whole_on_the_disk_before_they_get_their_name(tmp_path, monkeypatch):
    log, replace, fsync = [], os.replace, os.fsync
    monkeypatch.setattr(program.os, "fsync", lambda file: (log.append("written"), fsync(file)))
    monkeypatch.setattr(program.os, "replace", lambda *paths: (log.append("named"), replace(*paths)))
    program.write_file(tmp_path / "a.txt", "é\n")
    assert log == ["written", "named"] and (tmp_path / "a.txt").read_bytes() == "é\n".encode()


def test_an_unfinished_file_is_removed_whatever_ends_its_writing(tmp_path):
    for error in (KeyboardInterrupt, RuntimeError, OSError):
        with pytest.raises(error), program.replacing(tmp_path / "a.bin") as file:
            file.write(b"half")
            raise error
    assert not list(tmp_path.iterdir())


def test_stale_unfinished_files_are_removed(options, tmp_path):
    (tmp_path / "runs").mkdir()
    for name in ("t_last.pth.tmp", f"t_activations_train_{20 * '0'}.bin.tmp"):
        (tmp_path / "runs" / name).write_bytes(b"half")
    assert call([*options, *ONE_EPOCH]) == 0 and not list((tmp_path / "runs").glob("*.tmp"))


def test_killed_while_old_files_are_moved_aside_loses_none(trained, tmp_path, monkeypatch, capsys):
    before = checkpoints(tmp_path / "runs")
    rename, calls = program.Path.rename, []

    def rename_or_die(path, target):
        calls.append(path)
        if len(calls) == 2:
            raise Killed
        return rename(path, target)

    monkeypatch.setattr(program.Path, "rename", rename_or_die)
    with pytest.raises(Killed):
        call([*trained, "--fresh"])
    monkeypatch.setattr(program.Path, "rename", rename)
    assert call([*trained, "--fresh"]) == 0
    found = {name: torch.load(path, weights_only=True) for name in ("best", "last")
             for path in (tmp_path / "runs").glob(f"t_old*/t_{name}.pth")}
    assert all(same(found[name]["model"], state["model"]) for name, state in zip(("best", "last"), before))
