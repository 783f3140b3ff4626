"""--predict names the flowers in files of all kinds, by the model as the report measured it."""
import os
import shutil

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import call, draw, is_one_line, settings
from filelock import FileLock
from PIL import Image
from torchvision.models import efficientnet_b3

import efficientnet_b3 as program

pytestmark = pytest.mark.usefixtures("undrawn")


@pytest.fixture
def runs(finished):
    return program.run_file(settings(finished), "best.pth").parent


@pytest.fixture
def images(tmp_path):
    """Three images in a folder, two of them in a folder within."""
    for number, name in enumerate(("a.png", "within/b.jpg", "within/c.gif")):
        draw(tmp_path / "images" / name, (220, 40, 50), number)
    return tmp_path / "images"


def answers(text):
    """{file: its likeliest class} of what --predict printed."""
    lines = text.splitlines()
    heads = [number for number, line in enumerate(lines) if not line.startswith(" ")]
    return {lines[number]: lines[number + 1].split("%")[1].strip() for number in heads}


def test_predictions_are_those_of_the_report(finished, runs, capsys):
    folder = program.Path(settings(finished).data_dir)
    assert call([*finished, "--predict", folder / "val", folder / "test"]) == 0
    rows = pd.read_csv(runs / "t_predictions.csv")
    printed = capsys.readouterr()
    assert answers(printed.out) == {str(folder / row.file): row.predicted for row in rows.itertuples()}
    assert printed.out.count("%") == 15 * 3 and printed.err == ""
    first = printed.out[printed.out.index(str(folder / rows.file[0])):].splitlines()[1]
    assert float(first.split("%")[0]) == pytest.approx(100 * rows.probability[0], abs=0.2)


def test_a_broken_file_is_named_and_the_rest_done(trained, images, capsys):
    (images / "within" / "broken.jpg").write_bytes(b"not an image")
    assert call([*trained, "--predict", images, images / "a.png"]) == 1
    printed = capsys.readouterr()
    assert "broken.jpg" in printed.err and printed.err.count("\n") == 1
    assert list(answers(printed.out)) == [str(images / name) for name in ("a.png", "within/b.jpg", "within/c.gif")]
    assert printed.out.count("%") == 4 * 3


def test_size_and_crop_are_those_of_the_training(finished, images, capsys):
    told = []
    for extra in ([], ["--img-size", "64", "96", "--crop", "0.3", "--views", "7", "--batch-size", "1"]):
        assert call([*finished, *extra, "--predict", images]) == 0
        told.append(capsys.readouterr().out)
    assert told[0] == told[1]


def test_a_constant_that_somebody_has_added_is_that_of_the_training(trained, images, tmp_path, monkeypatch):
    """Whatever it is at the top of the file by now."""
    state, seen = torch.load(tmp_path / "runs" / "t_best.pth", weights_only=True), []
    torch.save(state | {"config": state["config"] | {"grey": 1}}, images / "grey.pth")
    make_transforms = program.make_transforms
    monkeypatch.setattr(program, "make_transforms", lambda cfg: seen.append(cfg.grey) or make_transforms(cfg))
    monkeypatch.setitem(program.CONSTANTS, "grey", 0)
    assert call([*trained, "--predict", images, "--checkpoint", images / "grey.pth"]) == 0 and set(seen) == {1}


def test_a_bug_in_an_edited_model_is_no_fault_of_the_checkpoint(trained, images, monkeypatch):
    def build_model(*_args):
        raise RuntimeError("mine")

    monkeypatch.setattr(program, "build_model", build_model)
    with pytest.raises(RuntimeError, match="mine"):
        call([*trained, "--predict", images])


@pytest.mark.parametrize("name", ["last", "frozen"])
def test_another_checkpoint_than_the_runs_best(name, finished, runs, images, tmp_path, capsys):
    """It says what that model says, as torchvision has it."""
    shutil.copy(runs / f"t_{name}.pth", tmp_path / "other.pth")
    options = ["--no-amp", "--num-workers", "0", "--device", "cpu", "--predict", images]
    assert call([*options, "--checkpoint", tmp_path / "other.pth"]) == 0
    printed, cfg = capsys.readouterr().out.splitlines(), settings(finished)
    model = efficientnet_b3(num_classes=3).eval()
    model.load_state_dict(torch.load(runs / f"t_{name}.pth", weights_only=True)["model"])
    image = torch.from_numpy(program.load_views(images / "a.png", 0, 0, cfg)).permute(0, 3, 1, 2)
    with torch.no_grad():
        likeliest, number = model(program.make_transforms(cfg).normalize(image)).softmax(1)[0].max(0)
    share, _, title = printed[printed.index(str(images / "a.png")) + 1].partition("%")
    assert title.strip() == ["blue", "red", "yellow"][number]
    assert float(share) == pytest.approx(100 * likeliest.item(), abs=0.2)
    assert len(answers("\n".join(printed))) == 3


def test_workers_say_the_same(finished, images, capsys):
    for number in range(12):
        draw(images / f"{number}.png", (40, 60, 220), number)
    told = []
    for workers in (0, 2):
        assert call([*finished, "--num-workers", workers, "--predict", images]) == 0
        told.append(capsys.readouterr().out)
    assert told[0] == told[1] and len(answers(told[0])) == 15


@pytest.mark.skipif(os.name != "posix", reason="there is no /dev/null")
def test_what_is_no_file_is_named_in_its_turn(trained, capsys):
    assert call([*trained, "--predict", "/dev/null"]) == 1
    assert "cannot read /dev/null" in capsys.readouterr().err


def test_hidden_files_are_not_asked_about(trained, images, capsys):
    for name in ("._a.png", ".hidden/0.png"):
        draw(images / "0.png", (1, 2, 3), 0)
        (images / name).parent.mkdir(exist_ok=True)
        (images / "0.png").rename(images / name)
    assert call([*trained, "--predict", images]) == 0
    printed = capsys.readouterr()
    assert len(answers(printed.out)) == 3 and printed.err == ""


def test_what_is_passed_over_in_a_folder_is_counted_aloud(trained, images, capsys):
    for name in ("notes.txt", "more.txt", "film.mp4"):
        (images / name).write_text("no image")
    assert call([*trained, "--predict", images]) == 0
    printed = capsys.readouterr()
    assert len(answers(printed.out)) == 3
    assert printed.err.count("\n") == 1 and "film.mp4" in printed.err and "more.txt" in printed.err


def test_a_file_that_is_named_is_read_whatever_its_ending(trained, images, capsys):
    (images / "a.png").rename(images / "photo")
    assert call([*trained, "--predict", images / "photo"]) == 0
    assert list(answers(capsys.readouterr().out)) == [str(images / "photo")]


def test_names_that_no_encoding_has(trained, images, capsys):
    folder = os.fsencode(images)
    os.rename(images / "a.png", os.path.join(folder, b"\xff.png"))
    for name in (b"\xfe.png", b"line\nbreak.png"):
        with open(os.path.join(folder, name), "wb") as file:
            file.write(b"not an image")
    assert call([*trained, "--predict", images]) == 1
    printed = capsys.readouterr()
    printed.out.encode()
    assert len(answers(printed.out)) == 3 and printed.err.count("\n") == 2


@pytest.mark.parametrize("content", [np.full((9, 9), 30000, np.uint16), np.zeros((1, 1), np.uint8),
                                     np.zeros((500, 1, 4), np.uint8)])
def test_odd_images(content, trained, tmp_path, capsys):
    Image.fromarray(content).save(tmp_path / "odd.tif")
    assert call([*trained, "--predict", tmp_path / "odd.tif"]) == 0
    assert len(answers(capsys.readouterr().out)) == 1


def test_pixels_of_which_nothing_says_what_is_white_are_named(trained, tmp_path, capsys):
    Image.fromarray(np.ones((9, 9), np.float32)).save(tmp_path / "odd.tif")
    assert call([*trained, "--predict", tmp_path / "odd.tif"]) == 1
    printed = capsys.readouterr()
    assert "odd.tif" in printed.err and "32 bit" in printed.err and not answers(printed.out)


@pytest.mark.parametrize("given", ["no_such_image.jpg", "no_such_folder/"])
def test_what_does_not_exist_is_one_line(given, trained, images, monkeypatch, capsys):
    monkeypatch.chdir(images)
    assert call([*trained, "--predict", "a.png", given]) == 2
    assert is_one_line(capsys.readouterr().err, given.rstrip("/"))


def test_a_folder_without_images_is_said_to_hold_none(trained, images, capsys):
    (images / "empty").mkdir()
    (images / "empty" / "notes.txt").write_text("")
    call([*trained, "--predict", images / "empty"])
    printed = capsys.readouterr()
    assert "notes.txt" in printed.err and not answers(printed.out)


@pytest.mark.parametrize("content", [None, b"", b"PK\x03\x04 broken", {"weight": torch.zeros(3)}, [],
                                     {"model": {}, "config": {"class_names": ["a", "b"]}, "history": []}], ids=str)
def test_a_checkpoint_that_is_none_is_one_line(content, trained, images, capsys):
    path = images / "own.pth"
    if content is not None:
        path.write_bytes(content) if isinstance(content, bytes) else torch.save(content, path)
    assert call([*trained, "--predict", images / "a.png", "--checkpoint", path]) == 2
    assert is_one_line(capsys.readouterr().err, "own.pth")


def test_what_a_checkpoint_of_an_earlier_version_lacks_is_said(trained, images, tmp_path, capsys):
    """One had the names of its classes among its constants, another had no crops."""
    state = torch.load(tmp_path / "runs" / "t_best.pth", weights_only=True)
    with_names = {**state["config"], "class_names": state["class_names"]}
    without_crop = {key: value for key, value in state["config"].items() if key != "crop"}
    for old, lacking in (({**state, "config": with_names}, "class_names"), ({**state, "config": without_crop}, "crop"),
                         ({**state, "config": None}, "crop")):
        if lacking == "class_names":
            del old["class_names"]
        torch.save(old, images / "old.pth")
        assert call([*trained, "--predict", images / "a.png", "--checkpoint", images / "old.pth"]) == 2
        assert is_one_line(capsys.readouterr().err, "old.pth", lacking, "lacks")


def test_a_checkpoint_of_other_code_is_said_to_be_one(trained, images, tmp_path, monkeypatch, capsys):
    """Whoever edits how images are seen is told; whoever edits the training need not be."""
    state = torch.load(tmp_path / "runs" / "t_best.pth", weights_only=True)
    for name, told in (("make_transforms", True), ("load_image", True), ("average_pool", True),
                       ("train_one_epoch", False)):
        assert state["config"][f"code of {name}"]
        config = state["config"] | {f"code of {name}": "another"}
        torch.save(state | {"config": config}, images / "other.pth")
        assert call([*trained, "--predict", images, "--checkpoint", images / "other.pth"]) == 0
        printed = capsys.readouterr()
        assert (f"code of {name}" in printed.err) is told and len(answers(printed.out)) == 3


def test_a_checkpoint_of_another_model_is_one_line(trained, images, tmp_path, capsys):
    """Somebody has trained an edited head, and has put the program back."""
    state = torch.load(tmp_path / "runs" / "t_best.pth", weights_only=True)
    state["model"]["classifier.2.weight"] = state["model"].pop("classifier.1.weight")
    torch.save(state, images / "edited.pth")
    assert call([*trained, "--predict", images / "a.png", "--checkpoint", images / "edited.pth"]) == 2
    assert is_one_line(capsys.readouterr().err, "edited.pth does not fit", "classifier")


def test_a_folder_without_any_file_is_one_line(trained, images, capsys):
    (images / "empty" / ".hidden").mkdir(parents=True)
    assert call([*trained, "--predict", images / "empty"]) == 2
    assert is_one_line(capsys.readouterr().err, "no images", str(images / "empty"))


def test_a_prediction_that_is_stopped_promises_no_epochs(trained, images, monkeypatch, capsys):
    def stop(*_args, **_kw):
        raise KeyboardInterrupt

    monkeypatch.setattr(program, "load_checkpoint", stop)
    assert call([*trained, "--predict", images]) == 130
    error = capsys.readouterr().err
    assert "stopped" in error and error.count("\n") == 1 and "goes on" not in error and "saved" not in error


def test_predicting_goes_on_beside_a_run(finished, runs, images, capsys):
    with FileLock(runs / ".t.lock"):
        assert call([*finished, "--predict", images]) == 0
