"""On a GPU: a short run, its resume to the bit, and its precision. `python -m pytest -m cuda tests`, a minute."""
import json
import os

import pandas as pd
import pytest
import torch
from conftest import Killed

import efficientnet_b3 as program

pytestmark = [pytest.mark.cuda, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU with CUDA")]


def tensors(folder, name):
    """All tensors of a checkpoint by their place in it."""
    def walk(value, place):
        if isinstance(value, torch.Tensor):
            yield place, value
        elif isinstance(value, (dict, list, tuple)):
            for key, part in value.items() if isinstance(value, dict) else enumerate(value):
                yield from walk(part, (*place, key))
    return dict(walk(torch.load(folder / f"t_{name}.pth", map_location="cpu", weights_only=True), ()))


def test_a_killed_and_continued_run_equals_one_never_stopped(options, tmp_path, monkeypatch, capsys):
    options = options + ["--device", "cuda", "--num-workers", "2", "--eval-splits", "val", "test"]
    assert program.main(options) == 0
    assert "float16" in capsys.readouterr().out
    whole = [tensors(tmp_path / "runs", name) for name in ("best", "last", "frozen")]
    replace, folder = os.replace, tmp_path / "killed"

    def replace_or_die(source, target):
        replace(source, target)
        if str(target).endswith("last.pth") and (folder / "t_history.csv").exists():
            if len((folder / "t_history.csv").read_text().splitlines()) == 4:
                raise Killed

    monkeypatch.setattr(program.os, "replace", replace_or_die)
    with pytest.raises(Killed):
        program.main(options + ["--out-dir", str(folder)])
    monkeypatch.setattr(program.os, "replace", replace)
    assert program.main(options + ["--out-dir", str(folder)]) == 0 and not (folder / "t_old1").exists()
    for before, after in zip(whole, [tensors(folder, name) for name in ("best", "last", "frozen")]):
        assert before.keys() == after.keys()
        assert not [place for place in before if not torch.equal(before[place], after[place])]


def test_predictions_are_those_of_the_report(options, own_images, tmp_path, capsys):
    options = options + ["--device", "cuda"]
    assert program.main(options) == 0
    capsys.readouterr()
    assert program.main(options + ["--predict", str(own_images / "val")]) == 0
    lines = capsys.readouterr().out.splitlines()
    told = pd.read_csv(tmp_path / "runs" / "t_predictions.csv")
    for row in told.itertuples():
        likeliest = lines[lines.index(str(own_images / row.file)) + 1]
        assert float(likeliest.split("%")[0]) == pytest.approx(100 * row.probability, abs=1)


def test_half_precision_says_what_full_precision_says(options, tmp_path, capsys):
    accuracies = []
    for precision in ("--amp", "--no-amp"):
        folder = tmp_path / precision
        assert program.main(options + ["--device", "cuda", precision, "--out-dir", str(folder)]) == 0
        accuracies.append(json.loads((folder / "t_metrics.json").read_text())["splits"]["val"]["accuracy"])
    assert abs(accuracies[0] - accuracies[1]) <= 2 / 9  # two of the nine images


def test_the_frozen_part_in_half_precision_is_close_to_the_model(options, own_images):
    cfg = program.parse_command_line(options + ["--device", "cuda"])
    program.choose_device(cfg)
    paths, model = sorted(own_images.glob("train/*/*.png")), program.build_model(3).to(cfg.device)
    program.start_without_pretraining(model, paths, cfg)
    images = torch.stack([torch.from_numpy(program.load_views(path, 0, 0, cfg)) for path in paths])
    frozen, _ = program.split_model(model, 2)
    plain = frozen(program.make_transforms(cfg).normalize(images[:, 0].permute(0, 3, 1, 2).to(cfg.device))).cpu()
    fast = program.FrozenLayers(frozen, cfg)(images)[:, 0].float()
    assert (fast - plain).norm() / plain.norm() < 0.15  # random weights
