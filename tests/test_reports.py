"""What a run leaves behind: a plain model, figures that can be checked by hand, and pictures that show any name."""
import csv
import io
import json
import os
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
import torch.nn.functional as F
from conftest import (ONE_EPOCH, Killed, call, draw_splits, figures_of, history_of, options_for, settings,
                      without_progress)
from PIL import Image
from sklearn.metrics import balanced_accuracy_score, f1_score, log_loss
from torchvision.models import efficientnet_b3

import efficientnet_b3 as program


def files_of(options):
    cfg = settings(options)
    return {name: program.run_file(cfg, name) for name in program.RUN_FILES}


def test_metrics_against_figures_by_hand():
    probabilities = torch.tensor([[0.8, 0.2], [0.6, 0.4], [0.3, 0.7], [0.9, 0.1]])
    figures, table = program.measure(probabilities, torch.tensor([0, 0, 1, 1]))
    assert figures["accuracy"] == 0.75 and figures["top5_accuracy"] == 1 and figures["images"] == 4
    assert figures["balanced_accuracy"] == 0.75
    assert [figures["wilson_95_low"], figures["wilson_95_high"]] == pytest.approx([0.3006, 0.9544], abs=1e-3)
    assert figures["macro_f1"] == pytest.approx((0.8 + 2 / 3) / 2)
    assert figures["expected_calibration_error"] == pytest.approx((0.2 + 0.4 + 0.3 + 0.9) / 4, abs=1e-6)
    assert figures["log_loss"] == pytest.approx(-np.log([0.8, 0.6, 0.7, 0.1]).mean(), abs=1e-6)
    expected = {"precision": [2 / 3, 1], "recall": [1, 0.5], "f1-score": [0.8, 2 / 3], "support": [2, 2]}
    assert all(table[column].tolist() == pytest.approx(values) for column, values in expected.items())


def test_metrics_against_scikit_learn():
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(0, 7, (200,), generator=generator)
    exact = torch.randn(200, 7, generator=generator).double().softmax(1)
    probabilities = F.pad(exact, (0, 1)).float()  # a class without images, which is never predicted
    figures, table = program.measure(probabilities, labels)
    predicted = probabilities.argmax(1)
    assert figures["balanced_accuracy"] == pytest.approx(balanced_accuracy_score(labels, predicted))
    assert figures["macro_f1"] == pytest.approx(f1_score(labels, predicted, labels=range(7), average="macro"))
    assert figures["log_loss"] == pytest.approx(log_loss(labels, exact), abs=1e-5)
    five = probabilities.argsort(1, descending=True)[:, :5]
    assert figures["top5_accuracy"] == pytest.approx((five == labels[:, None]).any(1).float().mean().item())
    assert len(table) == 8 and table["support"].tolist()[7] == 0


def test_a_run_leaves_all_its_files_and_no_others(finished):
    files = files_of(finished)
    found = {path.name for path in files["best.pth"].parent.iterdir() if not path.name.startswith(".")}
    kept = {name for name in found if name.startswith("t_activations_")}
    assert found - kept == {path.name for path in files.values()}
    for name, path in files.items():
        if path.suffix == ".png":
            assert Image.open(path).size[0] > 300 and path.stat().st_size < 1e6, name


def test_a_run_leaves_a_plain_model_that_does_what_the_report_says(finished):
    files = files_of(finished)
    best, last = (torch.load(files[name], weights_only=True) for name in ("best.pth", "last.pth"))
    assert len(last["history"]) == 5 and last["config"]["class_names"] == ["blue", "red", "yellow"]
    assert best["best_accuracy"] == max(row["val_acc"] for row in last["history"])
    model = efficientnet_b3(num_classes=3).eval()
    model.load_state_dict(best["model"])
    cfg = settings(finished)
    data = program.find_images(cfg)
    rows = pd.read_csv(files["predictions.csv"])
    assert len(rows) == 15 and set(rows["split"]) == {"val", "test"}
    for name, split in data.splits.items():
        if name == "train":
            continue
        images = torch.cat([torch.from_numpy(program.load_views(path, 0, 0, cfg)) for path in split.paths])
        with torch.no_grad():
            probabilities = model(program.make_transforms(cfg).normalize(images.permute(0, 3, 1, 2))).softmax(1)
        figures, told = program.measure(probabilities, split.labels)[0], figures_of(files["best.pth"].parent, name)
        assert told["accuracy"] == pytest.approx(figures["accuracy"]) and told["images"] == len(split.paths)
        assert told["log_loss"] == pytest.approx(figures["log_loss"], abs=1e-4)
        part = rows[rows["split"] == name]
        assert part["probability"].tolist() == pytest.approx(probabilities.max(1).values.tolist(), abs=1e-3)
        assert (part["true"] == part["predicted"]).mean() == pytest.approx(figures["accuracy"])
        assert part["true"].tolist() == [path.parent.name for path in split.paths]
        assert part["file"].tolist() == [f"{name}/{path.parent.name}/{path.name}" for path in split.paths]
    row = program.best_epoch(last["history"])
    assert row["val_acc"] == pytest.approx(figures_of(files["best.pth"].parent)["accuracy"])
    assert json.loads(files["metrics.json"].read_text())["best_epoch"] == row["epoch"]


def test_the_history_has_both_rates_and_epoch_0(finished):
    rows = history_of(files_of(finished)["best.pth"].parent)
    assert list(rows[0]) == "stage epoch lr_head lr_blocks train_loss train_acc val_loss val_acc seconds".split()
    assert [(row["stage"], row["epoch"]) for row in rows] == [(1, 0), (1, 1), (1, 2), (2, 3), (2, 4)]


def test_the_terminal_tells_the_story_and_ends_on_the_summary(finished):
    printed = (files_of(finished)["best.pth"].parent.parent / "stdout.txt").read_text()
    places = [printed.index(text) for text in ("18 train, 9 val, 6 test", "of these in stage 1", "stage epoch",
                                               "precision", "most confused", "best epoch", "macro_f1")]
    assert places == sorted(places)
    assert printed.count("precision") == 1  # of the first split
    last = [line.split() for line in printed[printed.index("best epoch"):].splitlines()]
    assert last[1] == ["val", "test"] and ["accuracy", "macro_f1"] == [last[2][0], last[6][0]] and len(last) == 10
    table = printed[printed.index("stage epoch"):].splitlines()
    assert all(len(line) < 80 for line in table)  # the width of a terminal
    assert [line.split()[:2] for line in table[1:6]] == [["1", "0"], ["1", "1"], ["1", "2"], ["2", "3"], ["2", "4"]]
    assert without_progress((files_of(finished)["best.pth"].parent.parent / "stderr.txt").read_text()) == ""


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_a_long_phase_is_a_bar_on_a_terminal_and_one_line_in_a_file(monkeypatch):
    clock = iter((0, 90))
    for stream in (Terminal(), io.StringIO()):
        monkeypatch.setattr(sys, "stderr", stream)
        monkeypatch.setattr(program, "time", SimpleNamespace(monotonic=lambda: next(clock)))
        assert len(list(program.progress(range(1020), 1020, "frozen part"))) == 1020
        clock, text = iter((0, 90)), stream.getvalue()
        if stream.isatty():
            assert "/1020 " in text and "images in" not in text and text.split("\r")[-2].strip() == ""
        else:
            assert text == "frozen part: 1,020 images in 90 s\n"


def test_the_report_has_every_class_and_pair(finished):
    files = files_of(finished)
    report = files["report.txt"].read_text()
    assert all(text in report for text in ("blue", "red", "yellow", "precision", "recall", "macro_f1", "test: each class"))
    rows = list(csv.DictReader(files["predictions.csv"].open()))
    pairs = pd.Series([(row["true"], row["predicted"]) for row in rows
                       if row["split"] == "val" and row["true"] != row["predicted"]], dtype=object).value_counts()
    part = report[report.index("val: most confused"):].split("\n\n")[0]
    assert part.count("taken for") == len(pairs)
    for (true, predicted), count in pairs.items():
        assert f"{count} of 3 {true} taken for {predicted}" in part


def test_the_configuration_is_kept_with_all_constants(finished):
    kept = json.loads(files_of(finished)["config.json"].read_text())
    assert kept.keys() >= program.CONSTANTS.keys() and kept["img_size"] == [40, 40] and kept["views"] == 2
    assert all(any(what in name for name in kept) for what in ("transforms", "images", "class_names", "precision"))


def test_history_and_curves_exist_during_the_run(small_network, options, tmp_path, monkeypatch):
    real, calls = program.train_one_epoch, []

    def second_is_killed(*args):
        calls.append(args)
        if len(calls) == 2:
            raise Killed
        return real(*args)

    monkeypatch.setattr(program, "train_one_epoch", second_is_killed)
    with pytest.raises(Killed):
        call(options)
    assert [row["epoch"] for row in history_of(tmp_path / "runs")] == [0, 1]
    assert all(Image.open(tmp_path / "runs" / f"t_{name}.png").size[0] > 300 for name in ("loss", "acc"))


def test_curves_are_drawn_every_ten_seconds_at_most_and_at_the_end(small_network, options, tmp_path, monkeypatch):
    drawn, clock, real, write = [], [1000.0], program.train_one_epoch, program.write_file

    def now():
        return clock[0]

    def write_at_that_time(path, content):
        drawn.append((path.name, now()))
        write(path, content)
        os.utime(path, (now(), now()))

    monkeypatch.setattr(program, "write_file", write_at_that_time)
    monkeypatch.setattr(program, "time", SimpleNamespace(monotonic=now, perf_counter=now, time=now))
    monkeypatch.setattr(program, "train_one_epoch", lambda *args: (clock.__setitem__(0, clock[0] + 4), real(*args))[1])
    assert call([*options, *ONE_EPOCH, "--epochs-stage1", "7"]) == 0
    assert [at for name, at in drawn if name == "t_loss.png"] == [1000, 1012, 1024, 1028]


def test_a_figure_says_what_its_training_curve_is(small_network, options, tmp_path, monkeypatch):
    figures, write = {}, program.write_file
    monkeypatch.setattr(program, "write_file", lambda path, content: (
        write(path, content), figures.update({path.name: content})))
    assert call([*options, *ONE_EPOCH]) == 0
    legend = [text.get_text() for text in figures["t_acc.png"].legends[0].get_texts()]
    assert any("not seen" in text for text in legend) and any("validation" in text for text in legend)
    lines = {line.get_label(): list(line.get_xdata()) for line in figures["t_acc.png"].axes[0].get_lines()}
    assert lines["validation"] == [0, 1]


# Names

LONG = "a very long name of a flower, as seedsmen and botanists like them, 70 letters"[:70]
NAMES = ["Ba$$in", "cash $5 $6", "玫瑰", LONG, LONG[:-1] + "!", "line\nbreak", "a, \"b\"; c",
         "50 % \\alpha_{x}^2 <b>", b"\xff\xfe".decode("utf-8", "surrogateescape")]  # bytes that are no letters

TRAIN_AND_PREDICT = """
import sys
import efficientnet_b3 as program
options, images = sys.argv[2:], sys.argv[1]
print("codes", program.main(options), program.main([*options, "--predict", images]))
"""


def test_any_class_name_trains_reports_and_predicts_on_an_ascii_terminal(tmp_path, monkeypatch):
    images = draw_splits(tmp_path / "own", NAMES)
    options = [*options_for(images, tmp_path / "runs"), *ONE_EPOCH]
    monkeypatch.setenv("PYTHONIOENCODING", "ascii")
    monkeypatch.setenv("PYTHONPATH", str(program.Path(program.__file__).parent))
    command = [sys.executable, "-c", TRAIN_AND_PREDICT, str(images / "val"), *options]
    result = subprocess.run(command, capture_output=True)
    printed, error = result.stdout.decode("ascii"), without_progress(result.stderr.decode("ascii"))
    assert "codes 0 0" in printed and result.returncode == 0, error
    assert error == "" and printed.count("Glyph") == 0 and printed.count("no font has") <= 1
    rows = pd.read_csv(tmp_path / "runs" / "t_predictions.csv")
    assert len(rows) == 27 and len(set(rows["true"])) == 9
    report = (tmp_path / "runs" / "t_report.txt").read_text("utf-8")
    assert all(name in report for name in NAMES if name.isprintable())
    for path in (tmp_path / "runs").glob("*.png"):
        assert 300 < Image.open(path).size[0] < 3000 and path.stat().st_size < 1e6
