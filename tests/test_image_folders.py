"""What people have in their folders works, or is answered by one line that says what is wrong; nothing is passed over
in silence, and nothing is downloaded into a folder that holds something else."""
import hashlib
import json
import os
import shutil
import socket
from functools import partial
from pathlib import Path

import pandas as pd
import pytest
from conftest import (COLOURS, ONE_EPOCH, call, draw, draw_classes, draw_splits, figures_of, history_of,
                      is_one_line, real, settings)
from filelock import FileLock, Timeout

import efficientnet_b3 as program

pytestmark = pytest.mark.usefixtures("undrawn", "small_network")
NAMES = list(COLOURS)


@pytest.fixture
def find(options, downloads, tmp_path):
    """Finds the images of a folder."""
    (tmp_path / "runs").mkdir(exist_ok=True)

    def find_in(folder, *extra):
        data = program.find_images(settings([*options, "--data-dir", folder, *extra]))
        assert not downloads
        return data

    return find_in


def counts(data):
    return {name: len(table) for name, table in data.tables.items()}


def classes(data, split="train"):
    """How many images of each class a split has."""
    table = data.tables[split]
    return {name: int((table.label == label).sum()) for label, name in enumerate(data.folders)}


def refuse(options, capsys, *phrases):
    """The command line is answered by one line and exit code 2."""
    capsys.readouterr()
    assert call(options) == 2
    error = capsys.readouterr().err
    assert is_one_line(error, *map(str, phrases)), error


# Layouts


def test_train_val_and_test(find, own_images, capsys):
    data = find(own_images, "--eval-splits", "val", "test")
    assert data.class_names == NAMES and counts(data) == {"train": 18, "val": 9, "test": 6}
    for split, table in data.tables.items():
        assert [NAMES[label] for label in table.label] == [path.parent.name for path in table.path]
        assert table.sha256.tolist() == [hashlib.sha256(path.read_bytes()).hexdigest() for path in table.path]
    printed = capsys.readouterr().out
    assert "3 classes" in printed and "18 train, 9 val, 6 test" in printed
    assert counts(find(own_images)) == {"train": 18, "val": 9}


@pytest.mark.parametrize("name", ["valid", "validation", "Val", "VALID"])
def test_other_names_of_val(name, find, own_images):
    (own_images / "val").rename(own_images / name)
    assert counts(find(own_images)) == {"train": 18, "val": 9}


def test_without_test_the_report_does_without_it(options, own_images, tmp_path):
    (own_images / "test").rename(tmp_path / "test")
    assert call([*options, *ONE_EPOCH, "--eval-splits", "val", "test"]) == 0
    assert figures_of(tmp_path / "runs")["images"] == 9
    with pytest.raises(KeyError):
        figures_of(tmp_path / "runs", "test")


def test_a_report_on_images_that_are_not_there_is_refused_before_the_training(options, own_images, tmp_path, capsys):
    (own_images / "test").rename(tmp_path / "test")
    refuse([*options, "--eval-splits", "test"], capsys, "EVAL_SPLITS")


def test_class_folders_alone_lend_a_part_of_each_class_for_validation(find, tmp_path, capsys):
    folder = draw_classes(tmp_path / "alone", 10)
    for number in range(10, 20):
        draw(folder / "red" / f"{number}.png", (220, 40, 50), number)
    data = find(folder)
    assert classes(data) == {"blue": 8, "red": 16, "yellow": 8}
    assert classes(data, "val") == {"blue": 2, "red": 4, "yellow": 2}
    assert not set(data.tables["train"].path) & set(data.tables["val"].path)
    printed = capsys.readouterr().out
    assert "20%" in printed and "SEED" in printed
    drawn = [set(find(folder, "--seed", seed).tables["val"].path) for seed in ("0", "1")]
    assert set(data.tables["val"].path) == drawn[0] != drawn[1]
    assert classes(find(folder, "--val-fraction", "0.5"), "val") == {"blue": 5, "red": 10, "yellow": 5}
    assert classes(find(folder, "--val-fraction", "1")) == {"blue": 1, "red": 1, "yellow": 1}


def test_each_class_that_can_lends_one_image_and_keeps_one(find, tmp_path):
    folder = draw_classes(draw_classes(tmp_path / "few", 2, ["blue", "red"]), 1, ["yellow"])
    data = find(folder)
    assert classes(data) == {"blue": 1, "red": 1, "yellow": 1}
    assert classes(data, "val") == {"blue": 1, "red": 1, "yellow": 0}


def test_the_folder_train_itself_is_a_folder_of_classes(find, own_images):
    assert counts(find(own_images / "train")) == {"train": 15, "val": 3}


def test_images_in_folders_within_a_class(find, own_images):
    (own_images / "train" / "red" / "more").mkdir()
    (own_images / "train" / "red" / "0.png").rename(own_images / "train" / "red" / "more" / "0.png")
    assert counts(find(own_images)) == {"train": 18, "val": 9}


def test_the_layout_of_a_well_known_course(options, tmp_path, monkeypatch):
    """train/1 ... train/102, valid/, and the names in a file beside them, here with a byte-order mark."""
    folder = tmp_path / "course" / "flowers"
    for split, count in (("train", 3), ("valid", 2), ("test", 1)):
        draw_classes(folder / split, count, ["1", "10", "102"])
    names = {"102": "blackberry lily", "1": "Größte Primel", "10": "globe thistle", "77": "passion flower"}
    (folder / "cat_to_name.json").write_text(json.dumps(names, ensure_ascii=False), "utf-8-sig")
    options = [*options, *ONE_EPOCH, "--data-dir", folder]
    assert call(options) == 0
    report = (tmp_path / "runs" / "t_report.txt").read_text("utf-8")
    assert all(name in report for name in ("Größte Primel", "globe thistle", "blackberry lily"))
    monkeypatch.chdir(folder)
    data = program.find_images(settings([*options, "--data-dir", "."]))
    assert data.class_names == ["Größte Primel", "globe thistle", "blackberry lily"]
    assert counts(data) == {"train": 9, "val": 6}


def test_names_are_no_part_of_a_run(trained, own_images, tmp_path, capsys):
    """Named after the training, classes are called so from then on; folders that are renamed are other classes."""
    (own_images / "cat_to_name.json").write_text(json.dumps({"red": "rose", "blue": "gentian"}))
    before = history_of(tmp_path / "runs")
    assert call(trained) == 0
    assert "new run" not in capsys.readouterr().out and history_of(tmp_path / "runs") == before
    assert "gentian" in (tmp_path / "runs" / "t_report.txt").read_text()
    assert call([*trained, "--predict", own_images / "val" / "red" / "0.png"]) == 0
    assert "rose" in capsys.readouterr().out
    for split in ("train", "val", "test"):
        (own_images / split / "red").rename(own_images / split / "rosa")
    assert call(trained) == 0
    assert "new run" in capsys.readouterr().out


@pytest.mark.parametrize("content", ["{", "[1, 2]", "\xff"])
def test_a_broken_file_of_names_is_named(content, options, own_images, capsys):
    (own_images / "cat_to_name.json").write_bytes(content.encode("latin-1"))
    refuse(options, capsys, "cat_to_name.json")


def test_a_home_folder(find, own_images, tmp_path, monkeypatch, options):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert counts(find("~/own")) == {"train": 18, "val": 9}
    assert call([*options, *ONE_EPOCH, "--data-dir", "~/own", "--out-dir", "~/elsewhere"]) == 0
    assert (tmp_path / "elsewhere" / "t_best.pth").exists()
    assert (tmp_path / "elsewhere" / "t_predictions.csv").read_text().splitlines()[1].startswith("val/blue/0.png,")


# Files


def test_hidden_files_are_no_images_and_no_classes(find, own_images):
    for name in ("._0.jpg", ".DS_Store", ".hidden.png"):
        for folder in ("", "train", "train/red", "val/blue"):
            (own_images / folder / name).write_bytes(b"litter")
    for name in (".ipynb_checkpoints", ".git"):
        for folder in ("", "train", "val", "train/red"):
            draw(own_images / folder / name / "0.png", (1, 2, 3), 0)
    data = find(own_images)
    assert data.class_names == NAMES and counts(data) == {"train": 18, "val": 9}


def test_every_type_that_pillow_reads_is_an_image(find, own_images):
    for number, ending in enumerate(("jfif", "JPG", "webp", "tiff", "gif", "ppm")):
        path = own_images / "train" / "red" / f"{number}.png"
        draw(path.with_suffix(".jpg" if ending == "jfif" else f".{ending}"), (220, 40, 50), number)
        path.unlink()
    (own_images / "train" / "red" / "0.jpg").rename(own_images / "train" / "red" / "0.jfif")
    assert counts(find(own_images)) == {"train": 18, "val": 9}


OTHERS = ["notes.txt", "loose.png", "more/1.png", "train/0.png", "train/red/README",
          "train/gone", "train/red/film.mp4", "val/red/photo.heic"]


@pytest.mark.parametrize("names", [*([name] for name in OTHERS), OTHERS], ids=[*OTHERS, "all"])
def test_what_is_passed_over_is_named_aloud(names, find, own_images, capsys):
    """Loose images beside class folders and splits, a class that is a broken link, ..."""
    for path in (own_images / name for name in names):
        path.parent.mkdir(exist_ok=True)
        if path.name == "gone":
            path.symlink_to(own_images / "nowhere")
        elif path.suffix == ".png":
            draw(path, (1, 2, 3), 0)
        else:
            path.write_text("no image")
    assert counts(find(own_images)) == {"train": 18, "val": 9}
    line, = (line for line in capsys.readouterr().out.splitlines() if "passed over" in line)
    assert f" {len(names)} passed over" in line and "not readable here" in line
    assert sum(str(own_images / name) in line for name in names) == min(3, len(names))


def test_loose_images_beside_class_folders_without_splits(find, tmp_path, capsys):
    draw(draw_classes(tmp_path / "alone", 5) / "loose.png", (1, 2, 3), 0)
    (tmp_path / "alone" / "green").symlink_to(tmp_path / "gone")
    assert counts(find(tmp_path / "alone")) == {"train": 12, "val": 3}
    printed = capsys.readouterr().out
    assert all(str(tmp_path / "alone" / name) in printed for name in ("loose.png", "green"))


def test_images_that_pillow_does_not_read_are_not_called_no_images(options, own_images, capsys):
    for path in own_images.rglob("*.png"):
        path.rename(path.with_suffix(".heic"))
    assert call(options) == 2
    printed = capsys.readouterr()
    assert "not readable here" in printed.out + printed.err and "0.heic" in printed.out + printed.err
    assert is_one_line(printed.err) and "no images" not in printed.err


# What runs have made, and links


def test_what_runs_make_is_never_data(options, own_images, tmp_path, monkeypatch, capsys):
    """Runs within the folder of their images: one, another that moves its files aside, one with another OUT_DIR."""
    folder = own_images / "train"
    monkeypatch.chdir(folder)
    options = [*options, *ONE_EPOCH, "--data-dir", ".", "--out-dir", "runs"]
    for extra in ([], ["--seed", "1"], ["--out-dir", "others"]):
        assert call([*options, *extra]) == 0
        printed = capsys.readouterr().out
        assert "3 classes; images: 15 train, 3 val" in printed and "passed over" not in printed


def test_runs_are_no_data_without_their_activations_either(options, find, own_images, monkeypatch):
    folder = own_images / "train"
    monkeypatch.chdir(folder)
    assert call([*options, *ONE_EPOCH, "--data-dir", ".", "--out-dir", "runs"]) == 0
    shutil.rmtree(folder / "runs" / "activations")
    assert find(folder).folders == NAMES


def test_a_class_called_activations_is_a_class(find, own_images):
    for split in ("train", "val", "test"):
        (own_images / split / "red").rename(own_images / split / "activations")
    assert find(own_images).folders == ["activations", "blue", "yellow"]


@pytest.mark.parametrize("name", ["growth_history.csv", ".sync.lock", "x.lock"])
def test_a_class_that_holds_a_file_of_another_program_is_none_of_a_run(name, find, own_images):
    (own_images / "train" / "red" / name).touch()
    assert classes(find(own_images)) == {"blue": 6, "red": 6, "yellow": 6}


@pytest.mark.parametrize("target", [".", "..", "../.."])
def test_links_upwards_are_not_entered(target, find, own_images):
    for name in (*NAMES, ""):
        (own_images / "train" / name / "again").symlink_to(target)
    assert counts(find(own_images)) == {"train": 18, "val": 9}
    assert classes(find(own_images / "train")) == dict.fromkeys(NAMES, 5)


def test_links_that_lead_in_a_circle_have_an_end(find, tmp_path):
    folder = draw_classes(tmp_path / "alone", 5, ["a", "b"])
    for name, other in ("ab", "ba"):
        (folder / name / "more").symlink_to(folder / other)
    assert classes(find(folder, "--train-splits", "train", "val")) == {"a": 10, "b": 10}


def test_the_folder_above_where_one_stands(find, own_images, monkeypatch):
    """The class that one stands in lies within it like any other."""
    monkeypatch.chdir(own_images / "train" / "red")
    assert classes(find(Path(".."))) == dict.fromkeys(NAMES, 5)
    assert counts(find(Path("../.."))) == {"train": 18, "val": 9}


def test_a_link_to_itself_is_a_broken_link(find, own_images, capsys):
    for name in ("train/loop", "val/red/loop.png"):
        (own_images / name).symlink_to((own_images / name).name)
    assert counts(find(own_images)) == {"train": 18, "val": 9}
    assert "2 passed over" in capsys.readouterr().out


def test_links_to_other_disks_are_followed(find, own_images, tmp_path):
    (own_images / "train").rename(tmp_path / "disk")
    (own_images / "train").symlink_to(tmp_path / "disk")
    (own_images / "val" / "red").rename(tmp_path / "red")
    (own_images / "val" / "red").symlink_to(tmp_path / "red")
    (own_images / "val" / "blue" / "0.png").rename(tmp_path / "0.png")
    (own_images / "val" / "blue" / "0.png").symlink_to(tmp_path / "0.png")
    assert counts(find(own_images)) == {"train": 18, "val": 9}
    (tmp_path / "link").symlink_to(own_images)
    assert counts(find(tmp_path / "link")) == {"train": 18, "val": 9}


@pytest.mark.parametrize("names", [("bus", "car", "train"), ("control", "test"), ("val", "wheat")])
def test_classes_that_are_called_like_splits(names, find, tmp_path):
    data = find(draw_classes(tmp_path / "things", 5, names))
    assert data.folders == sorted(names) and classes(data) == dict.fromkeys(names, 4)


def test_such_classes_within_splits(find, tmp_path):
    names = ["bus", "test", "train"]
    data = find(draw_splits(tmp_path / "things", names))
    assert data.folders == names and classes(data) == dict.fromkeys(names, 6)


# The final model


def test_all_labelled_images_train_the_final_model(find, own_images, tmp_path, capsys):
    final = ["--train-splits", "train", "val"]
    data = find(own_images, *final, "--eval-splits", "val", "test")
    assert counts(data) == {"train": 27, "test": 6} and classes(data) == dict.fromkeys(NAMES, 9)
    assert counts(find(own_images, *final, "--eval-splits", "test")) == {"train": 27, "test": 6}
    assert counts(find(own_images / "train", *final)) == {"train": 18}  # no part is drawn
    assert "SEED" not in capsys.readouterr().out
    (own_images / "test").rename(tmp_path / "test")
    assert counts(find(own_images, *final, "--eval-splits", "test")) == {"train": 27}


def test_all_labelled_flowers_train_the_final_model(find, flowers):
    data = find(flowers, "--train-splits", "train", "val", "--eval-splits", "test")
    assert counts(data) == {"train": 24, "test": 6}
    train = data.tables["train"]
    assert [path.name for path in train.path] == [f"image_{n:05d}.jpg" for n in range(1, 25)]
    assert all(label == int(path.stem[-5:]) % 3 for label, path in zip(train.label, train.path))


# Images that cannot be read


def break_images(own_images):
    broken = [own_images / name for name in ("train/red/0.png", "train/blue/3.png", "val/red/1.png")]
    for path, content in zip(broken, (b"no image", b"", broken[2].read_bytes()[:300])):
        path.write_bytes(content)
    return broken


def test_all_unreadable_images_are_named_in_a_file_and_counted(options, own_images, tmp_path, capsys):
    broken = break_images(own_images)
    refuse(options, capsys, "3 of 27", "t_unreadable.txt", "--skip-unreadable")
    lines = (tmp_path / "runs" / "t_unreadable.txt").read_text().splitlines()
    assert len(lines) == 3 and all(any(line.startswith(f"{path} (") for line in lines) for path in broken)
    assert not list((tmp_path / "runs").glob("*.p*"))


def test_unreadable_test_images_are_named_with_the_others_before_the_training(options, own_images, tmp_path, capsys):
    both = [*options, *ONE_EPOCH, "--eval-splits", "val", "test"]
    broken = [own_images / split / "red" / "0.png" for split in ("train", "test")]
    whole = [path.read_bytes() for path in broken]
    for path in broken:
        path.write_bytes(b"no image")
    refuse(both, capsys, "2 of 33", "t_unreadable.txt")
    lines = (tmp_path / "runs" / "t_unreadable.txt").read_text().splitlines()
    assert sorted(line.split(" (")[0] for line in lines) == sorted(map(str, broken))
    for path, content in zip(broken, whole):
        path.write_bytes(content)
    assert call(both) == 0 and not (tmp_path / "runs" / "t_unreadable.txt").exists()


def test_two_runs_that_start_at_once_look_at_the_images_one_after_the_other(options, tmp_path, monkeypatch, capsys):
    """They would download and draw into the same files, and note what they have read in one."""
    asked = []

    def alone(name, work, *args):
        with pytest.raises(Timeout):
            FileLock(tmp_path / "runs" / ".images", timeout=0).acquire()
        asked.append(name)
        return work(*args)

    for name in ("draw_demo_images", "find_images", "load_pretrained", "check_images"):
        work = getattr(program, name) if name != "draw_demo_images" else lambda folder: None
        monkeypatch.setattr(program, name, partial(alone, name, work))
    assert call([*options, *ONE_EPOCH, "--eval-splits", "val", "test", "--demo"]) == 0
    assert asked == ["draw_demo_images", "load_pretrained", "find_images", "check_images"]


def test_a_run_may_have_any_name(options, monkeypatch):
    """Such as that of a lock which the runs of a folder share: it would wait for itself."""
    monkeypatch.setattr(program, "wait_for", lambda lock: lock.acquire(timeout=0))
    assert call([*options, *ONE_EPOCH, "--run-name", "images"]) == 0


def test_a_run_can_go_on_without_unreadable_images(options, own_images, tmp_path, capsys):
    break_images(own_images)
    assert call([*options, *ONE_EPOCH, "--skip-unreadable"]) == 0
    printed = capsys.readouterr().out
    assert "cannot read 3 of 27" in printed and "16 train, 8 val" in printed
    assert figures_of(tmp_path / "runs")["images"] == 8
    assert len((tmp_path / "runs" / "t_unreadable.txt").read_text().splitlines()) == 3


@pytest.mark.parametrize("gone", ["train/red", "val"])
def test_not_if_a_class_or_a_split_is_left_without_images(gone, options, own_images, capsys):
    for path in (own_images / gone).rglob("*.png"):
        path.write_bytes(b"no image")
    refuse([*options, "--skip-unreadable"], capsys, own_images, "readable")


def test_a_decompression_bomb_is_a_line(options, own_images, tmp_path, monkeypatch, capsys):
    draw(own_images / "train" / "red" / "bomb.png", (220, 40, 50), 0, (200, 200))
    monkeypatch.setattr(program.Image, "MAX_IMAGE_PIXELS", 10_000)
    refuse(options, capsys, "bomb.png")
    assert "bomb" in (tmp_path / "runs" / "t_unreadable.txt").read_text()


@pytest.fixture
def strings_as_with_pyarrow(monkeypatch):
    """Where it is installed, pandas' strings are its, which hold no letters that no encoding has."""
    make = pd.arrays.StringArray._from_sequence.__func__

    def encode_and_make(cls, scalars, *args, **kw):
        "".join(filter(lambda scalar: isinstance(scalar, str), scalars)).encode()
        return make(cls, scalars, *args, **kw)

    monkeypatch.setattr(pd.arrays.StringArray, "_from_sequence", classmethod(encode_and_make))


def test_names_that_no_encoding_has(options, own_images, strings_as_with_pyarrow, tmp_path, capsys):
    """Bytes that are no letters, a line break, quotes and commas in the names of files and a class."""
    for split in ("train", "val", "test"):
        os.rename(own_images / split / "blue", os.path.join(os.fsencode(own_images), split.encode(), b"blue\xff"))
    folder = os.fsencode(own_images / "val" / "red")
    for number, name in enumerate((b"\xff\xfe.png", b"line\nbreak.png", b'a "quoted", name; \xe2\x80\xae.png')):
        os.rename(os.path.join(folder, b"%d.png" % number), os.path.join(folder, name))
    assert call([*options, *ONE_EPOCH]) == 0
    assert figures_of(tmp_path / "runs")["images"] == 9
    (own_images / "val" / "red" / "line\nbreak.png").write_bytes(b"broken")
    os.rename(os.path.join(folder, b"\xff\xfe.png"), os.path.join(folder, b"\xff.png"))
    with open(os.path.join(folder, b"\xff.png"), "wb"):
        pass
    refuse(options, capsys, "2 of 27")
    assert len((tmp_path / "runs" / "t_unreadable.txt").read_text().splitlines()) == 2


# Folders that are none of these


def empty_class(own):
    for image in (own / "train" / "red").iterdir():
        image.unlink()


def keep_one_class(own):
    for split in ("train", "val", "test"):
        for name in ("red", "blue"):
            (own / split / name).rename(own.parent / f"{split} {name}")


@pytest.mark.parametrize("change, phrases", [
    (empty_class, ["red"]), (keep_one_class, ["two or more"]),
    (lambda own: (own / "train" / "red").rename(own / "train" / "rot"), ["rot"]),
    (lambda own: (own / "val" / "red").rename(own.parent / "red"), ["val/red"]),
    (lambda own: draw(own / "val" / "green" / "0.png", (0, 250, 0), 0), ["train/green"]),
    (lambda own: (own / "val" / "red").rename(own / "val" / "Red"), ["val", "red", "Red"]),
    (lambda own: (own / "train").rename(own / "trian"), ["trian", "train"]),
    (lambda own: [image.unlink() for image in own.glob("val/*/*.png")], ["val"]),
    (lambda own: shutil.copytree(own / "train", own / "training"), ["train, training"])])
def test_folders_that_do_not_fit_are_answered_by_one_line(change, phrases, options, own_images, downloads, capsys):
    change(own_images)
    refuse(options, capsys, own_images, *phrases)
    assert not downloads


def other_stuff(folder):
    (folder / "letters").mkdir()
    (folder / "letters" / "mother.txt").write_text("dear")
    (folder / "film.mp4").write_bytes(b"film")


def images_without_folders(folder):
    for number in range(3):
        draw(folder / f"{number}.png", (1, 2, 3), number)


def test_a_mistyped_folder_is_named_and_nothing_is_downloaded_there(options, tmp_path, downloads, capsys):
    refuse([*options, "--data-dir", tmp_path / "my_imags"], capsys, tmp_path / "my_imags", "--data-dir")
    assert not downloads and not (tmp_path / "my_imags").exists()


def test_a_default_folder_of_another_name_is_filled_too(tmp_path, downloads, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(program.CONSTANTS, "data_dir", "flowers")
    refuse(["--weights", "none"], capsys, "cannot download Flowers-102", "flowers")
    assert downloads


@pytest.mark.parametrize("content", [other_stuff, images_without_folders, lambda folder: (folder / "new").mkdir()])
def test_nothing_is_downloaded_into_a_folder_of_other_things(content, options, tmp_path, downloads, capsys):
    folder = tmp_path / "other"
    folder.mkdir()
    content(folder)
    before = sorted(folder.rglob("*"))
    refuse([*options, "--data-dir", folder], capsys, folder, "images")
    assert not downloads and sorted(folder.rglob("*")) == before


def test_a_file_instead_of_a_folder(options, own_images, downloads, capsys):
    refuse([*options, "--data-dir", own_images / "train" / "red" / "0.png"], capsys, "0.png", "no folder")
    assert not downloads


def test_a_folder_that_may_not_be_read(options, own_images, monkeypatch, capsys):
    real = program.Path.iterdir

    def denied(path):
        if path == own_images / "train" / "red":
            raise PermissionError(13, "Permission denied", str(path))
        return real(path)

    monkeypatch.setattr(program.Path, "iterdir", denied)
    refuse(options, capsys, own_images / "train" / "red", "Permission denied")


def test_images_that_are_too_few_to_draw_from(options, tmp_path, capsys):
    refuse([*options, "--data-dir", draw_classes(tmp_path / "few", 1)], capsys, "too few readable images")


# Flowers-102


def test_flowers102_layout(flowers, options, tmp_path, downloads, capsys):
    assert call([*options, *ONE_EPOCH, "--data-dir", flowers, "--eval-splits", "val", "test"]) == 0
    assert "15 train, 9 val, 6 test" in capsys.readouterr().out and not downloads
    assert figures_of(tmp_path / "runs", "test")["images"] == 6


@pytest.mark.parametrize("state", ["missing", "empty", "hidden", "begun"])
def test_the_default_folder_or_an_empty_one_is_where_flowers102_goes(
        state, options, tmp_path, downloads, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / ("data" if state == "missing" else "new")
    if state != "missing":
        folder.mkdir()
    if state == "hidden":
        (folder / ".DS_Store").write_bytes(b"")
    if state == "begun":
        (folder / "flowers-102").mkdir()
    refuse([*options, "--data-dir", folder.relative_to(tmp_path)], capsys, folder.name, "--demo", "no network")
    assert downloads and all(folder.name in str(tried) for tried in downloads)


def test_a_download_that_stalls_does_not_wait_for_ever(options, tmp_path, downloads, monkeypatch, capsys):
    timeouts = []

    def stalls(*_args, **_kw):
        timeouts.append(socket.getdefaulttimeout())
        raise TimeoutError("timed out")

    monkeypatch.setattr(program.Flowers102, "__init__", stalls)
    before = socket.getdefaulttimeout()
    try:
        (tmp_path / "new").mkdir()
        refuse([*options, "--data-dir", tmp_path / "new"], capsys, "timed out", "--demo")
    finally:
        socket.setdefaulttimeout(before)
    assert timeouts and all(0 < seconds <= 300 for seconds in timeouts)


@pytest.mark.parametrize("file, content", [
    ("setid.mat", b"changed"), ("jpg/image_00003.jpg", None), ("jpg/image_00020.jpg", b"\xff\xd8\xff\xe0 truncated")])
def test_damaged_flowers_are_named(file, content, flowers, options, downloads, capsys):
    path = flowers / "flowers-102" / file
    path.write_bytes(content) if content else path.unlink()
    refuse([*options, "--data-dir", flowers], capsys, path.name if "jpg" in file else "flowers-102")


@real
def test_the_real_flowers_are_found(find, monkeypatch):
    monkeypatch.setattr(program, "load_image", lambda path: None)  # to decode 2,040 takes seconds
    data = find(os.environ["FLOWERS_DIR"])
    assert counts(data) == {"train": 1020, "val": 1020} and len(data.class_names) == 102
    assert all((table.label.value_counts() == 10).all() for table in data.tables.values())
