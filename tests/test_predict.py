"""--predict names the flowers in files of all kinds, and the demo runs from end to end as a subprocess."""
import json
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image

import efficientnet_b3 as program

real = pytest.mark.skipif(not os.environ.get("FLOWERS_DIR") or not os.environ.get("WEIGHTS_FILE"),
                          reason="FLOWERS_DIR and WEIGHTS_FILE do not name the real images and weights")


def test_images_of_all_modes_become_upright_rgb(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (30, 50, 3), dtype=np.uint8)
    picture = Image.fromarray(pixels)
    picture.save(tmp_path / "plain.png")
    clear = picture.convert("RGBA")
    clear.putalpha(0)
    clear.save(tmp_path / "clear.png")
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees
    picture.save(tmp_path / "turned.png", exif=exif)
    picture.convert("L").save(tmp_path / "grey.png")
    picture.convert("P").save(tmp_path / "palette.png")
    picture.convert("CMYK").save(tmp_path / "cmyk.jpg")
    picture.save(tmp_path / "moving.gif", save_all=True, append_images=[picture.rotate(180)])
    Image.fromarray(np.full((30, 50), 30000, np.uint16)).save(tmp_path / "deep.png")
    loaded = {path.name: program.load_image(path) for path in tmp_path.iterdir()}
    assert all(image.mode == "RGB" for image in loaded.values())
    assert np.asarray(loaded["clear.png"]).min() == 255
    assert np.array_equal(loaded["turned.png"], np.rot90(pixels, -1))
    assert np.asarray(loaded["deep.png"])[0, 0].tolist() == [117, 117, 117]
    assert {image.size for name, image in loaded.items() if name != "turned.png"} == {(50, 30)}


def test_predict_prints_names_and_goes_on_after_a_broken_file(options, own_images, tmp_path, capsys):
    program.main(options)
    capsys.readouterr()
    (own_images / "test" / "broken.jpg").write_bytes(b"not an image")
    code = program.main(options + ["--predict", str(own_images / "test"), str(own_images / "val" / "blue" / "0.png")])
    printed = capsys.readouterr()
    assert code == 1 and "broken.jpg" in printed.err and printed.err.count("\n") == 1
    assert printed.out.count(".png") == 7 and printed.out.count("%") == 3 * 7
    single = ["--predict", str(own_images / "val" / "blue" / "0.png"), "--checkpoint",
              str(tmp_path / "runs" / "t_last.pth")]
    assert program.main(single + ["--num-workers", "0"]) == 0


def test_prediction_that_is_stopped_promises_no_epochs(options, own_images, monkeypatch, capsys):
    monkeypatch.setattr(program, "load_checkpoint", lambda _path: program.stop(2, None))
    assert program.main(options + ["--predict", str(own_images / "val")]) == 130
    assert capsys.readouterr().err == "stopped\n"


def test_with_test_time_flip_an_image_and_its_mirror_image_are_the_same(options, tmp_path, capsys):
    program.main(options)
    for name, step in (("plain", 1), ("mirrored", -1)):
        pixels = np.random.default_rng(0).integers(0, 255, (32, 32, 3), np.uint8)[:, ::step]
        Image.fromarray(pixels).save(tmp_path / f"{name}.png")
    told = {}
    for extra in ("--test-time-flip", "--no-test-time-flip"):
        for name in ("plain", "mirrored"):
            capsys.readouterr()
            program.main(options + [extra, "--no-amp", "--predict", str(tmp_path / f"{name}.png")])
            told[extra, name] = capsys.readouterr().out.splitlines()[1:]
    assert len(told["--test-time-flip", "plain"]) == 3
    assert told["--test-time-flip", "plain"] == told["--test-time-flip", "mirrored"]


def test_demo_from_end_to_end(tmp_path):
    command = [sys.executable, program.__file__, "--demo", "--data-dir", str(tmp_path / "flowers"), "--out-dir",
               str(tmp_path / "runs")]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0 and result.stderr == ""
    assert "no result" in result.stdout and "macro-F1" in result.stdout
    assert {path.name for path in (tmp_path / "runs").iterdir()} == {f"demo_{name}" for name in program.RUN_FILES}
    figures = json.loads((tmp_path / "runs" / "demo_metrics.json").read_text())["splits"]["val"]
    assert figures["accuracy"] >= 20 / 102
    for path in (tmp_path / "runs").glob("*.png"):
        assert Image.open(path).size[0] > 300 and path.stat().st_size <= 1e6


@real
def test_fast_frozen_part_says_what_the_plain_one_says():
    """On the real validation images: relative error below 6 %, and at most 0.3 points of a head's accuracy."""
    run = program.start_run(program.parse_command_line(["--data-dir", os.environ["FLOWERS_DIR"], "--eval-splits",
                                                        "val", "--img-size", "128", "128", "--views", "1"]))
    data = program.load_data(run.cfg)
    model = program.build_model(102, program.load_pretrained(os.environ["WEIGHTS_FILE"]))
    frozen, _ = program.split_model(model, 0)
    heads = program.Heads(data.splits["train"].labels, model.classifier[1], run.cfg)
    heads.solve(program.cache_activations(frozen, "train", data, run), 0.3)
    fast = program.cache_activations(frozen, "val", data, run)[0].float()
    normalize = program.make_transforms(run.cfg.img_size).normalize
    with torch.no_grad():
        plain = torch.cat([model.features(normalize(images.permute(0, 3, 1, 2))).mean((2, 3))
                           for images in data.splits["val"].images.split(32)])
    accuracy_of_fast, accuracy_of_plain = (
        (heads(features)[-1].argmax(1) == data.splits["val"].labels).float().mean() for features in (fast, plain))
    assert (fast - plain).norm() / plain.norm() < 0.06
    assert accuracy_of_plain > 0.5 and abs(accuracy_of_fast - accuracy_of_plain) <= 0.003


@real
def test_short_real_run(tmp_path, capsys):
    code = program.main(["--data-dir", os.environ["FLOWERS_DIR"], "--weights", os.environ["WEIGHTS_FILE"],
                         "--out-dir", str(tmp_path), "--eval-splits", "val", "--img-size", "96", "96", "--views", "1",
                         "--epochs-stage1", "1", "--epochs-stage2", "1"])
    figures = json.loads((tmp_path / "effb3_flowers102_finetune_metrics.json").read_text())["splits"]["val"]
    assert code == 0 and figures["accuracy"] > 10 / 102  # ten times chance
