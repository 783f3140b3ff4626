"""What people have in their folders works, or is answered by one line that says what is wrong; nothing is passed over
in silence, and nothing is downloaded into a folder that holds something else."""
import hashlib
import json
import os
import shutil
import socket

import pytest
from conftest import (COLOURS, ONE_EPOCH, call, draw, draw_classes, figures_of, is_one_line, real, settings)

import efficientnet_b3 as program

pytestmark = pytest.mark.usefixtures("no_figures", "small_network")
NAMES = list(COLOURS)


@pytest.fixture
def find(options, downloads, tmp_path):
    """Finds the images of a folder."""
    (tmp_path / "runs").mkdir()

    def find_in(folder, *extra):
        data = program.find_images(settings([*options, "--data-dir", folder, *extra]))
        assert not downloads
        return data

    return find_in


def counts(data):
    return {name: len(split.paths) for name, split in data.splits.items()}


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
    for split in data.splits.values():
        assert [NAMES[label] for label in split.labels] == [path.parent.name for path in split.paths]
        bytes_of_files = [hashlib.sha256(path.read_bytes()).hexdigest() for path in split.paths]
        assert split.digest == program.digest(bytes_of_files)
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
    assert data.splits["train"].labels.bincount().tolist() == [8, 16, 8]
    assert data.splits["val"].labels.bincount().tolist() == [2, 4, 2]
    assert not set(data.splits["train"].paths) & set(data.splits["val"].paths)
    printed = capsys.readouterr().out
    assert "20%" in printed and "SEED" in printed
    assert find(folder).splits["val"].paths == data.splits["val"].paths
    assert find(folder, "--seed", "1").splits["val"].paths != data.splits["val"].paths
    assert find(folder, "--val-fraction", "0.5").splits["val"].labels.bincount().tolist() == [5, 10, 5]


def test_the_folder_train_itself_is_a_folder_of_classes(find, own_images):
    assert counts(find(own_images / "train")) == {"train": 15, "val": 3}


def test_images_in_folders_within_a_class(find, own_images):
    (own_images / "train" / "red" / "more").mkdir()
    (own_images / "train" / "red" / "0.png").rename(own_images / "train" / "red" / "more" / "0.png")
    assert counts(find(own_images)) == {"train": 18, "val": 9}


@pytest.mark.parametrize("place", [".", ".."])
def test_the_layout_of_a_well_known_course(place, options, tmp_path, monkeypatch):
    """train/1 ... train/102, valid/, and the names in a file beside or above them."""
    folder = tmp_path / "course" / "flowers"
    for split, count in (("train", 3), ("valid", 2), ("test", 1)):
        draw_classes(folder / split, count, ["1", "10", "102"])
    (folder / place / "cat_to_name.json").write_text(json.dumps({"102": "blackberry lily", "1": "pink primrose",
                                                                 "10": "globe thistle", "77": "passion flower"}))
    options = [*options, *ONE_EPOCH, "--data-dir", folder]
    assert call(options) == 0
    report = (tmp_path / "runs" / "t_report.txt").read_text()
    assert all(name in report for name in ("pink primrose", "globe thistle", "blackberry lily"))
    monkeypatch.chdir(folder)
    data = program.find_images(settings([*options, "--data-dir", "."]))
    assert data.class_names == ["pink primrose", "globe thistle", "blackberry lily"]
    assert counts(data) == {"train": 9, "val": 6}


def test_names_that_two_classes_share_are_told_apart(find, own_images):
    (own_images / "cat_to_name.json").write_text(json.dumps({"red": "rose", "blue": "rose"}))
    assert find(own_images).class_names == ["rose (blue)", "rose (red)", "yellow"]


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


def test_hidden_files_and_other_systems_litter_are_no_images_and_no_classes(find, own_images):
    for name in ("._0.jpg", ".DS_Store", "Thumbs.db", "desktop.ini", ".hidden.png"):
        for folder in ("", "train", "train/red", "val/blue"):
            (own_images / folder / name).write_bytes(b"litter")
    for name in (".ipynb_checkpoints", "__MACOSX", "@eaDir", ".git"):
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


def test_what_is_passed_over_is_counted_aloud_by_ending(find, own_images, capsys):
    for name in ("train/red/notes.txt", "train/blue/notes.TXT", "val/red/film.mp4", "train/red/README"):
        (own_images / name).write_text("no image")
    assert counts(find(own_images)) == {"train": 18, "val": 9}
    printed = capsys.readouterr().out
    assert "2 files .txt passed over" in printed and "1 files .mp4" in printed and "without an ending" in printed


def break_images(own_images):
    broken = [own_images / name for name in ("train/red/0.png", "train/blue/3.png", "val/red/1.png")]
    for path, content in zip(broken, (b"no image", b"", broken[2].read_bytes()[:300])):
        path.write_bytes(content)
    return broken


def test_all_unreadable_images_are_named_in_a_file_and_counted(options, own_images, tmp_path, capsys):
    broken = break_images(own_images)
    refuse(options, capsys, "3 of 27", "t_unreadable.txt", "--skip-unreadable")
    lines = (tmp_path / "runs" / "t_unreadable.txt").read_text().splitlines()
    assert len(lines) == 3 and all(any(line.startswith(f"{path}: ") for line in lines) for path in broken)
    assert not list((tmp_path / "runs").glob("*.p*"))


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
    refuse([*options, "--skip-unreadable"], capsys, "cannot read", "left")


def test_a_decompression_bomb_is_a_line(options, own_images, tmp_path, monkeypatch, capsys):
    draw(own_images / "train" / "red" / "bomb.png", (220, 40, 50), 0, (200, 200))
    monkeypatch.setattr(program.Image, "MAX_IMAGE_PIXELS", 10_000)
    refuse(options, capsys, "bomb.png")
    assert "bomb" in (tmp_path / "runs" / "t_unreadable.txt").read_text()


def test_names_that_no_encoding_has(options, own_images, tmp_path, capsys):
    """Bytes that are no letters, a line break, quotes and commas in the names of files."""
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


@pytest.mark.parametrize("content", [other_stuff, images_without_folders, lambda folder: (folder / "new").mkdir()])
def test_nothing_is_downloaded_into_a_folder_of_other_things(content, options, tmp_path, downloads, capsys):
    folder = tmp_path / "other"
    folder.mkdir()
    content(folder)
    before = sorted(folder.rglob("*"))
    refuse([*options, "--data-dir", folder], capsys, folder, next(folder.iterdir()).name, "expected")
    assert not downloads and sorted(folder.rglob("*")) == before


def test_a_file_instead_of_a_folder(options, own_images, downloads, capsys):
    refuse([*options, "--data-dir", own_images / "train" / "red" / "0.png"], capsys, "Not a directory")
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
    refuse([*options, "--data-dir", draw_classes(tmp_path / "few", 1)], capsys, "VAL_FRACTION")


# Flowers-102


def test_flowers102_layout(flowers, options, tmp_path, downloads, capsys):
    assert call([*options, *ONE_EPOCH, "--data-dir", flowers, "--eval-splits", "val", "test"]) == 0
    assert "15 train, 9 val, 6 test" in capsys.readouterr().out and not downloads
    assert figures_of(tmp_path / "runs", "test")["images"] == 6


@pytest.mark.parametrize("state", ["missing", "empty", "hidden"])
def test_a_missing_or_empty_folder_is_where_flowers102_goes(state, options, tmp_path, downloads, capsys):
    folder = tmp_path / "new"
    if state != "missing":
        folder.mkdir()
    if state == "hidden":
        (folder / ".DS_Store").write_bytes(b"")
    refuse([*options, "--data-dir", folder], capsys, "--demo", "no network", "network")
    assert downloads and all(str(folder) in str(tried) for tried in downloads)


def test_a_download_that_stalls_does_not_wait_for_ever(options, tmp_path, downloads, monkeypatch, capsys):
    timeouts = []

    def stalls(*_args, **_kw):
        timeouts.append(socket.getdefaulttimeout())
        raise TimeoutError("timed out")

    monkeypatch.setattr(program.Flowers102, "__init__", stalls)
    before = socket.getdefaulttimeout()
    try:
        refuse([*options, "--data-dir", tmp_path / "new"], capsys, "timed out", "--demo")
    finally:
        socket.setdefaulttimeout(before)
    assert timeouts and all(0 < seconds <= 300 for seconds in timeouts)


@pytest.mark.parametrize("error, advice", [
    (PermissionError(13, "Permission denied", "/data/flowers-102"), "writable"),
    (OSError(30, "Read-only file system", "/data/flowers-102"), "writable"),
    (OSError("[SSL: CERTIFICATE_VERIFY_FAILED] self-signed certificate"), "SSL_CERT_FILE")])
def test_advice_fits_the_cause_of_a_failed_download(error, advice, options, tmp_path, monkeypatch, capsys):
    def fail(*_args, **_kw):
        raise error

    monkeypatch.setattr(program.Flowers102, "__init__", fail)
    refuse([*options, "--data-dir", tmp_path / "new"], capsys, advice)


@pytest.mark.parametrize("file, content", [
    ("setid.mat", b"changed"), ("jpg/image_00003.jpg", None), ("jpg/image_00020.jpg", b"\xff\xd8\xff\xe0 truncated")])
def test_damaged_flowers_are_named(file, content, flowers, options, downloads, capsys):
    path = flowers / "flowers-102" / file
    path.write_bytes(content) if content else path.unlink()
    refuse([*options, "--data-dir", flowers], capsys, path.name)


def test_an_interrupted_extraction_is_repaired(flowers, options, monkeypatch):
    jpg, archive = flowers / "flowers-102" / "jpg", flowers.parent / "archive"
    shutil.copytree(jpg, archive)
    (jpg / "image_00003.jpg").write_bytes(b"\xff\xd8\xff\xe0 truncated")
    for number in range(4, 31):
        (jpg / f"image_{number:05d}.jpg").unlink()
    monkeypatch.setattr(program, "download_and_extract_archive",
                        lambda *_args, **_kw: shutil.copytree(archive, jpg, dirs_exist_ok=True))
    assert call([*options, *ONE_EPOCH, "--data-dir", flowers]) == 0


@real
def test_the_real_flowers_are_found(find):
    data = find(os.environ["FLOWERS_DIR"])
    assert counts(data) == {"train": 1020, "val": 1020} and len(data.class_names) == 102
    assert all((split.labels.bincount() == 10).all() for split in data.splits.values())
