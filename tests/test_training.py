"""Two stages: what stands still stands still, the rest learns at its rate, and a run that cannot go on says why."""
import copy
import errno
import json
import math
import os
import shutil

import pytest
import torch
import torch.nn.functional as F
from conftest import (ONE_EPOCH, call, checkpoint, checkpoints, figures_of, history_of, is_one_line, same,
                      settings, small_efficientnet)

import efficientnet_b3 as program

pytestmark = pytest.mark.usefixtures("undrawn", "small_network")


def test_learning_rates_fall_to_0_in_a_straight_line_in_each_stage(options, no_report, tmp_path):
    rates = ["--lr-stage1", "1e-3", "--lr-stage2", "1e-4", "--blocks-lr-factor", "8", "--layer-decay", "0.5"]
    assert call([*options, *rates, "--epochs-stage2", "5"]) == 0
    rows = history_of(tmp_path / "runs")
    stage2 = [1e-4 * (1 - epoch / 5) for epoch in range(5)]
    assert [row["lr_head"] for row in rows] == pytest.approx([0, 1e-3, 5e-4, *stage2])
    assert [row["lr_blocks"] for row in rows] == pytest.approx([0, 0, 0, *(8 * rate for rate in stage2)])
    assert [(row["stage"], row["epoch"]) for row in rows] == [(1, 0), (1, 1), (1, 2), *((2, e) for e in range(3, 8))]


def test_epochs_take_the_augmented_views_in_turn_and_never_the_plain_one(options):
    cfg, labels = settings(options, "--no-amp"), torch.arange(3).repeat(4)
    heads, blocks = program.Heads(torch.nn.Linear(5, 3), labels, cfg), torch.nn.Sequential()
    optimizer, scaler = torch.optim.Adam(heads.parameters()), torch.amp.GradScaler("cpu", enabled=False)
    views = torch.arange(4.0)[:, None].expand(12, 4, 5)  # all features of a view are its number
    seen = [program.train_one_epoch(blocks, heads, views, optimizer, scaler, epoch, cfg) for epoch in range(1, 6)]
    assert [features.unique().tolist() for features in seen] == [[1], [2], [3], [1], [2]]


def test_each_block_has_the_rate_of_its_place(options, no_report, tmp_path):
    rates = ["--lr-stage2", "1e-4", "--blocks-lr-factor", "8", "--layer-decay", "0.5", "--unfreeze-last-blocks", "3"]
    assert call([*options, *rates, "--no-refit-head", "--epochs-stage1", "0", "--epochs-stage2", "1"]) == 0
    optimizer = checkpoint(tmp_path / "runs", "last")["trainer"]["optimizer"]
    assert [group["initial_lr"] for group in optimizer["param_groups"]] == pytest.approx([1e-4, 8e-4, 4e-4, 2e-4])


def features_of(model, tables, cfg):
    """The pooled features by the whole network, views of the training images and plain images of validation."""
    layers = program.FrozenLayers(program.split_model(model, 0)[0], cfg)
    return {name: torch.cat(list(program.outputs_of_files(layers, list(enumerate(tables[name].path)), views, cfg)))
            for name, views in (("train", 2), ("val", 0))}


def labels_of(table):
    return torch.tensor(table.label.tolist())


def test_epoch_0_is_the_head_in_closed_form_before_any_gradient(options, no_report, tmp_path):
    """Its training figures are those of heads that have not seen the image; its validation figures are the model's."""
    options = [*options, "--no-amp", "--epochs-stage1", "0", "--epochs-stage2", "0"]
    assert call(options) == 0
    last = checkpoint(tmp_path / "runs", "last")
    row, = last["history"]
    assert (row["stage"], row["epoch"], row["lr_head"], row["lr_blocks"]) == (1, 0, 0, 0)
    cfg = settings(options)
    tables, model = program.find_images(cfg).tables, program.build_model(3, last["model"])
    features = features_of(model, tables, cfg)
    heads = program.Heads(model.classifier[1], labels_of(tables["train"]), cfg)
    heads.fit_closed_form(features["train"])
    torch.testing.assert_close(heads.weight[-1], model.classifier[1].weight, rtol=1e-2, atol=1e-3)
    right = model.classifier[1](features["val"][:, 0]).argmax(1) == labels_of(tables["val"])
    assert row["val_acc"] == pytest.approx(right.float().mean().item())
    logits = heads.logits(features["train"][:, 0], heads.unseen_by)
    assert row["train_acc"] == pytest.approx((logits.argmax(1) == labels_of(tables["train"])).float().mean().item())


def test_a_row_of_stage_2_tells_of_one_model_in_both_its_figures(options, tmp_path):
    """Training figures by refitted heads that have not seen the image; validation figures of the same model."""
    options = [*options, "--no-amp"]
    assert call(options) == 0
    last = checkpoint(tmp_path / "runs", "last")
    row, cfg = last["history"][-1], settings(options)
    tables, model = program.find_images(cfg).tables, program.build_model(3, last["model"])
    features, labels = features_of(model, tables, cfg), labels_of(tables["train"])
    heads = program.Heads(model.classifier[1], labels, cfg)
    heads.load_state_dict(last["trainer"]["heads"])
    logits = heads.logits(features["train"][:, 0], heads.unseen_by)
    assert row["train_loss"] == pytest.approx(F.cross_entropy(logits, labels).item(), rel=1e-3)
    assert row["train_acc"] == pytest.approx((logits.argmax(1) == labels).float().mean().item())
    logits, labels = model.classifier[1](features["val"][:, 0]), labels_of(tables["val"])
    assert row["val_loss"] == pytest.approx(F.cross_entropy(logits, labels).item(), rel=1e-3)


def test_without_refits_or_blocks_that_train_there_are_all_epochs(options, no_report, tmp_path):
    for extra in (["--no-refit-head"], ["--unfreeze-last-blocks", "0"]):
        assert call([*options, *extra, "--epochs-stage2", "1"]) == 0
        assert [row["epoch"] for row in history_of(tmp_path / "runs")] == [0, 1, 2, 3]


def test_best_row_has_the_highest_accuracy_then_the_lowest_loss_then_is_the_first():
    rows = [{"val_acc": a, "val_loss": b} for a, b in ((0.5, 1), (0.7, 2), (0.7, 1), (0.7, 1))]
    assert program.best_row(rows) is rows[2]
    assert program.best_row([*rows, {"val_acc": None, "val_loss": None}])["val_acc"] is None  # nothing is held out


def test_frozen_is_the_best_row_of_stage_1(options, tmp_path, monkeypatch):
    """The second of three rows of stage 1 has the highest accuracy, and all of stage 2 a higher one."""
    told = iter((0.3, 0.5, 0.4, 0.7, 0.6))
    scores = program.scores
    monkeypatch.setattr(program, "scores", lambda split, *args: scores(split, *args) | (
        {"val_acc": next(told)} if split == "val" else {}))
    assert call(options) == 0
    best, last, frozen = (checkpoint(tmp_path / "runs", name) for name in ("best", "last", "frozen"))
    assert [row["val_acc"] for row in last["history"]] == [0.3, 0.5, 0.4, 0.7, 0.6]
    assert [row["epoch"] for row in frozen["history"]] == [0, 1] and frozen["best_accuracy"] == 0.5
    assert [row["epoch"] for row in best["history"]] == [0, 1, 2, 3] and best["best_accuracy"] == 0.7
    model = small_efficientnet(3)
    model.load_state_dict(frozen["model"])  # in stage 1 nothing but the head has moved
    start = start_of(options)
    moved = {key for key in start if not torch.equal(start[key], frozen["model"][key])}
    assert moved == {"classifier.1.weight", "classifier.1.bias"}


def start_of(options):
    """The weights that a run starts from."""
    cfg = settings(options)
    model = program.build_model(3, seed=cfg.seed)
    program.start_without_pretraining(model, program.find_images(cfg).tables["train"].path.tolist(), cfg)
    return model.state_dict()


ONE_BATCH = ["--batch-size", "64", "--epochs-stage1", "0"]


@pytest.mark.parametrize("blocks, extra", [(0, []), (2, []), (2, ONE_BATCH), (9, ONE_BATCH)])
def test_frozen_means_frozen_and_the_rest_learns_even_from_one_batch(blocks, extra, options, tmp_path):
    options = [*options, "--epochs-stage2", "1", *extra, "--unfreeze-last-blocks", blocks]
    assert call(options) == 0
    before, after = start_of(options), checkpoint(tmp_path / "runs", "last")["model"]
    moved = {key for key in before if not torch.equal(before[key], after[key])}
    for number in range(9):
        layers = {key for key in moved if key.startswith(f"features.{number}.")}
        assert bool(layers) == (number >= 9 - blocks), number
    assert {"classifier.1.weight", "classifier.1.bias"} <= moved
    assert not [key for key in moved if "running_" in key or "num_batches" in key]
    assert figures_of(tmp_path / "runs")["images"] == 9


def test_in_stage_1_the_head_alone_learns(options, no_report, tmp_path):
    assert call([*options, "--epochs-stage2", "0"]) == 0
    before, after = start_of(options), checkpoint(tmp_path / "runs", "last")["model"]
    moved = {key for key in before if not torch.equal(before[key], after[key])}
    assert moved == {"classifier.1.weight", "classifier.1.bias"}


def test_depthwise_kernels_stand_still_if_told_and_are_not_counted_as_trained(options, no_report, tmp_path, capsys):
    assert call([*options, "--no-train-depthwise", "--epochs-stage1", "0"]) == 0
    before, after = start_of(options), checkpoint(tmp_path / "runs", "last")["model"]
    depthwise = {f"features.{name}.weight" for name, layer in program.build_model(3).features.named_modules()
                 if isinstance(layer, torch.nn.Conv2d) and layer.groups > 1}
    moved = {key for key in before if not torch.equal(before[key], after[key])}
    assert not moved & depthwise and {"features.7.1.block.2.0.weight", "features.8.0.weight"} <= moved
    assert f"{sum(before[key].numel() for key in moved):,} in stage 2" in capsys.readouterr().out


@pytest.mark.parametrize("extra", [
    ["--crop", "0.5", "--unfreeze-last-blocks", "9", "--epochs-stage1", "0"],
    ["--head-init", "random", "--no-cross-fit", "--no-refit-head", "--blocks-lr-factor", "1"]], ids=" ".join)
def test_the_levers_work(extra, options, tmp_path):
    assert call([*options, *extra]) == 0
    assert figures_of(tmp_path / "runs")["images"] == 9


def test_another_seed_is_another_run_and_the_same_seed_the_same(trained, no_report, tmp_path):
    for seed in (0, 1):
        assert call([*trained, "--seed", seed, "--out-dir", tmp_path / str(seed)]) == 0
    states = [checkpoints(tmp_path / folder) for folder in ("runs", "0", "1")]
    assert same(states[0], states[1])
    assert not same([state["model"] for state in states[0]], [state["model"] for state in states[2]])


def test_same_bits_with_and_without_workers(options, no_report, tmp_path):
    options = [*options, "--epochs-stage1", "0", "--epochs-stage2", "1"]
    call(options)
    assert call([*options, "--num-workers", "2", "--out-dir", tmp_path / "workers"]) == 0
    assert same(checkpoints(tmp_path / "runs"), checkpoints(tmp_path / "workers"))


def test_two_classes_and_a_single_image_of_one_work(options, own_images):
    for split in ("train", "val", "test"):
        (own_images / split / "red").rename(own_images.parent / split)
    for number in range(1, 6):
        (own_images / "train" / "blue" / f"{number}.png").unlink()
    assert call([*options, *ONE_EPOCH, "--head-init", "lda"]) == 0


def test_a_refit_is_the_mean_of_trained_heads_and_those_in_closed_form(options, no_report, tmp_path, monkeypatch):
    """On the features of the plain images and of the epoch's view; a run without it trains the same heads."""
    solved, solve = [], program.Heads.fit_closed_form
    options = [*options, "--epochs-stage1", "0", "--epochs-stage2", "1"]

    def keep(heads, features):
        solve(heads, features)
        solved.append((features.shape, copy.deepcopy(heads.state_dict())))

    monkeypatch.setattr(program.Heads, "fit_closed_form", keep)
    call(options)
    call([*options, "--no-refit-head", "--out-dir", tmp_path / "trained"])
    assert [shape[:2] for shape, _ in solved[:2]] == [(18, 3), (18, 2)]
    mean, trained = (checkpoint(tmp_path / folder, "last")["trainer"]["heads"] for folder in ("runs", "trained"))
    for key in ("weight", "bias"):
        torch.testing.assert_close(mean[key], (trained[key] + solved[1][1][key]) / 2)


def test_the_model_of_an_epoch_has_refitted_heads_and_the_training_may_go_on_without(options, no_report, tmp_path,
                                                                                    monkeypatch):
    models = []
    monkeypatch.setattr(program, "export_models", lambda run, *_args: models.append(run["model"]))
    for folder, extra in (("with", ["--refitted-epochs", "0"]), ("without", ["--no-refit-head"])):
        call([*options, *extra, "--out-dir", tmp_path / folder])
    refitted, trained = models[3:5], models[-2:]  # the two epochs of stage 2
    for one, other in zip(refitted, trained):
        odd = {key for key in one if not torch.equal(one[key], other[key])}
        assert odd == {"classifier.1.weight", "classifier.1.bias"}


def test_the_training_goes_on_from_the_refit_after_the_first_epochs(options, no_report, tmp_path, monkeypatch):
    """Rows of stage 2, by that number: the first is the same in all, the next ones differ once heads have changed."""
    rows = {}
    for number in (0, 1, 2, 9):
        call([*options, "--epochs-stage2", "3", "--refitted-epochs", number, "--out-dir", tmp_path / str(number)])
        rows[number] = [row["train_loss"] for row in history_of(tmp_path / str(number))[3:]]
    first, second, third = ([rows[number][place] for number in rows] for place in range(3))
    assert len(set(first)) == 1 and second[0] != second[1] == second[2] == second[3]
    assert len(set(third)) == 3 and third[2] == third[3]


# Runs that cannot go on


def test_a_loss_that_is_not_finite_stops_the_run(options, tmp_path, capsys):
    assert call([*options, "--lr-stage2", "1e18", "--blocks-lr-factor", "1e18"]) == 2
    assert is_one_line(capsys.readouterr().err, "epoch 3", "batch 2", "learning rates")
    assert [row["epoch"] for row in checkpoint(tmp_path / "runs", "last")["history"]] == [0, 1, 2]


@pytest.mark.parametrize("error", [
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"), MemoryError("Unable to allocate 3 GiB"),
    OSError(errno.ENOMEM, os.strerror(errno.ENOMEM))])
def test_out_of_memory_names_the_constant(error, options, monkeypatch, capsys):
    def full(*_args):
        raise error

    monkeypatch.setattr(program, "train_one_epoch", full)
    assert call(options) == 1
    assert is_one_line(capsys.readouterr().err, "out of memory", "BATCH_SIZE")


def test_an_error_of_the_programs_own_is_not_called_out_of_memory(options, monkeypatch):
    def broken(*_args):
        raise RuntimeError("views of unlike sizes")

    monkeypatch.setattr(program, "train_one_epoch", broken)
    with pytest.raises(RuntimeError, match="views of unlike sizes"):
        call(options)


# The final model


@pytest.fixture
def everything(options):
    return [*options, "--train-splits", "train", "val", "--eval-splits", "val", "test"]


def test_all_labelled_images_train_and_the_last_row_is_best(everything, tmp_path, capsys):
    runs = tmp_path / "runs"
    assert call(everything) == 0
    printed, rows = capsys.readouterr().out, history_of(runs)
    assert "27 train, 6 test" in printed
    assert all(math.isnan(row["val_loss"]) and math.isnan(row["val_acc"]) for row in rows)
    last, best, frozen = (checkpoint(runs, name) for name in ("last", "best", "frozen"))
    assert same(last["model"], best["model"]) and len(best["history"]) == len(rows) == 5
    assert [row["epoch"] for row in frozen["history"]] == [0, 1, 2] and not same(frozen["model"], best["model"])
    metrics = json.loads((runs / "t_metrics.json").read_text())
    assert metrics["splits"].keys() == {"test"} and metrics["splits"]["test"]["images"] == 6
    assert metrics["best_epoch"] == 4 and (runs / "t_report.txt").exists()


def test_without_images_that_are_held_out_a_line_says_that_there_is_no_report(everything, own_images,
                                                                              tmp_path, capsys):
    shutil.rmtree(own_images / "test")
    assert call(everything) == 0
    printed = capsys.readouterr().out
    line, = [line for line in printed.splitlines() if "no report" in line]
    assert "test" in line and "27 train" in printed and "precision" not in printed
    assert len(history_of(tmp_path / "runs")) == 5 and checkpoint(tmp_path / "runs", "best")["history"]


def test_own_images_without_folder_val_all_train(everything, own_images, capsys):
    images = own_images.parent / "plain"
    shutil.copytree(own_images / "train", images)
    assert call([*everything, "--data-dir", images]) == 0
    assert "18 train" in capsys.readouterr().out


def test_the_views_of_the_final_model_are_made_of_all_images(everything, own_images, monkeypatch):
    """Validation images get as many augmented views as the others, and each its own."""
    seen, load = [], program.load_views

    def keep(path, index, num_views, cfg):
        if num_views or path.parts[-3] == "test":  # random weights look at plain images before
            seen.append((path.parts[-3], index, num_views))
        return load(path, index, num_views, cfg)

    monkeypatch.setattr(program, "load_views", keep)
    assert call([*everything, *ONE_EPOCH]) == 0
    assert sorted(number for split, number, views in seen if split != "test") == list(range(27))
    assert {(split, views) for split, _, views in seen} == {("train", 2), ("val", 2), ("test", 0)}


def test_the_test_images_are_computed_after_the_training(options, tmp_path, monkeypatch):
    log, load, epoch = [], program.load_views, program.train_one_epoch
    monkeypatch.setattr(program, "start_without_pretraining", lambda *_args: None)  # looks at training images
    monkeypatch.setattr(program, "load_views", lambda *args: log.append(args[0].parts[-3]) or load(*args))
    monkeypatch.setattr(program, "train_one_epoch", lambda *args: log.append("epoch") or epoch(*args))
    assert call([*options, "--eval-splits", "val", "test", "--epochs-stage2", "0"]) == 0
    assert log[:27] == ["train"] * 18 + ["val"] * 9 and log[27:] == ["epoch"] * 2 + ["test"] * 6
    log.clear()
    assert call([*options, "--eval-splits", "val", "--out-dir", tmp_path / "val", "--epochs-stage2", "0"]) == 0
    assert "test" not in log
