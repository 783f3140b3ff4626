"""From end to end: the demo, which draws its flowers and learns them from scratch, and a short run on the real ones."""
import json

import numpy as np
from conftest import call, draw, draw_classes, figures_of, is_one_line, real
from PIL import Image

import efficientnet_b3 as program


def test_the_demo_from_end_to_end(demo):
    runs = demo.folder / "runs"
    assert demo.code == 0 and demo.err == ""
    assert "no result" in demo.out and "macro_f1" in demo.out and "816 train, 408 val" in demo.out
    found = {path.name for path in runs.iterdir() if not path.name.startswith(".")}
    files = {f"demo_{name}" for name in program.RUN_FILES if not name.endswith(("_val.png", "_test.png"))}
    assert found == files | {"activations"}
    figures = json.loads((runs / "demo_metrics.json").read_text())["splits"]["val"]
    assert figures["accuracy"] >= 20 / 102 and {"frozen", "fine_tuned"} < figures.keys()
    for path in runs.glob("*.png"):
        assert Image.open(path).size[0] > 300 and path.stat().st_size <= 1e6


def test_a_species_has_one_look_in_many_poses():
    pictures = [np.asarray(program.draw_flower(*which), float) for which in ((3, 0), (3, 0), (3, 1), (4, 0))]
    assert np.array_equal(pictures[0], pictures[1]) and pictures[0].shape == (96, 96, 3)
    assert not np.array_equal(pictures[0], pictures[2])
    assert np.abs(pictures[0] - pictures[3]).mean() > 5


def test_a_folder_of_other_files_is_not_drawn_into(tmp_path, capsys):
    draw(tmp_path / "mine" / "0.png", (1, 2, 3), 0)
    mine = tmp_path / "mine"
    for folder, phrase in ((mine, "--data-dir"), (mine / "0.png", "--data-dir")):
        assert call(["--demo", "--data-dir", folder, "--out-dir", tmp_path / "runs"]) == 2
        assert is_one_line(capsys.readouterr().err, phrase)
    assert [path.name for path in mine.iterdir()] == ["0.png"]


def test_after_the_demo_the_real_thing_finds_its_own_folder(tmp_path, monkeypatch, downloads, capsys):
    """The README runs one after the other."""
    monkeypatch.chdir(tmp_path)
    draw_classes(tmp_path / program.DEMO["data_dir"] / "train", 1)
    assert call(["--weights", "none"]) == 2 and downloads
    assert is_one_line(capsys.readouterr().err, "cannot download Flowers-102")


def test_the_demo_has_constants_of_its_own_that_can_be_set(tmp_path):
    cfg = program.parse_command_line(["--demo", "--views", "3"])
    assert (cfg.weights, cfg.run_name, cfg.views, cfg.img_size) == ("none", "demo", 3, [64, 64])
    assert program.parse_command_line([]).run_name == program.CONSTANTS["run_name"] != "demo"


@real
def test_short_real_run(real_run):
    assert real_run.code == 0 and real_run.err == ""
    assert figures_of(real_run.folder / "runs")["accuracy"] > 10 / 102  # ten times chance
