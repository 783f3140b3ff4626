"""What a run leaves behind: a plain model, figures that can be checked by hand, and pictures that show any name."""
import csv
import io
import json
import os
import sys
from contextlib import redirect_stderr, redirect_stdout
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
import torch.nn.functional as F
from conftest import ONE_EPOCH, Killed, call, draw_splits, figures_of, history_of, options_for, settings
from PIL import Image
from sklearn.metrics import balanced_accuracy_score, confusion_matrix, f1_score, log_loss
from torchvision.models import efficientnet_b3

import efficientnet_b3 as program


def folder_of(options):
    return program.Path(settings(options).out_dir)


def test_metrics_against_figures_by_hand():
    probabilities = torch.tensor([[0.8, 0.2], [0.6, 0.4], [0.3, 0.7], [0.9, 0.1]])
    figures = program.measure(probabilities, torch.tensor([0, 0, 1, 1]))
    assert figures["accuracy"] == 0.75 and figures["top5_accuracy"] == 1 and figures["images"] == 4
    assert figures["balanced_accuracy"] == 0.75
    assert figures["macro_f1"] == pytest.approx((0.8 + 2 / 3) / 2)
    assert figures["expected_calibration_error"] == pytest.approx((0.2 + 0.4 + 0.3 + 0.9) / 4, abs=1e-6)
    assert figures["log_loss"] == pytest.approx(-np.log([0.8, 0.6, 0.7, 0.1]).mean(), abs=1e-6)


def test_metrics_against_scikit_learn():
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(0, 7, (200,), generator=generator)
    exact = torch.randn(200, 7, generator=generator).double().softmax(1)
    probabilities = F.pad(exact, (0, 1)).float()  # a class without images, which is never predicted
    figures = program.measure(probabilities, labels)
    predicted = probabilities.argmax(1)
    assert figures["balanced_accuracy"] == pytest.approx(balanced_accuracy_score(labels, predicted))
    assert figures["macro_f1"] == pytest.approx(f1_score(labels, predicted, labels=range(7), average="macro"))
    assert figures["log_loss"] == pytest.approx(log_loss(labels, exact), abs=1e-5)
    five = probabilities.argsort(1, descending=True)[:, :5]
    assert figures["top5_accuracy"] == pytest.approx((five == labels[:, None]).any(1).float().mean().item())


def test_a_run_leaves_all_its_files_and_no_others(finished):
    """Two splits are evaluated: each has figures of its own."""
    folder = folder_of(finished)
    figures = {f"{figure}_{split}.png" for split in ("val", "test")
               for figure in ("confusion_matrix", "mistakes", "frozen_vs_fine_tuned")}
    files = {"best.pth", "last.pth", "frozen.pth", "loss.png", "acc.png", "report.txt", "metrics.json", "history.csv",
             "predictions.csv", "config.json", *figures}
    found = {path.name for path in folder.iterdir() if not path.name.startswith(".")}
    assert found == {f"t_{name}" for name in files} | {"activations"} and files <= set(program.RUN_FILES)
    for path in folder.glob("*.png"):
        assert Image.open(path).size[0] > 300 and path.stat().st_size < 1e6, path


def test_figures_of_one_split_have_no_ending(trained_once):
    assert {path.name for path in trained_once.glob("*.png")} == {
        "t_loss.png", "t_acc.png", "t_mistakes.png", "t_confusion_matrix.png"}  # nothing was fine-tuned


def test_a_run_leaves_plain_models_that_do_what_the_report_says(finished):
    """The best one and the frozen one, by torchvision alone."""
    folder = folder_of(finished)
    last, rows = torch.load(folder / "t_last.pth", weights_only=True), pd.read_csv(folder / "t_predictions.csv")
    assert len(last["history"]) == 5 and last["class_names"] == ["blue", "red", "yellow"]
    assert len(rows) == 15 and rows["split"].tolist() == ["val"] * 9 + ["test"] * 6
    cfg = settings(finished)
    tables = program.find_images(cfg).tables
    for name in ("best", "frozen"):
        state = torch.load(folder / f"t_{name}.pth", weights_only=True)
        stage1 = [row for row in last["history"] if name == "best" or row["stage"] == 1]
        row = max(stage1, key=lambda row: (row["val_acc"], -row["val_loss"]))
        assert state["history"][-1] == row and state["best_accuracy"] == row["val_acc"]
        model = efficientnet_b3(num_classes=3).eval()
        model.load_state_dict(state["model"])
        for split in ("val", "test"):
            told, table = figures_of(folder, split), tables[split]
            images = torch.cat([torch.from_numpy(program.load_views(path, 0, 0, cfg)) for path in table.path])
            with torch.no_grad():
                probabilities = model(program.make_transforms(cfg).normalize(images.permute(0, 3, 1, 2))).softmax(1)
            figures = program.measure(probabilities, torch.tensor(table.label.tolist()))
            told = told if name == "best" else told["frozen"]
            assert told["accuracy"] == pytest.approx(figures["accuracy"]) and told["images"] == len(table)
            assert told["log_loss"] == pytest.approx(figures["log_loss"], abs=1e-4)
            if split == "val":
                assert row["val_acc"] == pytest.approx(told["accuracy"])
            if name == "best":
                part = rows[rows["split"] == split]
                assert part["probability"].tolist() == pytest.approx(probabilities.max(1).values.tolist(), abs=1e-3)
                assert (part["true"] == part["predicted"]).mean() == pytest.approx(figures["accuracy"])
                assert part["true"].tolist() == [path.parent.name for path in table.path]
                assert part["file"].tolist() == [f"{split}/{path.parent.name}/{path.name}" for path in table.path]
    assert json.loads((folder / "t_metrics.json").read_text())["best_epoch"] == torch.load(
        folder / "t_best.pth", weights_only=True)["history"][-1]["epoch"]


def test_the_history_has_both_rates_and_epoch_0(finished):
    rows = history_of(folder_of(finished))
    assert list(rows[0]) == "stage epoch lr_head lr_blocks train_loss train_acc val_loss val_acc seconds".split()
    assert [(row["stage"], row["epoch"]) for row in rows] == [(1, 0), (1, 1), (1, 2), (2, 3), (2, 4)]


def test_the_terminal_tells_the_story_and_ends_on_the_tests_comparison(finished):
    folder = folder_of(finished)
    printed = (folder.parent / "stdout.txt").read_text()
    places = [printed.index(text) for text in (
        "18 train, 9 val, 6 test", "of these in stage 1", "stage epoch", "val: most confused", "val: each class",
        "test: most confused", "test: each class", "best epoch", "val, 9 images", "test, 6 images")]
    assert places == sorted(places)
    table = printed[printed.index("stage epoch"):].splitlines()
    assert not [line for line in table if len(line) > 80]  # the width of a terminal
    assert [line.split()[:2] for line in table[1:6]] == [["1", "0"], ["1", "1"], ["1", "2"], ["2", "3"], ["2", "4"]]
    assert (folder.parent / "stderr.txt").read_text() == ""


def probabilities_of(predicted, confidence=0.7):
    """Probabilities of three classes, by which each image is taken for the class named."""
    rows = torch.full((len(predicted), 3), (1 - confidence) / 2)
    rows[range(len(predicted)), predicted] = confidence
    return rows


def test_the_comparison_against_figures_by_hand():
    """12 images: fine-tuning puts five right and spoils one; 64 outcomes of six coins, 14 as uneven as that."""
    labels = torch.tensor([0] * 4 + [1] * 4 + [2] * 4)
    before = probabilities_of([1, 1, 0, 0, 0, 0, 0, 1, 2, 2, 2, 0])
    after = probabilities_of([0, 0, 0, 0, 1, 1, 1, 1, 0, 2, 2, 0], 0.9)
    figures, text, f1 = program.compare("val", {"frozen (epoch 3)": before, "fine-tuned (epoch 9)": after},
                                        "fine-tuned (epoch 9)", labels, ["a", "b", "c"])
    assert (figures["mended"], figures["spoilt"]) == (5, 1) and figures["mcnemar_p_value"] == pytest.approx(14 / 64)
    assert figures["frozen"]["accuracy"] == 0.5 and figures["fine_tuned"]["accuracy"] == pytest.approx(10 / 12)
    assert figures["accuracy"] == figures["fine_tuned"]["accuracy"]
    assert "p = 0.22" in text and "put 5 right" in text and "spoilt 1 " in text
    f1_before, f1_after = ([2 * right / (told + 4) for right, told in pairs] for pairs in (
        ((2, 6), (1, 3), (3, 3)), ((4, 6), (4, 4), (2, 2))))
    assert f1.iloc[:, 0].tolist() == pytest.approx(f1_before) and f1.iloc[:, 1].tolist() == pytest.approx(f1_after)
    lines = [line.split() for line in text.splitlines()]
    gains = [["+0.714", "b"], ["+0.400", "a"]]
    place = lines.index(gains[0])
    assert lines[place + 1] == gains[1] and lines[place + 3:] == [["-0.190", "c"]]
    row = next(line for line in lines if line[0] == "accuracy")
    assert [float(number) for number in row[1:]] == pytest.approx([0.5, 0.8333, 0.3333], abs=1e-4)


def test_a_class_without_images_in_a_split_counts_in_no_mean():
    labels = torch.tensor([0, 0, 2, 2])
    told = probabilities_of([0, 0, 2, 1])
    figures, _, f1 = program.compare("val", {"frozen (epoch 0)": told}, "frozen (epoch 0)", labels, ["a", "b", "c"])
    assert f1.index.tolist() == ["a", "c"] and f1.iloc[:, 0].mean() == pytest.approx(figures["macro_f1"])
    _, text = program.describe("val", labels, told.argmax(1), np.eye(3, dtype=int), np.array(["a", "b", "c"]))
    macro, = (line.split() for line in text.splitlines() if "macro avg" in line)
    assert float(macro[4]) == pytest.approx(figures["macro_f1"], abs=1e-3) and " b " not in text


def test_equal_models_are_no_difference():
    same = probabilities_of([0, 1, 1])
    by_model = {"frozen (epoch 0)": same, "fine-tuned (epoch 1)": same}
    figures, text, _ = program.compare("val", by_model, "frozen (epoch 0)", torch.tensor([0, 1, 2]), ["a", "b", "c"])
    assert figures["mended"] == figures["spoilt"] == 0 and figures["mcnemar_p_value"] == 1
    assert text.count("none") == 2


def test_the_lines_of_the_comparison_fit_a_terminal():
    """With the longest of all: Flowers-102's test images, epochs of two digits, names as long as figures show them."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(0, 102, (6149,), generator=generator)
    names = [f"{number:03d} {'x' * 32}" for number in range(102)]
    before, after = (torch.randn(6149, 102, generator=generator).softmax(1) for _ in range(2))
    by_model = {"frozen (epoch 8)": before, "fine-tuned (epoch 13)": after}
    _, text, _ = program.compare("test", by_model, "fine-tuned (epoch 13)", labels, names)
    assert not [line for line in text.splitlines() if len(line) > 80]
    head = next(line for line in text.splitlines() if "difference" in line)
    assert " frozen (epoch 8) " in head and " fine-tuned (epoch 13) " in head and head.endswith(" difference")


def test_the_most_confused_pairs_come_first_and_equal_ones_in_the_order_of_classes():
    labels, predicted = np.array([0, 0, 1, 1, 2, 2, 3]), np.array([1, 0, 0, 0, 3, 1, 3])
    pairs, _ = program.describe("val", labels, predicted, confusion_matrix(labels, predicted), np.array(list("abcd")))
    assert pairs.splitlines()[1:] == ["2 of 2 b taken for a", "1 of 2 a taken for b", "1 of 2 c taken for b",
                                      "1 of 2 c taken for d"]


def test_the_report_compares_on_each_split(finished):
    """What _metrics.json and _report.txt hold is what the terminal has said; the file begins with how it ends there."""
    folder = folder_of(finished)
    printed, report = (folder.parent / "stdout.txt").read_text(), (folder / "t_report.txt").read_text()
    parts = report.rstrip().split("\n\n")
    assert all(part in printed for part in parts) and report.startswith("val, 9 images")
    assert printed.rstrip().endswith(parts[1]) and parts[1].startswith("test, 6 images")
    rows = {row["epoch"]: row for row in history_of(folder)}
    for split, count in (("val", 9), ("test", 6)):
        figures = figures_of(folder, split)
        frozen, tuned = figures["frozen"], figures["fine_tuned"]
        assert frozen["images"] == tuned["images"] == figures["images"] == count
        assert figures["mended"] - figures["spoilt"] == round(count * (tuned["accuracy"] - frozen["accuracy"]))
        part = report[report.index(f"{split}, {count} images"):]
        assert ("chosen on these images" in part.split("\n\n")[0]) == (split == "val")
        assert f"{frozen['accuracy']:.4f}" in part and f"{tuned['accuracy']:.4f}" in part
        for key in ("macro_f1", "top5_accuracy", "log_loss", "expected_calibration_error"):
            assert f"{frozen[key]:.4f}" in part and f"{tuned[key]:.4f}" in part
    stage1 = max((rows[epoch] for epoch in (0, 1, 2)), key=lambda row: (row["val_acc"], -row["val_loss"]))
    assert figures_of(folder)["frozen"]["accuracy"] == pytest.approx(stage1["val_acc"])
    assert f"frozen (epoch {stage1['epoch']})" in report


def test_the_fine_tuned_side_is_a_row_of_stage_2_even_if_none_is_the_best(small_network, undrawn, options, tmp_path,
                                                                          monkeypatch, capsys):
    told, scores = iter((0.9, 0.1, 0.2)), program.scores
    monkeypatch.setattr(program, "scores", lambda split, *args: scores(split, *args) | (
        {"val_acc": next(told)} if split == "val" else {}))
    assert call([*options, "--epochs-stage1", "1", "--epochs-stage2", "1"]) == 0
    printed = capsys.readouterr().out
    assert "best epoch: 0" in printed and "fine-tuned (epoch 2)" in printed and "frozen (epoch 0)" in printed


def test_a_stage_that_fine_tunes_nothing_is_not_compared(trained_once):
    figures = figures_of(trained_once)
    assert "accuracy" in figures and not {"frozen", "fine_tuned", "mcnemar_p_value"} & figures.keys()


def test_the_picture_shows_the_classes_that_changed_most_and_which_way():
    frozen = np.linspace(0.2, 0.7, 40)
    tuned = frozen + np.where(np.arange(40) % 4, 0.01 * np.arange(40), -0.005 * np.arange(40)).round(3)
    names = [f"class {number}" for number in range(40)]
    f1 = pd.DataFrame({"frozen (epoch 1)": frozen, "fine-tuned (epoch 5)": tuned}, index=names)
    axes, = program.plot_changes(f1, "val: from 50.0 % to 60.0 %").axes
    assert "val: from 50.0 % to 60.0 %" in axes.get_title(loc="center") + axes.get_title(loc="left")
    names = [label.get_text() for label in axes.get_yticklabels()]
    change = (f1.iloc[:, 1] - f1.iloc[:, 0]).abs()
    assert len(names) == 30 and set(names) == set(change.nlargest(30).index)
    arrows = [text for text in axes.texts if getattr(text, "arrow_patch", None) is not None]
    ends = {(round(arrow.xyann[0], 6), round(arrow.xy[0], 6)) for arrow in arrows}
    shown = f1.loc[names]
    assert ends == {(round(a, 6), round(b, 6)) for a, b in zip(*shown.T.values)}
    colours = {bool(arrow.xy[0] > arrow.xyann[0]): arrow.arrow_patch.get_edgecolor() for arrow in arrows}
    assert colours[True] != colours[False]


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_a_long_phase_is_a_bar_on_a_terminal_and_nothing_in_a_file(monkeypatch):
    for stream in (Terminal(), io.StringIO()):
        monkeypatch.setattr(sys, "stderr", stream)
        assert len(list(program.progress(range(1020), "frozen part"))) == 1020
        text = stream.getvalue()
        if stream.isatty():
            assert "/1020 " in text and text.split("\r")[-2].strip() == ""
        else:
            assert text == ""


def test_the_report_has_every_class_and_pair(finished):
    folder = folder_of(finished)
    report = (folder / "t_report.txt").read_text()
    assert all(text in report for text in ("blue", "yellow", "precision", "val: each class", "test: each class"))
    rows = list(csv.DictReader((folder / "t_predictions.csv").open()))
    for split, count in (("val", 3), ("test", 2)):
        pairs = pd.Series([(row["true"], row["predicted"]) for row in rows
                           if row["split"] == split and row["true"] != row["predicted"]], dtype=object).value_counts()
        part = report[report.index(f"{split}: most confused"):].split("\n\n")[0]
        assert part.count("taken for") == len(pairs)
        for (true, predicted), number in pairs.items():
            assert f"{number} of {count} {true} taken for {predicted}" in part


def test_the_configuration_is_kept_with_all_constants(finished):
    kept = json.loads((folder_of(finished) / "t_config.json").read_text())
    assert kept.keys() >= program.CONSTANTS.keys() and kept["img_size"] == [40, 40] and kept["views"] == 2
    assert kept["weights"] == "none" and kept["eval_splits"] == ["val", "test"] and kept["device"] == "cpu"
    assert {"images", "folders", "precision", "code of make_transforms", "code of train_one_epoch"} <= kept.keys()


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


def test_curves_are_drawn_every_ten_seconds_at_most_and_at_the_end(small_network, undrawn, options, tmp_path,
                                                                   monkeypatch):
    drawn, clock, real, write = [], [1000.0], program.train_one_epoch, program.write_file

    def now():
        return clock[0]

    def write_at_that_time(path, content, **how):
        drawn.append((path.name, now()))
        write(path, content, **how)
        os.utime(path, (now(), now()))

    monkeypatch.setattr(program, "write_file", write_at_that_time)
    monkeypatch.setattr(program, "time", SimpleNamespace(monotonic=now, perf_counter=now, time=now))
    monkeypatch.setattr(program, "train_one_epoch", lambda *args: (clock.__setitem__(0, clock[0] + 4), real(*args))[1])
    assert call([*options, *ONE_EPOCH, "--epochs-stage1", "7"]) == 0
    assert [at for name, at in drawn if name == "t_loss.png"] == [1000, 1012, 1024, 1028]


def test_curves_say_what_they_are_and_have_a_place_for_each_row(small_network, options, tmp_path, monkeypatch):
    figures, write = {}, program.write_file
    monkeypatch.setattr(program, "write_file", lambda path, content, **how: (
        write(path, content, **how), figures.update({path.name: content})))
    monkeypatch.setattr(program, "report", lambda *args: program.write_history(*args[-2:], at_once=True))
    assert call(options) == 0
    axes = figures["t_acc.png"].axes[0]
    labels = [label.get_text() for label in axes.get_xticklabels()]
    assert labels == ["0", "1", "2", "3", "4"]
    legend = [text.get_text() for text in figures["t_acc.png"].legends[0].get_texts()]
    assert any("not seen" in text for text in legend) and any("validation" in text for text in legend)
    lines = {line.get_label().split(":")[0]: line for line in axes.get_lines()}
    rows = history_of(tmp_path / "runs")
    assert list(lines["validation"].get_xdata()) == [0, 1, 2, 3, 4]
    assert list(lines["validation"].get_ydata()) == pytest.approx([100 * row["val_acc"] for row in rows])
    best = max(range(5), key=lambda number: (rows[number]["val_acc"], -rows[number]["val_loss"]))
    (x, y), = zip(np.atleast_1d(lines["best"].get_xdata()), np.atleast_1d(lines["best"].get_ydata()))
    assert (x, y) == pytest.approx((best, 100 * rows[best]["val_acc"]))


# Names

LONG = "a very long name of a flower, as seedsmen and botanists like them, 70 letters"[:70]
NAMES = ["Ba$$in", "cash $5 $6", "玫瑰", LONG, LONG[:-1] + "!", "line\nbreak", "a, \"b\"; c",
         "50 % \\alpha_{x}^2 <b>", b"\xff\xfe".decode("utf-8", "surrogateescape")]  # bytes that are no letters


def test_any_class_name_trains_reports_and_predicts_on_an_ascii_terminal(small_network, tmp_path, monkeypatch, caplog):
    images = draw_splits(tmp_path / "own", NAMES)
    options = [*options_for(images, tmp_path / "runs"), "--epochs-stage1", "0", "--epochs-stage2", "1"]
    out, err = (io.TextIOWrapper(io.BytesIO(), encoding="ascii") for _ in range(2))
    with redirect_stdout(out), redirect_stderr(err):
        assert program.main(options) == 0
        assert program.main([*options, "--predict", str(images / "val")]) == 0
    out.flush()
    printed = out.buffer.getvalue().decode("ascii")
    assert err.buffer.getvalue() == b"" and not caplog.records  # of fonts, say
    assert all(repr(name)[1:-1].encode("ascii", "backslashreplace").decode() in printed for name in NAMES[:3])
    rows = pd.read_csv(tmp_path / "runs" / "t_predictions.csv")
    assert len(rows) == 27 and len(set(rows["true"])) == 9
    report = (tmp_path / "runs" / "t_report.txt").read_text("utf-8")
    assert all(name in report for name in NAMES if name.isprintable())
    figures = list((tmp_path / "runs").glob("*.png"))
    assert len(figures) == 5
    for path in figures:
        assert 300 < Image.open(path).size[0] < 3000 and path.stat().st_size < 1e6
