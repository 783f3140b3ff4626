"""Nothing is lost: a run killed anywhere goes on to the same bits, and no file of another run is overwritten."""
import errno
import os
import shutil
import signal

import pytest
import torch
from conftest import (ONE_EPOCH, Killed, activations, call, checkpoint, checkpoints, draw, figures_of, history_of,
                      is_one_line, same)

import efficientnet_b3 as program

pytestmark = pytest.mark.usefixtures("undrawn", "small_network")


def as_it_stands(folder, copy):
    """A copy of a folder; files that are only ever replaced are linked."""
    copy.mkdir()
    for path in folder.iterdir():
        if path.is_dir():
            shutil.copytree(path, copy / path.name)
        else:
            (shutil.copy if path.suffix == ".tmp" else os.link)(path, copy / path.name)


def test_killed_anywhere_and_continued_is_never_interrupted(options, tmp_path, monkeypatch, capsys):
    """What is on the disk whenever a file is put in place is what a kill at that moment leaves.

    Of the files that are written one after the other, and not read again, one stands for all.
    """
    options = [*options, "--epochs-stage1", "1", "--epochs-stage2", "1"]
    replace, moments = os.replace, []

    def keep_and_replace(source, target):
        if not str(target).endswith((".png", "predictions.csv", "metrics.json", "config.json")):
            moments.append(tmp_path / f"{len(moments):02d} before {os.path.basename(target)}")
            as_it_stands(tmp_path / "runs", moments[-1])
        replace(source, target)

    monkeypatch.setattr(program.os, "replace", keep_and_replace)
    assert call(options) == 0
    monkeypatch.setattr(program.os, "replace", replace)
    monkeypatch.setattr(program, "report", lambda *args: program.write_history(*args[-2:], at_once=True))
    whole = [checkpoint(tmp_path / "runs", name) for name in ("best", "last", "frozen")]
    names = [moment.name for moment in moments]
    assert all(any(file in name for name in names) for file in ("best.pth", "last.pth", "frozen.pth", "history.csv",
                                                                "report.txt"))
    assert sum("last.pth" in name for name in names) == 3 and sum("before t_" not in name for name in names) >= 5
    trained = max(number for number, name in enumerate(names) if "last.pth" in name)
    # The continued runs make no report, nor the features that it looks at.
    of_report = {"t_report.txt.tmp", *(f"{name.split()[-1]}.tmp" for name in names[trained:] if " t_" not in name)}
    for moment in moments:
        assert call([*options, "--out-dir", moment]) == 0, moment.name
        assert same(whole, [checkpoint(moment, name) for name in ("best", "last", "frozen")]), moment.name
        assert {path.name for path in moment.glob("**/*.tmp")} <= of_report, moment.name
        shutil.rmtree(moment)


@pytest.mark.parametrize("moment", ["save_epoch", "write_history"])
def test_sigkill_after_an_epoch(moment, options, no_report, tmp_path, monkeypatch, capsys):
    """A real kill, at once or when the checkpoint is there, but nothing that tells of it."""
    child = os.fork()
    if not child:
        work = getattr(program, moment)

        def die(*args):
            if (tmp_path / "runs" / "t_history.csv").exists() and len(history_of(tmp_path / "runs")) == 2:
                os.kill(os.getpid(), signal.SIGKILL)
            work(*args)

        try:
            setattr(program, moment, die)
            call(options)
        finally:
            os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
    capsys.readouterr()
    assert call(options) == 0 and "new run" not in capsys.readouterr().out
    assert call([*options, "--out-dir", tmp_path / "whole"]) == 0
    assert same(checkpoints(tmp_path / "runs"), checkpoints(tmp_path / "whole"))


def test_ctrl_c_between_two_epochs_is_one_line_and_the_run_goes_on(options, no_report, tmp_path, monkeypatch, capsys):
    whole, save = [*options, "--out-dir", tmp_path / "whole"], program.save_epoch

    def interrupt(row, *args):
        save(row, *args)
        if row["epoch"] == 1:
            signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(program, "save_epoch", interrupt)
    assert call(options) == 130
    error = capsys.readouterr().err
    assert "stopped: " in error and error.count("\n") == 1
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler  # as it was: %run leaves nothing behind
    monkeypatch.setattr(program, "save_epoch", save)
    assert call(options) == 0 and "goes on    after epoch" in capsys.readouterr().out
    assert call(whole) == 0
    assert same(checkpoints(tmp_path / "runs"), checkpoints(tmp_path / "whole"))


def test_a_finished_run_makes_its_reports_again_and_says_so(trained, tmp_path, monkeypatch, capsys):
    options, runs = trained, tmp_path / "runs"
    figures, files = figures_of(runs), {path.name for path in runs.glob("t_*")}
    for name in files - {"t_last.pth"}:
        (runs / name).unlink()
    monkeypatch.setattr(program, "train_one_epoch", None)
    monkeypatch.setattr(program.Figure, "savefig", lambda _figure, file, **_kw: file.write(b"a picture"))
    assert call(options) == 0 and figures_of(runs) == figures
    assert "finished   all 1 epochs" in capsys.readouterr().out
    assert {path.name for path in runs.glob("t_*")} == files


def test_what_only_says_where_or_how_much_to_tell_starts_no_new_run(trained, own_images, tmp_path, capsys):
    own_images.rename(tmp_path / "moved")
    assert call([*trained, "--data-dir", tmp_path / "moved", "--eval-splits", "test", "--num-workers", "1",
                 "--device", "cpu", "--keep-gb", "3"]) == 0
    assert "new run" not in capsys.readouterr().out and figures_of(tmp_path / "runs", "test")["images"] == 6


def test_names_of_classes_may_be_added_after_the_training(trained, own_images, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(program, "train_one_epoch", None)
    (own_images / "cat_to_name.json").write_text('{"red": "poppy"}', "utf-8-sig")
    assert call(trained) == 0
    printed = capsys.readouterr().out
    assert "new run" not in printed and "poppy" in printed
    assert "poppy" in checkpoint(tmp_path / "runs", "best")["class_names"]


def test_a_changed_run_moves_the_old_files_aside_and_says_how_to_get_back(trained, no_report, own_images, tmp_path,
                                                                          capsys):
    """One run after the other, each with one more change."""
    options, runs = trained, tmp_path / "runs"
    changes = ("lr_stage2", "seed", "--fresh", "images", "folders")
    for number, change in enumerate(changes, 1):
        before = {path.name: path.read_bytes() for path in runs.glob("t_*.*")}
        if change == "images":
            draw(own_images / "train" / "red" / "0.png", (210, 30, 40), 99)
        elif change == "folders":
            for split in ("train", "val", "test"):
                (own_images / split / "red").rename(own_images / split / "rose")
        elif change != "--fresh":
            options += ["--" + change.replace("_", "-"), "2"]
        capsys.readouterr()
        assert call([*options, "--fresh"] if change == "--fresh" else options) == 0
        line, = [line for line in capsys.readouterr().out.splitlines() if line.startswith("new run")]
        assert change in line and str(runs / f"t_old{number}") in line and ("undo" in line) == (change != "--fresh")
        assert {path.name: path.read_bytes() for path in (runs / f"t_old{number}").iterdir()} == before


def test_an_earlier_run_whose_files_are_moved_back_goes_on(trained, no_report, tmp_path, monkeypatch, capsys):
    runs = tmp_path / "runs"
    before = checkpoints(runs)
    assert call([*trained, "--lr-stage1", "2e-3"]) == 0
    assert f"move its files back to {runs}" in capsys.readouterr().out
    for path in (runs / "t_old1").iterdir():
        path.replace(runs / path.name)
    monkeypatch.setattr(program, "train_one_epoch", None)
    assert call(trained) == 0 and same(checkpoints(runs), before)
    assert "new run" not in capsys.readouterr().out


def test_files_of_others_are_left_where_they_are(trained, no_report, tmp_path):
    notes = [tmp_path / "runs" / name for name in ("t_notes.txt", "t_2_last.pth")]
    for path in notes:
        path.write_text("of another run")
    assert call([*trained, "--seed", "1"]) == 0 and (tmp_path / "runs" / "t_old1").exists()
    assert all(path.exists() for path in notes)


def test_old_files_go_where_there_are_none(trained, no_report, tmp_path):
    """A folder of old files may have been deleted, and another run's name may begin alike."""
    (tmp_path / "runs" / "t_old2").mkdir()
    assert call([*trained, "--fresh"]) == 0 and (tmp_path / "runs" / "t_old1" / "t_last.pth").exists()
    assert not list((tmp_path / "runs" / "t_old2").iterdir())


def test_a_run_stopped_before_its_first_row_leaves_nothing_to_move_aside(options, no_report, tmp_path, monkeypatch,
                                                                         capsys):
    def die(*_args):
        raise Killed

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(program, "end_epoch", die)
        call(options)
    assert call(options) == 0 and "new run" not in capsys.readouterr().out
    assert not (tmp_path / "runs" / "t_old1").exists()


@pytest.mark.parametrize("error", [MemoryError(), RuntimeError("DefaultCPUAllocator: can't allocate memory")])
def test_memory_that_is_short_moves_no_run_aside(error, trained, no_report, tmp_path, monkeypatch, capsys):
    def load(*_args, **_kwargs):
        raise error

    monkeypatch.setattr(torch, "load", load)
    assert call(trained) == 1 and is_one_line(capsys.readouterr().err, "out of memory")
    assert not (tmp_path / "runs" / "t_old1").exists()


def test_a_run_with_a_constant_that_is_no_more_is_moved_aside_and_named(trained, no_report, tmp_path, capsys):
    path = tmp_path / "runs" / "t_last.pth"
    state = torch.load(path, weights_only=True)
    torch.save(state | {"config": state["config"] | {"schedule": "cosine"}}, path)
    assert call(trained) == 0
    assert "changed: schedule;" in capsys.readouterr().out and (tmp_path / "runs" / "t_old1").exists()


def test_another_precision_is_another_run(trained, no_report, monkeypatch, capsys):
    """One node has bfloat16, the next has not."""
    choose = program.choose_device

    def other_node(cfg):
        choose(cfg)
        cfg.dtype = torch.bfloat16 if cfg.dtype == torch.float32 else torch.float32

    monkeypatch.setattr(program, "choose_device", other_node)
    assert call(trained) == 0
    assert "new run    changed: precision;" in capsys.readouterr().out


# Some of the files alone


def test_the_last_checkpoint_is_enough_to_go_on(options, no_report, tmp_path, monkeypatch, capsys):
    """As brought back from a cloud disk in the middle of the training; the best row was an earlier one."""
    runs, whole, save = tmp_path / "runs", [*options, "--out-dir", tmp_path / "whole"], program.save_epoch
    monkeypatch.setattr(program, "scores", lambda split, *_args: {f"{split}_loss": 1.0, f"{split}_acc": 0.5})

    def stop(row, *args):
        save(row, *args)
        if row["epoch"] == 2:
            raise Killed

    monkeypatch.setattr(program, "save_epoch", stop)
    with pytest.raises(Killed):
        call(options)
    monkeypatch.setattr(program, "save_epoch", save)
    best = checkpoint(runs, "best")
    assert [row["epoch"] for row in best["history"]] == [0]
    (runs / "t_last.pth").rename(tmp_path / "t_last.pth")
    shutil.rmtree(runs)
    runs.mkdir()
    (tmp_path / "t_last.pth").rename(runs / "t_last.pth")
    assert call(options) == 0 and "new run" not in capsys.readouterr().out
    assert call(whole) == 0
    for name in ("best", "last", "frozen"):
        assert same(checkpoint(runs, name), checkpoint(tmp_path / "whole", name))
    assert same(checkpoint(runs, "best"), best)


def test_heads_that_train_go_on_where_the_model_has_refitted_ones(options, no_report, tmp_path, monkeypatch):
    options, save = [*options, "--refitted-epochs", "0"], program.save_epoch

    def stop(row, *args):
        save(row, *args)
        if row["epoch"] == 3:
            raise Killed

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(program, "save_epoch", stop)
        call(options)
    assert call(options) == 0 and call([*options, "--out-dir", tmp_path / "whole"]) == 0
    assert same(checkpoints(tmp_path / "runs"), checkpoints(tmp_path / "whole"))


def test_best_and_frozen_are_put_back_if_they_were_deleted(trained, no_report, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(program, "train_one_epoch", None)
    before = {name: checkpoint(tmp_path / "runs", name) for name in ("best", "frozen")}
    for name in before:
        (tmp_path / "runs" / f"t_{name}.pth").unlink()
    assert call(trained) == 0 and "new run" not in capsys.readouterr().out
    assert same(before, {name: checkpoint(tmp_path / "runs", name) for name in before})


def test_a_foreign_best_checkpoint_is_never_reported(trained, tmp_path, monkeypatch):
    monkeypatch.setattr(program, "train_one_epoch", None)
    runs, before = tmp_path / "runs", checkpoint(tmp_path / "runs", "best")
    figures = figures_of(runs)
    state = torch.load(runs / "t_best.pth", weights_only=True)
    torch.save(state | {"model": {key: value * 0 for key, value in state["model"].items()}}, runs / "t_best.pth")
    assert call(trained) == 0
    assert figures_of(runs) == figures and same(checkpoint(runs, "best"), before)


def test_the_best_checkpoint_copied_over_the_last_is_named_and_kept(trained, no_report, tmp_path, capsys):
    """It lacks the trainer's state."""
    runs = tmp_path / "runs"
    shutil.copy(runs / "t_best.pth", runs / "t_last.pth")
    left = (runs / "t_best.pth").read_bytes()
    assert call(trained) == 0
    line, = [line for line in capsys.readouterr().out.splitlines() if line.startswith("new run")]
    assert "t_last.pth" in line and "trainer" in line and str(runs / "t_old1") in line
    assert (runs / "t_old1" / "t_last.pth").read_bytes() == left


def test_damaged_checkpoints_are_moved_aside_and_named(trained, no_report, tmp_path, capsys):
    """One after the other; a checkpoint after each damage is that of a new run."""
    runs = tmp_path / "runs"
    last, whole = runs / "t_last.pth", checkpoints(runs)
    for number, (damage, told) in enumerate((
            (lambda: last.write_bytes(b"PK\x03\x04 broken"), "t_last.pth"), (last.unlink, ""),
            (lambda: last.write_bytes(last.read_bytes()[:-1000]), "t_last.pth"),
            (lambda: torch.save([], last), "t_last.pth"), (lambda: torch.save({"model": {}}, last), "history")), 1):
        damage()
        left = last.read_bytes() if last.exists() else None
        capsys.readouterr()
        assert call(trained) == 0
        line, = [line for line in capsys.readouterr().out.splitlines() if line.startswith("new run")]
        aside = runs / f"t_old{number}" / "t_last.pth"
        assert told in line and str(aside.parent) in line
        assert left == (aside.read_bytes() if aside.exists() else None)
        assert same(checkpoints(runs), whole)


def test_the_second_of_two_runs_at_once_ends_with_one_line(options, no_report, tmp_path, monkeypatch, capsys):
    codes, real = [], program.train_one_epoch

    def second_run(*args):
        if not codes:
            codes.append(None)  # the second one trains too, if it is not refused
            before = {path: path.read_bytes() for path in (tmp_path / "runs").iterdir() if path.is_file()}
            codes.append(call([*options, *ONE_EPOCH, "--fresh"]))
            assert {path: path.read_bytes() for path in before} == before
            codes.append(call([*options, *ONE_EPOCH, "--run-name", "u"]))
        return real(*args)

    monkeypatch.setattr(program, "train_one_epoch", second_run)
    assert call([*options, *ONE_EPOCH]) == 0
    assert codes[1:] == [2, 0] and is_one_line(capsys.readouterr().err, "another run of t", "--run-name", ".t.lock")


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
    assert is_one_line(capsys.readouterr().err, "No space left", "room", str(tmp_path / "full"))


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


def test_killed_in_the_middle_of_writing_leaves_the_file_before(trained, no_report, tmp_path, monkeypatch):
    """What a kill leaves half written is written over."""
    runs, before = tmp_path / "runs", checkpoints(tmp_path / "runs")
    (runs / "t_last.pth.tmp").write_bytes(b"half")
    (runs / "t_best.pth.tmp").write_bytes(b"half")
    assert call(trained) == 0 and same(checkpoints(runs), before)
    assert call([*trained, "--fresh"]) == 0 and not list(runs.glob("*.tmp"))


def cannot_be_replaced(monkeypatch, *endings):
    """Files that another program holds open, as Excel does on Windows."""
    replace = os.replace

    def refuse(source, target):
        if str(target).endswith(endings):
            raise PermissionError(errno.EACCES, "Permission denied", str(target))
        replace(source, target)

    monkeypatch.setattr(program.os, "replace", refuse)


def test_a_table_that_cannot_be_replaced_costs_no_training(options, tmp_path, monkeypatch, capsys):
    """It is opened in the middle of the training, and still open at its end."""
    with monkeypatch.context() as patch:
        cannot_be_replaced(patch, "history.csv")
        assert call(options) == 2 and is_one_line(capsys.readouterr().err, "Permission denied")
    assert len(checkpoint(tmp_path / "runs", "last")["history"]) == 5
    assert call(options) == 0 and len(history_of(tmp_path / "runs")) == 5


def test_a_checkpoint_that_cannot_be_replaced_stops_the_run(options, monkeypatch, capsys):
    """A run that could not go on from what it writes is no run; the system's own error says why."""
    cannot_be_replaced(monkeypatch, "last.pth")
    assert call(options) == 2
    assert is_one_line(capsys.readouterr().err, "Permission denied")


def test_killed_while_old_files_are_moved_aside_loses_none(trained, no_report, tmp_path, monkeypatch, capsys):
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
    assert activations(tmp_path / "runs")
