"""Bad input gets one line that says what is wrong, exit code 2, and leaves the files on disk as they are."""
import pytest
import torch

import efficientnet_b3 as program


class Evil:
    """A pickle that runs code where it is loaded."""

    def __reduce__(self):
        return print, ("code from a stranger ran",)


def rename(old, new):
    return lambda own: (own / old).rename(own / new)


def overwrite(file, content):
    return lambda own: (own / file).write_bytes(content)


def empty_class(own):
    for image in (own / "train" / "red").iterdir():
        image.unlink()


# options, what the message must say, and what is done to the folder of images before
ROWS = [
    (["--img-size", "300"], "IMG_SIZE"), (["--img-size", "8", "8"], "IMG_SIZE"),
    (["--img-size", "a", "b"], "--img-size"), (["--img-size", "64", "9999"], "IMG_SIZE"), (["--views", "0"], "VIEWS"),
    (["--views", "1.5"], "--views"), (["--eval-splits", "train"], "EVAL_SPLITS"),
    (["--eval-splits", "val", "val"], "EVAL_SPLITS"), (["--num-workers", "-2"], "NUM_WORKERS"),
    (["--num-workers", "many"], "--num-workers"), (["--unfreeze-last-blocks", "-1"], "UNFREEZE_LAST_BLOCKS"),
    (["--unfreeze-last-blocks", "10"], "UNFREEZE_LAST_BLOCKS"), (["--head-init", "zero"], "HEAD_INIT"),
    (["--demo"], "--data-dir"),
    (["--demo", "--data-dir", "{own}/test"], "--data-dir"), (["--demo", "--data-dir", "x" * 300], "xxx"),
    (["--data-dir", "x" * 300], "xxx"), (["--predict", "x" * 300], "xxx"),
    (["--demo", "--data-dir", "{own}/train/red/0.png"], "--data-dir"),
    (["--shrinkage", "0"], "SHRINKAGE"), (["--shrinkage", "1.1"], "SHRINKAGE"), (["--shrinkage", "nan"], "SHRINKAGE"),
    (["--folds", "1"], "FOLDS"), (["--epochs-stage1", "-1"], "EPOCHS_STAGE1"),
    (["--epochs-stage2", "-1"], "EPOCHS_STAGE2"), (["--epochs-stage1", "two"], "--epochs-stage1"),
    (["--epochs-stage1", "0", "--epochs-stage2", "0"], "both be 0"), (["--lr-stage1", "0"], "LR_STAGE1"),
    (["--lr-stage1=-1e-3"], "LR_STAGE1"), (["--lr-stage2", "inf"], "LR_STAGE2"), (["--lr-stage2", "nan"], "LR_STAGE2"),
    (["--blocks-lr-factor", "0"], "BLOCKS_LR_FACTOR"), (["--batch-size", "0"], "BATCH_SIZE"),
    (["--batch-size", ""], "--batch-size"), (["--seed", "-1"], "SEED"), (["--run-name", "a/b"], "RUN_NAME"),
    (["--run-name", ""], "RUN_NAME"), (["--no-such-option"], "--no-such-option"), (["--epochs"], "--epochs"),
    (["--device", "abacus"], "abacus"), (["--device", "cuda:99"], "cuda:99"), (["--checkpoint", "x.pth"], "--predict"),
    (["--predict"], "--predict"), (["--out-dir", "{own}/train/red/0.png"], "--out-dir"),
    (["--weights", "no_such_file.pth"], "no_such_file.pth"), (["--weights", "{own}/train/red/0.png"], "0.png"),
    (["--weights", "{own}/evil.pth"], "evil.pth"), (["--weights", "{own}/other.pth"], "other.pth"),
    (["--weights", "{own}/shape.pth"], "shape.pth"), (["--weights", "IMAGENET1K_V1"], "--demo"),
    (["--data-dir", "{own}/nowhere"], "--demo"), (["--unfreeze-last-blocks", "9", "--views", "99999999"], "VIEWS"),
    ([], "red", empty_class), ([], "rot", rename("train/red", "train/rot")), ([], "val", rename("val", "valid")),
    ([], "0.png", overwrite("train/red/0.png", b"not an image")),
    ([], "0.png", overwrite("val/red/0.png", b"\x89PNG\r\n\x1a\n cut off")),
    (["--eval-splits", "val", "test"], "--eval-splits val", rename("test", "exam")),
    (["--predict", "no_such_image.jpg"], "no_such_image.jpg"), (["--predict", "{own}/train"], "no checkpoint"),
    (["--predict", "{own}/empty"], "no images"), (["--data-dir", "{own}/train/red/0.png"], "is a file"),
    (["--seed", str(2**64)], "SEED"), (["--batch-size", str(2**40)], "BATCH_SIZE"), (["--device", "meta"], "meta"),
    (["--predict", "{own}/train", "--checkpoint", "{own}/evil.pth"], "evil.pth"),
    (["--predict", "{own}/train", "--checkpoint", "{own}/other.pth"], "other.pth"),
]


@pytest.mark.parametrize("row", ROWS, ids=[f"{number} {' '.join(row[0])}"[:50] for number, row in enumerate(ROWS)])
def test_one_line_and_exit_code_2(row, options, own_images, tmp_path, monkeypatch, no_network, capsys):
    extra, phrase, *damages = row
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "no_cache"))
    torch.save(Evil(), own_images / "evil.pth")
    torch.save({"weight": torch.zeros(3)}, own_images / "other.pth")
    torch.save({"features.0.0.weight": torch.zeros(3)}, own_images / "shape.pth")
    (own_images / "empty").mkdir()
    for damage in damages:
        damage(own_images)
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    try:
        code = program.main(options + [value.replace("{own}", str(own_images)) for value in extra])
    except SystemExit as stop:  # argparse's way
        code = stop.code
    printed = capsys.readouterr()
    assert code == 2
    assert printed.err.startswith("error: ") and printed.err.count("\n") == 1 and phrase in printed.err
    assert "code from a stranger ran" not in printed.out
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before


@pytest.mark.parametrize("name, value", [("lr_stage1", "1e-3"), ("img_size", 300), ("img_size", (300.0, 300.0)),
                                         ("epochs_stage1", 8.0), ("amp", 1), ("eval_splits", "val"), ("seed", None)])
def test_a_constant_edited_to_a_wrong_type_is_named(name, value, monkeypatch, capsys):
    monkeypatch.setitem(program.CONSTANTS, name, (value, "its comment"))
    with pytest.raises(SystemExit) as stop:
        program.main([])
    error = capsys.readouterr().err
    assert stop.value.code == 2 and error.startswith(f"error: {name.upper()} must be") and error.count("\n") == 1
