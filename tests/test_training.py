"""The run itself: transforms, views, frozen part, heads, stages, checkpoints, reports, command line."""
import csv
import json
import re
import subprocess
import sys
from contextlib import contextmanager

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.discriminant_analysis import LinearDiscriminantAnalysis
from torchvision.models import efficientnet_b3
from torchvision.transforms import v2

import efficientnet_b3 as program


def settings(options, *extra):
    return program.start_run(program.parse_command_line(options + list(extra)))


def test_transforms_are_those_of_the_mission():
    resize, augment, normalize = program.make_transforms((300, 300))
    flip, rotation, jitter = augment.transforms
    assert resize.size == [300, 300] and resize.interpolation == v2.Resize(1).interpolation
    assert isinstance(flip, v2.RandomHorizontalFlip) and flip.p == 0.5
    assert rotation.degrees == [-15, 15] and rotation.interpolation == v2.RandomRotation(1).interpolation
    assert jitter.brightness == jitter.contrast == jitter.saturation == (0.8, 1.2) and jitter.hue == (-0.2, 0.2)
    white = normalize(torch.full((1, 3, 2, 2), 255, dtype=torch.uint8))[0, :, 0, 0]
    assert torch.allclose(white, torch.tensor([(1 - 0.485) / 0.229, (1 - 0.456) / 0.224, (1 - 0.406) / 0.225]))


def test_a_view_depends_on_seed_view_and_image_alone(options):
    images = torch.randint(0, 256, (8, 32, 32, 3), dtype=torch.uint8)
    alone, workers = settings(options).cfg, settings(options, "--num-workers", "2").cfg
    views = program.AugmentedViews(images, alone)
    in_order = torch.cat(list(program.batches_of(views, 2, alone)))
    assert torch.equal(in_order, torch.cat(list(program.batches_of(views, 4, workers))))
    assert torch.equal(views[13], in_order[13])
    assert not torch.equal(in_order[:8], in_order[8:])
    assert not torch.equal(program.AugmentedViews(images, settings(options, "--seed", "1").cfg)[0], in_order[0])


@pytest.mark.parametrize("amp, tolerance", [("--no-amp", 1e-4), ("--amp", 0.15)])  # the latter: random weights
@pytest.mark.parametrize("blocks", [0, 2, 9])
def test_cached_activations_are_what_the_model_itself_computes(amp, tolerance, blocks, options):
    run = settings(options, amp)
    data = program.load_data(run.cfg)
    model = program.build_model(3)
    program.start_without_pretraining(model, data.splits["train"].images, run)
    frozen, unfrozen = program.split_model(model, blocks)
    cut = program.cache_activations(frozen, "val", data, run)
    images = program.make_transforms((32, 32)).normalize(data.splits["val"].images.permute(0, 3, 1, 2))
    with torch.no_grad():
        expected, features = model.features[:9 - blocks](images), model.features(images).mean((2, 3))
    expected = expected if blocks else features
    assert (cut[0].float() - expected).norm() / expected.norm() < tolerance
    on = program.pass_through(unfrozen, cut, run)[0].float()
    assert (on - features).norm() / features.norm() < 2 * tolerance


def test_unfreezing_is_by_blocks_from_the_end():
    model = program.build_model(3)
    for blocks in (0, 2, 9):
        program.split_model(model, blocks)
        trained = [any(p.requires_grad for p in block.parameters()) for block in model.features]
        assert trained == [False] * (9 - blocks) + [True] * blocks


def test_solved_heads_are_linear_discriminant_analysis_without_their_fold(options):
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(3).repeat_interleave(8)
    features = torch.randn(2, 24, 5, generator=generator) + 2 * torch.randn(3, 5, generator=generator)[labels]
    heads = program.Heads(labels, torch.nn.Linear(5, 3), settings(options, "--folds", "4").cfg)
    heads.solve(features, 0.3)
    for number in range(5):
        kept = heads.folds != number
        reference = LinearDiscriminantAnalysis(solver="lsqr", shrinkage=0.3)
        reference.fit(features[:, kept].flatten(0, 1).numpy(), labels[kept].repeat(2).numpy())
        factor = heads.weight[number].norm().item() / np.linalg.norm(reference.coef_)
        np.testing.assert_allclose(heads.weight[number].detach(), factor * reference.coef_, rtol=1e-3, atol=1e-5)
        np.testing.assert_allclose(heads.bias[number].detach(), factor * reference.intercept_, rtol=1e-3, atol=1e-4)


def test_no_head_learns_from_its_fold_and_a_single_image_is_in_none(options):
    labels = torch.tensor([0] * 6 + [1])
    heads = program.Heads(labels, torch.nn.Linear(4, 2), settings(options).cfg)
    seen = heads.seen
    assert seen[-1].all() and seen[:, 6].all()
    assert (seen[:-1, :6].sum(0) == 1).all()  # of two heads, each image is left out by one


def test_learning_rate_falls_to_a_tenth_after_three_fifths_of_each_stage(options, tmp_path, capsys):
    program.main(options + ["--epochs-stage2", "5"])
    rates = [float(row["lr"]) for row in csv.DictReader((tmp_path / "runs" / "t_history.csv").open())]
    assert rates == pytest.approx([1e-3, 1e-3] + [1e-4] * 3 + [1e-5] * 2)


def test_best_epoch_has_the_highest_accuracy_then_the_lowest_loss():
    rows = [{"val_acc": a, "val_loss": b} for a, b in ((0.5, 1), (0.7, 2), (0.7, 1), (0.7, 1))]
    assert program.best_epoch(rows) is rows[2]


def test_metrics_against_figures_by_hand():
    probabilities = torch.tensor([[0.8, 0.2], [0.6, 0.4], [0.3, 0.7], [0.9, 0.1]])
    figures = program.measure(probabilities, torch.tensor([0, 0, 1, 1]))
    assert figures["accuracy"] == 0.75 and figures["top5_accuracy"] == 1
    assert figures["wilson_95"] == pytest.approx([0.3006, 0.9544], abs=1e-3)
    assert figures["macro_f1"] == pytest.approx((0.8 + 2 / 3) / 2)
    assert figures["expected_calibration_error"] == pytest.approx((0.2 + 0.4 + 0.3 + 0.9) / 4, abs=1e-6)
    assert figures["log_loss"] == pytest.approx(-np.log([0.8, 0.6, 0.7, 0.1]).mean(), abs=1e-6)


def test_a_run_leaves_a_plain_model_and_all_artefacts(options, tmp_path, capsys):
    assert program.main(options + ["--no-amp", "--eval-splits", "val", "test", "--test-time-flip"]) == 0
    printed = capsys.readouterr()
    assert printed.err == "" and "accuracy" in printed.out and "trained in stage 1" in printed.out
    files = {name: tmp_path / "runs" / f"t_{name}" for name in program.RUN_FILES}
    assert sorted(path.name for path in (tmp_path / "runs").iterdir()) == sorted(path.name for path in files.values())
    for name, path in files.items():
        if path.suffix == ".png":
            assert Image.open(path).size[0] > 300 and path.stat().st_size < 1e6
    best, last = (torch.load(files[name], weights_only=True) for name in ("best.pth", "last.pth"))
    assert len(last["history"]) == 4 and last["class_names"] == ["blue", "red", "yellow"]
    assert best["best_accuracy"] == max(row["val_acc"] for row in last["history"])
    model = efficientnet_b3(num_classes=3).eval()
    model.load_state_dict(best["model"])
    data = program.load_data(program.parse_command_line(options))
    images = program.make_transforms((32, 32)).normalize(data.splits["val"].images.permute(0, 3, 1, 2))
    with torch.no_grad():
        probabilities, mirrored = model(images).softmax(1), model(images.flip(3)).softmax(1)
    accuracy = (probabilities.argmax(1) == data.splits["val"].labels).float().mean().item()
    figures = json.loads(files["metrics.json"].read_text())["splits"]
    loss_with_flip = program.measure((probabilities + mirrored) / 2, data.splits["val"].labels)["log_loss"]
    assert figures["val flip"]["log_loss"] == pytest.approx(loss_with_flip, abs=1e-5)
    assert abs(loss_with_flip - figures["val"]["log_loss"]) > 1e-4 and list(figures)[2:] == ["test", "test flip"]
    assert figures["val"]["accuracy"] == pytest.approx(accuracy) and figures["test"]["images"] == 6
    rows = list(csv.DictReader(files["predictions.csv"].open()))
    assert len(rows) == 15 and {row["split"] for row in rows} == {"val", "test"}
    assert sum(row["true"] == row["predicted"] for row in rows if row["split"] == "val") == round(9 * accuracy)
    assert all(name in files["report.txt"].read_text() for name in ("blue", "precision", "recall"))


@pytest.mark.parametrize("extra", [[], ["--batch-size", "64", "--epochs-stage1", "0", "--epochs-stage2", "1"]])
def test_frozen_means_frozen_and_the_rest_learns_even_from_one_batch(extra, options, tmp_path, capsys):
    program.main(options + extra)
    after = torch.load(tmp_path / "runs" / "t_last.pth", weights_only=True)["model"]
    run = settings(options)
    images = program.load_data(run.cfg).splits["train"].images
    before = program.build_model(3, seed=run.cfg.seed)
    program.start_without_pretraining(before, images, run)
    start = before.state_dict()
    moved = {key for key in start if not torch.equal(start[key], after[key])}
    assert any(key.startswith("features.8") for key in moved) and "classifier.1.weight" in moved
    assert not [key for key in moved if key.split(".")[1] in "0123456" and key.startswith("features")]
    assert not [key for key in moved if "running_" in key or "num_batches" in key]


@pytest.mark.parametrize("extra", [
    ["--unfreeze-last-blocks", "0"], ["--epochs-stage1", "0"], ["--epochs-stage2", "0"],
    ["--head-init", "random", "--no-cross-fit", "--no-refit-head", "--blocks-lr-factor", "1"]])
def test_the_levers_work(extra, options, tmp_path, capsys):
    assert program.main(options + extra) == 0
    assert json.loads((tmp_path / "runs" / "t_metrics.json").read_text())["splits"]["val"]["images"] == 9


def test_weights_that_were_saved_as_parameters_work(options, tmp_path, capsys):
    torch.save(program.build_model(2).state_dict(keep_vars=True), tmp_path / "weights.pth")
    assert program.main(options + ["--weights", str(tmp_path / "weights.pth")]) == 0


def test_two_classes_work(options, own_images, capsys):
    for split in ("train", "val", "test"):
        (own_images / split / "red").rename(own_images.parent / split)
    assert program.main(options) == 0


def test_flowers102_layout(flowers, options, tmp_path, no_network, capsys):
    assert program.main(options + ["--data-dir", str(flowers), "--eval-splits", "val", "test"]) == 0
    assert "15 train, 9 val, 6 test" in capsys.readouterr().out


def test_every_constant_is_an_option_with_its_comment(capsys):
    with pytest.raises(SystemExit) as stop:
        program.main(["--help"])
    text = " ".join(capsys.readouterr().out.split())
    assert stop.value.code == 0 and len(program.CONSTANTS) == 25
    for name, (_, comment) in program.CONSTANTS.items():
        assert "--" + name.replace("_", "-") in text and comment.split(";")[0][:30] in text
    cfg = program.parse_command_line(["--lr-stage1", "3e-4", "--img-size", "64", "32", "--no-amp"])
    assert (cfg.lr_stage1, cfg.img_size, cfg.amp, cfg.batch_size) == (3e-4, (64, 32), False, 32)


def test_a_constant_edited_to_a_whole_number_still_takes_fractions(monkeypatch):
    monkeypatch.setitem(program.CONSTANTS, "blocks_lr_factor", (5, "its comment"))
    assert program.parse_command_line(["--blocks-lr-factor", "2.5"]).blocks_lr_factor == 2.5


def test_a_constant_edited_to_have_no_comment_is_still_one(tmp_path):
    source = program.Path(program.__file__).read_text(encoding="utf-8")
    (tmp_path / "edited.py").write_text(re.sub("^SEED = 0 .*", "SEED = 7", source, flags=re.MULTILINE), encoding="utf-8")
    command = "import edited; print(edited.parse_command_line([]).seed)"
    result = subprocess.run([sys.executable, "-c", command], cwd=tmp_path, capture_output=True, text=True)
    assert result.stdout == "7\n"


def test_no_second_is_counted_in_two_phases(options, tmp_path, capsys, monkeypatch):
    open_phases, real = [], program.Run.phase

    @contextmanager
    def watched(run, name):
        assert not open_phases, f"{name} within {open_phases}"
        open_phases.append(name)
        with real(run, name):
            yield
        open_phases.pop()

    monkeypatch.setattr(program.Run, "phase", watched)
    assert program.main(options + ["--eval-splits", "val", "test"]) == 0


def test_importing_starts_nothing(tmp_path):
    folder = program.Path(program.__file__).parent
    result = subprocess.run([sys.executable, "-c", "import efficientnet_b3"], cwd=tmp_path, capture_output=True,
                            env={**program.os.environ, "PYTHONPATH": str(folder)})
    assert result.returncode == 0 and result.stdout == result.stderr == b"" and not list(tmp_path.iterdir())
