"""Two stages: what stands still stands still, the rest learns at its rate, and a run that cannot go on says why."""
import copy
import os

import pytest
import torch
from conftest import ONE_EPOCH, call, checkpoint, checkpoints, figures_of, history_of, is_one_line, real, same, settings

import efficientnet_b3 as program

pytestmark = pytest.mark.usefixtures("no_figures")


def test_learning_rates_fall_to_0_in_a_straight_line_in_each_stage(small_network, options, tmp_path):
    rates = ["--lr-stage1", "1e-3", "--lr-stage2", "1e-4", "--blocks-lr-factor", "8", "--layer-decay", "0.5"]
    assert call([*options, *rates, "--epochs-stage2", "5"]) == 0
    rows = history_of(tmp_path / "runs")
    stage2 = [1e-4 * (1 - epoch / 5) for epoch in range(5)]
    assert [row["lr_head"] for row in rows] == pytest.approx([0, 1e-3, 5e-4, *stage2])
    assert [row["lr_blocks"] for row in rows] == pytest.approx([0, 0, 0, *(8 * rate for rate in stage2)])
    assert [(row["stage"], row["epoch"]) for row in rows] == [(1, 0), (1, 1), (1, 2), *((2, e) for e in range(3, 8))]


def test_each_block_has_the_rate_of_its_place(small_network, options, tmp_path):
    rates = ["--lr-stage2", "1e-4", "--blocks-lr-factor", "8", "--layer-decay", "0.5", "--unfreeze-last-blocks", "3"]
    assert call([*options, *rates, "--epochs-stage1", "0", "--epochs-stage2", "1"]) == 0
    optimizer = checkpoint(tmp_path / "runs", "last")["trainer"]["optimizer"]
    assert [group["initial_lr"] for group in optimizer["param_groups"]] == pytest.approx([1e-4, 8e-4, 4e-4, 2e-4])


def test_epoch_0_is_the_solved_head_before_any_gradient(options, own_images, tmp_path, monkeypatch):
    """Its training figures are those of heads that have not seen the image; its validation figures are the model's."""
    kept, real_epoch = [], program.train_one_epoch

    def keep(*args):
        kept.append(checkpoint(tmp_path / "runs", "last"))
        return real_epoch(*args)

    monkeypatch.setattr(program, "train_one_epoch", keep)
    assert call([*options, *ONE_EPOCH, "--head-init", "lda", "--no-amp"]) == 0
    row, = kept[0]["history"]
    assert (row["stage"], row["epoch"], row["lr_head"], row["lr_blocks"]) == (1, 0, 0, 0)
    cfg = settings(options, "--no-amp")
    data = program.find_images(cfg)
    model = program.build_model(3, kept[0]["model"])
    features = {name: torch.cat(list(program.frozen_pass(
        program.Frozen(program.split_model(model, 0)[0], cfg), data.splits[name].paths, views, cfg)))
        for name, views in (("train", 2), ("val", 0))}
    heads = program.Heads(model.classifier[1], data.splits["train"].labels, cfg)
    heads.solve(features["train"], cfg.shrinkage)
    torch.testing.assert_close(heads.weight[-1], model.classifier[1].weight, rtol=1e-2, atol=1e-3)
    right = model.classifier[1](features["val"][:, 0]).argmax(1) == data.splits["val"].labels
    assert row["val_acc"] == pytest.approx(right.float().mean().item())
    judged = heads.judge_all(features["train"], heads.folds).argmax(1) == data.splits["train"].labels
    assert row["train_acc"] == pytest.approx(judged.float().mean().item())


def test_best_epoch_has_the_highest_accuracy_then_the_lowest_loss():
    rows = [{"val_acc": a, "val_loss": b} for a, b in ((0.5, 1), (0.7, 2), (0.7, 1), (0.7, 1))]
    assert program.best_epoch(rows) is rows[2]


def start_of(options):
    """The weights that a run starts from."""
    cfg = settings(options)
    model = program.build_model(3, seed=cfg.seed)
    program.start_without_pretraining(model)
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


def test_in_stage_1_the_head_alone_learns(options, tmp_path):
    assert call([*options, "--epochs-stage2", "0"]) == 0
    before, after = start_of(options), checkpoint(tmp_path / "runs", "last")["model"]
    moved = {key for key in before if not torch.equal(before[key], after[key])}
    assert moved == {"classifier.1.weight", "classifier.1.bias"}


def test_depthwise_kernels_stand_still_if_told(options, tmp_path):
    assert call([*options, "--no-train-depthwise", "--epochs-stage1", "0"]) == 0
    before, after = start_of(options), checkpoint(tmp_path / "runs", "last")["model"]
    depthwise = {f"features.{name}.weight" for name, layer in program.build_model(3).features.named_modules()
                 if isinstance(layer, torch.nn.Conv2d) and layer.groups > 1}
    moved = {key for key in before if not torch.equal(before[key], after[key])}
    assert not moved & depthwise and {"features.7.1.block.0.0.weight", "features.8.0.weight"} <= moved


@pytest.mark.parametrize("extra", [
    ["--crop", "0.5", "--unfreeze-last-blocks", "9", "--epochs-stage1", "0"],
    ["--head-init", "random", "--no-cross-fit", "--no-refit-head", "--blocks-lr-factor", "1"]], ids=" ".join)
def test_the_levers_work(extra, options, tmp_path):
    assert call([*options, *extra]) == 0
    assert figures_of(tmp_path / "runs")["images"] == 9


def test_another_seed_is_another_run_and_the_same_seed_the_same(trained, tmp_path):
    for seed in (0, 1):
        assert call([*trained, "--seed", seed, "--out-dir", tmp_path / str(seed)]) == 0
    states = [checkpoints(tmp_path / folder) for folder in ("runs", "0", "1")]
    assert same(states[0], states[1])
    assert not same([state["model"] for state in states[0]], [state["model"] for state in states[2]])


def test_same_bits_with_and_without_workers(options, tmp_path):
    options = [*options, "--epochs-stage1", "0", "--epochs-stage2", "1"]
    call(options)
    assert call([*options, "--num-workers", "2", "--out-dir", tmp_path / "workers"]) == 0
    assert same(checkpoints(tmp_path / "runs"), checkpoints(tmp_path / "workers"))


def test_two_classes_and_a_single_image_of_one_work(small_network, options, own_images):
    for split in ("train", "val", "test"):
        (own_images / split / "red").rename(own_images.parent / split)
    for number in range(1, 6):
        (own_images / "train" / "blue" / f"{number}.png").unlink()
    assert call([*options, *ONE_EPOCH, "--head-init", "lda"]) == 0


def test_the_refit_is_the_mean_of_trained_and_solved_heads(small_network, options, tmp_path, monkeypatch):
    """A run without the refit trains the same heads."""
    solved, solve = [], program.Heads.solve
    options = [*options, "--epochs-stage1", "0", "--epochs-stage2", "1"]

    def keep(heads, *args):
        solve(heads, *args)
        solved.append(copy.deepcopy(heads))

    monkeypatch.setattr(program.Heads, "solve", keep)
    call(options)
    call([*options, "--no-refit-head", "--out-dir", tmp_path / "trained"])
    mean, trained = (checkpoint(tmp_path / folder, "last")["trainer"]["heads"] for folder in ("runs", "trained"))
    for key, value in solved[1].state_dict().items():
        torch.testing.assert_close(mean[key], (value + trained[key]) / 2)


# Runs that cannot go on


def test_a_loss_that_is_not_finite_stops_the_run(small_network, options, tmp_path, monkeypatch, capsys):
    real_epoch, loss = program.train_one_epoch, program.Heads.loss

    def third_breaks(*args):
        if len(history_of(tmp_path / "runs")) == 3:
            monkeypatch.setattr(program.Heads, "loss", lambda *a: loss(*a) * float("nan"))
        return real_epoch(*args)

    monkeypatch.setattr(program, "train_one_epoch", third_breaks)
    assert call([*options, "--epochs-stage1", "99"]) == 1
    assert is_one_line(capsys.readouterr().err, "nan", "epoch 3", "batch 1", "LR_STAGE1")
    assert len(checkpoint(tmp_path / "runs", "last")["history"]) == 3


def scaler_that_skips(steps):
    """A GradScaler for processors, which skips those of its steps that are named, as overflows do on a GPU."""
    class Scaler:
        def __init__(self, *_args, **_kw):
            self.size, self.calls, self.skips = 1024.0, 0, False

        def scale(self, loss):
            return loss

        def unscale_(self, optimizer):
            pass

        def get_scale(self):
            return self.size

        def step(self, optimizer):
            self.skips, self.calls = self.calls in steps, self.calls + 1
            if not self.skips:
                optimizer.step()

        def update(self):
            self.size /= 2 if self.skips else 1

        def state_dict(self):
            return {"size": self.size, "calls": self.calls}

        def load_state_dict(self, state):
            self.size, self.calls = state["size"], state["calls"]

    return Scaler


def test_an_epoch_of_overflows_alone_stops_the_run(small_network, options, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(torch.amp, "GradScaler", scaler_that_skips(range(3, 6)))  # of 18 images in batches of 8
    assert call(options) == 1
    assert is_one_line(capsys.readouterr().err, "epoch 2", "AMP")
    assert len(checkpoint(tmp_path / "runs", "last")["history"]) == 2


def test_skipped_steps_are_counted(small_network, options, monkeypatch, capsys):
    monkeypatch.setattr(torch.amp, "GradScaler", scaler_that_skips([0, 1]))
    assert call([*options, *ONE_EPOCH]) == 0
    assert "2 of 3 steps skipped" in capsys.readouterr().out


@pytest.mark.parametrize("error", [
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"), MemoryError("Unable to allocate 3 GiB"),
    RuntimeError("MPS backend out of memory (MPS allocated: 9 GB)"),
    RuntimeError("[enforce fail at alloc_cpu.cpp] DefaultCPUAllocator: you tried to allocate 9 bytes")])
def test_out_of_memory_names_the_constant(small_network, error, options, monkeypatch, capsys):
    def full(*_args):
        raise error

    monkeypatch.setattr(program, "train_one_epoch", full)
    assert call(options) == 1
    assert is_one_line(capsys.readouterr().err, "out of memory", "BATCH_SIZE")


def test_a_worker_that_the_system_kills_is_out_of_memory(small_network, options, monkeypatch, capfd):
    main, load = os.getpid(), program.load_views

    def killed_in_a_worker(*args):
        if os.getpid() != main:
            os.kill(os.getpid(), 9)
        return load(*args)

    monkeypatch.setattr(program, "load_views", killed_in_a_worker)
    assert call([*options, "--num-workers", "1"]) == 1
    assert is_one_line(capfd.readouterr().err, "out of memory", "NUM_WORKERS")


def test_an_error_of_the_programs_own_is_not_called_out_of_memory(small_network, options, monkeypatch):
    def broken(*_args):
        raise RuntimeError("views of unlike sizes")

    monkeypatch.setattr(program, "train_one_epoch", broken)
    with pytest.raises(RuntimeError, match="views of unlike sizes"):
        call(options)


@real
def test_short_real_run(tmp_path):
    assert call(["--data-dir", os.environ["FLOWERS_DIR"], "--weights", os.environ["WEIGHTS_FILE"], "--run-name", "t",
                 "--out-dir", tmp_path, "--eval-splits", "val", "--img-size", "96", "96", "--views", "1",
                 "--epochs-stage1", "1", "--epochs-stage2", "1"]) == 0
    assert figures_of(tmp_path)["accuracy"] > 10 / 102  # ten times chance
