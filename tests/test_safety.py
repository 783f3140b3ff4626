"""Nothing is lost and nothing is silently wrong: resume, atomic files, damaged files, signals, repair."""
import errno
import os
import signal
import subprocess
import sys

import pytest
import torch
from torchvision.transforms import v2

import efficientnet_b3 as program


ONE_EPOCH = ["--epochs-stage1", "1", "--epochs-stage2", "0"]


class Killed(BaseException):
    """Stands for SIGKILL: nothing in the program may catch it."""


@pytest.fixture(autouse=True)
def no_pictures(monkeypatch):
    """Drawing figures would take a third of the time, and none of these tests looks at one."""
    monkeypatch.setattr(program, "png_bytes", lambda *_args, **_kw: b"")


def checkpoint(folder, name):
    state = torch.load(folder / f"t_{name}.pth", weights_only=True)
    for row in state["history"]:
        del row["seconds"]
    return state


def same(a, b):
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b


def test_killed_anywhere_and_continued_is_never_interrupted(options, tmp_path, monkeypatch, capsys):
    """Checkpoints are put in place 5 to 8 times in 4 epochs, the last one at a tenth of the rate; the run is killed at
    each of these moments and after."""
    options = options + ["--epochs-stage1", "1", "--epochs-stage2", "3"]
    program.main(options)
    whole = [checkpoint(tmp_path / "runs", name) for name in ("best", "last")]
    replace = os.replace
    for moment in range(1, 10):
        folder, calls = tmp_path / f"killed{moment}", []

        def replace_or_die(source, target):
            calls.append(target)
            if len(calls) == moment:
                raise Killed
            replace(source, target)

        monkeypatch.setattr(program.os, "replace", replace_or_die)
        with pytest.raises(Killed):
            program.main(options + ["--out-dir", str(folder)])
        monkeypatch.setattr(program.os, "replace", replace)
        assert program.main(options + ["--out-dir", str(folder)]) == 0
        assert same(whole, [checkpoint(folder, name) for name in ("best", "last")])
        assert not list(folder.glob("*.tmp"))


def test_sigkill_between_epochs(options, tmp_path, monkeypatch, capsys):
    """A real kill, sent when the first line of the table appears."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")  # as many threads as this process has: the same bits
    process = subprocess.Popen([sys.executable, program.__file__, *options], stdout=subprocess.PIPE, text=True)
    for line in process.stdout:
        if line.split()[:2] == ["1", "1"]:
            process.kill()
            break
    process.wait()
    assert not (tmp_path / "runs" / "t_report.txt").exists()
    assert program.main(options) == 0 and "new run" not in capsys.readouterr().out
    killed = [checkpoint(tmp_path / "runs", name) for name in ("best", "last")]
    assert program.main(options + ["--fresh"]) == 0
    assert same(killed, [checkpoint(tmp_path / "runs", name) for name in ("best", "last")])


@pytest.mark.parametrize("number, code", [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_signals_end_with_one_line(number, code, options):
    process = subprocess.Popen([sys.executable, program.__file__, *options, "--epochs-stage1", "9999"], text=True,
                               stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    for line in process.stdout:
        if line.split()[:2] == ["1", "2"]:
            process.send_signal(number)
            break
    error = process.communicate()[1]
    assert process.returncode == code
    assert error.startswith("stopped: ") and error.count("\n") == 1


def test_same_bits_with_and_without_workers(options, tmp_path, capsys):
    program.main(options)
    program.main(options + ["--num-workers", "2", "--out-dir", str(tmp_path / "workers")])
    for name in ("best", "last"):
        assert same(checkpoint(tmp_path / "runs", name), checkpoint(tmp_path / "workers", name))


def test_finished_run_makes_its_reports_again(options, tmp_path, monkeypatch, capsys):
    options = options + ONE_EPOCH
    program.main(options)
    (tmp_path / "runs" / "t_report.txt").unlink()
    monkeypatch.setattr(program, "train_one_epoch", None)
    assert program.main(options) == 0
    assert (tmp_path / "runs" / "t_report.txt").exists() and not (tmp_path / "runs" / "t_old1").exists()


def other_transforms(_monkeypatch, _images):
    size = program.make_transforms((32, 32))
    _monkeypatch.setattr(program, "make_transforms", lambda _size: size._replace(augment=size.augment.transforms[0]))


def test_an_edited_transform_starts_a_new_run_even_if_its_repr_is_the_same(options, tmp_path, monkeypatch, capsys):
    size = program.make_transforms((32, 32))
    options = options + ONE_EPOCH
    monkeypatch.setattr(program, "make_transforms", lambda _size: size._replace(augment=v2.RandomApply([size.augment], 0)))
    program.main(options)
    monkeypatch.setattr(program, "make_transforms", lambda _size: size._replace(augment=v2.RandomApply([size.augment], 1)))
    assert program.main(options) == 0
    assert "changed: transforms" in capsys.readouterr().out


def other_image(_monkeypatch, images):
    (images / "train" / "red" / "0.png").write_bytes((images / "train" / "blue" / "0.png").read_bytes())


@pytest.mark.parametrize("change, extra, reason", [
    (None, ["--lr-stage2", "2e-4"], "lr_stage2"), (None, ["--seed", "1"], "seed"), (None, ["--fresh"], "--fresh"),
    (other_transforms, [], "transforms"), (other_image, [], "images")])
def test_a_changed_run_moves_the_old_files_aside(change, extra, reason, options, own_images, tmp_path, monkeypatch,
                                                 capsys):
    options = options + ONE_EPOCH
    program.main(options)
    before = {path.name: path.read_bytes() for path in (tmp_path / "runs").iterdir()}
    capsys.readouterr()
    if change:
        change(monkeypatch, own_images)
    assert program.main(options + extra) == 0
    assert reason in capsys.readouterr().out
    aside = tmp_path / "runs" / "t_old1"
    assert {path.name: path.read_bytes() for path in aside.iterdir()} == before


def test_a_run_with_a_constant_that_is_no_more_is_moved_aside_and_named(options, tmp_path, capsys):
    options = options + ONE_EPOCH
    program.main(options)
    for path in (tmp_path / "runs" / "t_best.pth", tmp_path / "runs" / "t_last.pth"):
        state = torch.load(path, weights_only=True)
        torch.save(state | {"config": state["config"] | {"schedule": "cosine"}}, path)
    capsys.readouterr()
    assert program.main(options) == 0
    assert "changed: schedule" in capsys.readouterr().out and (tmp_path / "runs" / "t_old1").exists()


@pytest.mark.parametrize("damage", [lambda runs: (runs / "t_last.pth").write_bytes(b"PK\x03\x04 broken"),
                                    lambda runs: (runs / "t_best.pth").unlink(),
                                    lambda runs: torch.save({"model": {}}, runs / "t_last.pth")])
def test_damaged_checkpoints_are_moved_aside_and_named(damage, options, tmp_path, capsys):
    options = options + ONE_EPOCH
    program.main(options)
    runs = tmp_path / "runs"
    damage(runs)
    left = {name for name in ("t_best.pth", "t_last.pth") if (runs / name).exists()}
    capsys.readouterr()
    assert program.main(options) == 0
    assert "new run" in capsys.readouterr().out
    assert left <= {path.name for path in (runs / "t_old1").iterdir()}
    assert len(checkpoint(runs, "last")["history"]) == 1


def test_full_disk_leaves_the_checkpoint_before(options, tmp_path, monkeypatch, capsys):
    program.main(options + ["--epochs-stage2", "0"])
    before = (tmp_path / "runs" / "t_last.pth").read_bytes()

    def full(_file):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(program.os, "fsync", full)
    with pytest.raises(program.RunError, match="No space left"):
        program.save_checkpoint(tmp_path / "runs" / "t_last.pth", {"history": []})
    assert (tmp_path / "runs" / "t_last.pth").read_bytes() == before
    assert not list((tmp_path / "runs").glob("*.tmp"))
    capsys.readouterr()
    assert program.main(options + ["--fresh"]) == 1
    assert "No space left" in capsys.readouterr().err


def test_stale_unfinished_files_are_removed(options, tmp_path, capsys):
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "t_last.pth.tmp").write_bytes(b"half")
    assert program.main(options) == 0 and not list((tmp_path / "runs").glob("*.tmp"))


def test_a_loss_that_is_not_finite_stops_the_run(options, tmp_path, monkeypatch, capsys):
    real, calls = program.F.cross_entropy, []

    def breaks(*args, **kwargs):
        calls.append(1)
        return real(*args, **kwargs) * (float("nan") if len(calls) > 60 else 1)

    monkeypatch.setattr(program.F, "cross_entropy", breaks)
    assert program.main(options + ["--epochs-stage1", "99"]) == 1
    error = capsys.readouterr().err
    assert "nan" in error and "epoch" in error and "batch" in error and error.count("\n") == 1
    assert checkpoint(tmp_path / "runs", "last")["history"]


def test_out_of_memory_names_the_constant(options, monkeypatch, capsys):
    def full(*_args):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(program, "train_one_epoch", full)
    assert program.main(options) == 1
    assert "BATCH_SIZE" in capsys.readouterr().err


def test_an_error_in_a_worker_is_not_called_out_of_memory(options, monkeypatch, capsys):
    def broken(*_args):
        raise RuntimeError("views of unlike sizes")

    monkeypatch.setattr(program.AugmentedViews, "__getitem__", broken)
    with pytest.raises(RuntimeError, match="views of unlike sizes"):
        program.main(options + ["--num-workers", "1"])


@pytest.mark.parametrize("file, content, named", [
    ("setid.mat", b"changed", "setid.mat"), ("jpg/image_00003.jpg", None, "image_00003.jpg"),
    ("jpg/image_00020.jpg", b"\xff\xd8\xff\xe0 truncated", "image_00020.jpg")])
def test_damaged_flowers_are_named_or_repaired(file, content, named, flowers, options, no_network, monkeypatch, capsys):
    path = flowers / "flowers-102" / file
    whole = path.read_bytes()
    path.write_bytes(content) if content else path.unlink()
    assert program.main(options + ["--data-dir", str(flowers)]) == 2
    error = capsys.readouterr().err
    assert named in error and error.count("\n") == 1
    if "jpg" in file:
        monkeypatch.setattr(program, "download_and_extract_archive", lambda *_args, **_kw: path.write_bytes(whole))
        assert program.main(options + ["--data-dir", str(flowers)]) == 0
