"""What stands still is computed once, as the model itself would, and never taken from a half-written file."""
import os
import signal

import pytest
import torch
from conftest import (ONE_EPOCH, activations, call, checkpoints, draw, is_one_line, real, same, settings,
                      without_progress)

import efficientnet_b3 as program

pytestmark = pytest.mark.usefixtures("no_figures")


def batches_of(tensor, size=4, log=None):
    """A pass that notes in `log` what is asked of it."""
    for part in tensor.split(size):
        if log is not None:
            log.append(len(part))
        yield part


@pytest.fixture
def cfg(options, tmp_path):
    (tmp_path / "runs").mkdir()
    return settings(options)


@pytest.fixture
def outputs(cfg):
    return torch.randn(10, 2, 7, 3, 3).to(cfg.dtype)


def never():
    pytest.fail("computed again")
    yield


# What is computed


@pytest.mark.parametrize("amp, tolerance", [("--no-amp", 1e-4), ("--amp", 0.15)])  # the latter: random weights
@pytest.mark.parametrize("blocks", [0, 2, 9])
def test_frozen_parts_say_what_the_model_itself_says(amp, tolerance, blocks, options, own_images):
    cfg, paths = settings(options, amp), sorted(own_images.glob("val/*/*.png"))
    model = program.build_model(3)
    program.start_without_pretraining(model)
    images = torch.cat([torch.from_numpy(program.load_views(path, 0, 0, cfg)) for path in paths])
    images = program.make_transforms(cfg).normalize(images.permute(0, 3, 1, 2))
    with torch.no_grad():
        expected, features = model.features[:9 - blocks](images), model.features(images).mean((2, 3))
    expected = expected if blocks else features
    frozen, unfrozen = program.split_model(model, blocks)
    cut = torch.cat(list(program.frozen_pass(program.Frozen(frozen, cfg), paths, 0, cfg)))
    assert cut.shape[:2] == (9, 1) and cut.dtype == cfg.dtype
    assert (cut[:, 0].float() - expected).norm() / expected.norm() < tolerance
    on = program.Frozen(unfrozen, cfg)(cut)[:, 0].float()
    assert (on - features).norm() / features.norm() < 2 * tolerance


def test_a_frozen_copy_leaves_the_model_as_it_is(options):
    model = program.build_model(3)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    program.Frozen(program.split_model(model, 0)[0], settings(options))
    assert same(before, dict(model.state_dict()))


def test_views_are_the_same_in_workers_and_in_any_batch(options, own_images):
    paths = sorted(own_images.glob("train/*/*.png"))
    passes = []
    for extra in (["--num-workers", "0"], ["--num-workers", "2"]):
        cfg = settings(options, "--no-amp", *extra)
        frozen = program.Frozen(torch.nn.Sequential(), cfg)  # lets the normalized views through
        for frozen.batch_size in (2, 4, 12):
            passes.append(torch.cat(list(program.frozen_pass(frozen, paths, 2, cfg))))
    assert passes[0].shape == (18, 2, 3, 40, 40) and all(torch.equal(other, passes[0]) for other in passes)


@pytest.mark.parametrize("size", [["32", "32"], ["32", "70"]])
def test_the_smallest_images_work(size, options):
    """What remains of them is one pixel high, and its layout in memory is ambiguous."""
    assert call([*options, *ONE_EPOCH, "--img-size", *size]) == 0


@real
def test_fast_frozen_part_says_what_the_plain_one_says(tmp_path):
    """On the real validation images: relative error below 6 %, and at most 0.3 points of a head's accuracy."""
    cfg = settings(["--data-dir", os.environ["FLOWERS_DIR"], "--eval-splits", "val", "--img-size", "128", "128",
                    "--out-dir", str(tmp_path)])
    data = program.find_images(cfg)
    model = program.build_model(102, program.load_pretrained(os.environ["WEIGHTS_FILE"]))
    frozen = program.Frozen(program.split_model(model, 0)[0], cfg)
    train, fast = (torch.cat(list(program.frozen_pass(frozen, data.splits[name].paths, 0, cfg)))
                   for name in ("train", "val"))
    labels = data.splits["val"].labels
    heads = program.Heads(model.classifier[1], data.splits["train"].labels, cfg)
    heads.solve(train, 0.3)
    normalize, plain = program.make_transforms(cfg).normalize, []
    with torch.no_grad():
        for path in data.splits["val"].paths:
            image = normalize(torch.from_numpy(program.load_views(path, 0, 0, cfg)).permute(0, 3, 1, 2))
            plain.append(model.features(image).mean((2, 3)))
    plain = torch.cat(plain)[:, None]
    logits = (features[:, 0].float() @ heads.weight[-1].T + heads.bias[-1] for features in (fast, plain))
    accuracy_of_fast, accuracy_of_plain = ((part.argmax(1) == labels).float().mean() for part in logits)
    assert (fast.float() - plain).norm() / plain.norm() < 0.06
    assert accuracy_of_plain > 0.5 and abs(accuracy_of_fast - accuracy_of_plain) <= 0.003


# Files of activations


def test_a_tensor_is_computed_once_for_what_it_depends_on(cfg, outputs, tmp_path):
    log = []
    assert same(program.compute_once("train", "a", (10, 2, 7, 3, 3), batches_of(outputs, log=log), cfg), outputs) and len(log) == 3
    assert same(program.compute_once("train", "a", (10, 2, 7, 3, 3), never(), cfg), outputs)
    program.compute_once("val", "a", (10, 2, 7, 3, 3), batches_of(outputs), cfg)
    before = activations(tmp_path / "runs")
    assert same(program.compute_once("train", "b", (10, 2, 7, 3, 3), batches_of(outputs + 1), cfg), outputs + 1)
    after = activations(tmp_path / "runs")
    assert len(before) == len(after) == 2 and len(before.keys() & after.keys()) == 1  # that of val


def test_files_of_other_runs_are_left_alone(cfg, outputs, tmp_path):
    others = [tmp_path / "runs" / name for name in ("t2_activations_train_0.bin", "other_t_activations_train_0.bin",
                                                    "t_best.pth", "t_activations_train.txt")]
    for other in others:
        other.write_bytes(b"")
    program.compute_once("train", "a", (10, 2, 7, 3, 3), batches_of(outputs), cfg)
    assert all(other.exists() for other in others)


def cut(content):
    return content[:-1]


def lose_the_tail(content):
    return content[:-100] + bytes(100)  # as a power cut does


def lose_most(content):
    return content[:500] + bytes(len(content) - 500)


def flip_a_bit(content):
    return content[:700] + bytes([content[700] ^ 1]) + content[701:]


@pytest.mark.parametrize("damage", [cut, lose_the_tail, lose_most, flip_a_bit, lambda content: content[:200],
                                    lambda _content: b"", lambda content: content + b"\0"])
def test_a_file_that_is_not_whole_is_computed_anew(damage, cfg, outputs, tmp_path):
    program.compute_once("train", "a", (10, 2, 7, 3, 3), batches_of(outputs), cfg)
    path, = activations(tmp_path / "runs")
    path.write_bytes(damage(path.read_bytes()))
    assert same(program.compute_once("train", "a", (10, 2, 7, 3, 3), batches_of(outputs), cfg), outputs)
    assert same(program.compute_once("train", "a", (10, 2, 7, 3, 3), never(), cfg), outputs)


@pytest.mark.parametrize("moment", [1, 2, 5, 9, 10])
def test_sigkill_during_the_pass_leaves_nothing_taken_for_whole(moment, options, own_images, tmp_path, capfd):
    """The pass kills itself when it loads its image of that number."""
    (tmp_path / "runs").mkdir()
    cfg, paths = settings(options, "--no-amp"), sorted(own_images.glob("train/*/*.png"))[:10]
    frozen, load, calls = program.Frozen(torch.nn.Sequential(), cfg), program.load_views, []

    def compute():
        batches = program.frozen_pass(frozen, paths, 2, cfg)
        return program.compute_once("train", "a", (10, 2, 3, *cfg.img_size), batches, cfg)

    child = os.fork()
    if not child:
        def load_or_die(*args):
            calls.append(args)
            if len(calls) == moment:
                os.kill(os.getpid(), signal.SIGKILL)
            return load(*args)

        program.load_views = load_or_die
        try:
            compute()
        finally:
            os._exit(0)
    assert os.WTERMSIG(os.waitpid(child, 0)[1]) == signal.SIGKILL
    assert not activations(tmp_path / "runs")
    expected = torch.cat(list(program.frozen_pass(frozen, paths, 2, cfg)))
    assert same(compute(), expected) and len(activations(tmp_path / "runs")) == 1


def test_sigkill_before_the_file_gets_its_name(cfg, outputs, tmp_path):
    child = os.fork()
    if not child:
        os.replace = lambda *_paths: os.kill(os.getpid(), signal.SIGKILL)
        try:
            program.compute_once("train", "a", (10, 2, 7, 3, 3), batches_of(outputs), cfg)
        finally:
            os._exit(0)
    assert os.WTERMSIG(os.waitpid(child, 0)[1]) == signal.SIGKILL
    assert not activations(tmp_path / "runs")
    assert same(program.compute_once("train", "a", (10, 2, 7, 3, 3), batches_of(outputs), cfg), outputs)


def test_a_disk_too_small_is_one_line_before_the_pass(small_network, options, tmp_path, monkeypatch, capsys):
    usage, loaded, load = program.shutil.disk_usage(tmp_path), [], program.load_views
    monkeypatch.setattr(program.shutil, "disk_usage", lambda _path: usage._replace(free=10_000))
    options = [*options, "--views", "7"]
    monkeypatch.setattr(program, "load_views", lambda *args: loaded.append(args) or load(*args))
    assert call(options) == 2
    assert is_one_line(capsys.readouterr().err, "VIEWS", "GB")
    assert len([args for args in loaded if args[2]]) <= 1
    assert not activations(tmp_path / "runs") and not list((tmp_path / "runs").glob("*.tmp"))


# The next run


def test_other_rates_and_epochs_compute_no_frozen_pass(small_network, options, weights, tmp_path, monkeypatch, capsys):
    options = [*options, *ONE_EPOCH, "--weights", weights]
    assert call(options) == 0
    before, loaded, load = activations(tmp_path / "runs"), [], program.load_views
    assert len(before) == 4  # training views and validation, and the pooled features of both
    monkeypatch.setattr(program, "load_views", lambda *args: loaded.append(args) or load(*args))
    monkeypatch.setattr(program, "plot_mistakes", lambda *_args: program.Figure())  # looks at images again
    assert call([*options, "--lr-stage2", "3e-4", "--epochs-stage2", "1"]) == 0
    assert "changed: epochs_stage2, lr_stage2" in capsys.readouterr().out and not loaded
    after = activations(tmp_path / "runs")
    assert all(after[path] == state for path, state in before.items())


def test_what_no_longer_fits_is_removed_and_computed_anew(small_network, options, own_images, weights, tmp_path, monkeypatch):
    """One run after the other, each with one more change."""
    monkeypatch.setattr(program, "report", lambda *_args: None)
    options = [*options, *ONE_EPOCH, "--epochs-stage1", "0", "--weights", weights]
    half = settings(options).dtype != torch.float32  # some processors have no half precision
    before = {}
    for change in (["--amp"], ["--views", "3"], ["--seed", "1"], ["--img-size", "40", "48"], ["--crop", "0.9"],
                   ["--unfreeze-last-blocks", "1"], *[["--no-amp"]] * half, "image", "weights"):
        if change == "image":
            draw(own_images / "train" / "red" / "0.png", (250, 10, 10), 99)
        elif change == "weights":
            torch.save(program.build_model(2, seed=5).state_dict(), weights)
        else:
            options += change
        assert call(options) == 0
        after = activations(tmp_path / "runs", "train") | activations(tmp_path / "runs", "features_train")
        assert len(after) == 2 and not before.keys() & after.keys(), change
        before = after


def test_another_number_of_test_images_leaves_the_training_views(trained, tmp_path):
    before = activations(tmp_path / "runs")
    assert call([*trained, "--eval-splits", "val", "test"]) == 0
    after = activations(tmp_path / "runs")
    assert before.items() <= after.items() and len(after) == len(before) + 1


def test_killed_during_the_frozen_pass_and_continued_is_never_interrupted(trained, tmp_path, monkeypatch, capsys):
    load, calls, folder = program.load_views, [], tmp_path / "killed"

    class Killed(BaseException):
        pass

    def load_or_die(*args):
        calls.append(args)
        if len(calls) == 20:  # of 18 for training, 9 for validation
            raise Killed
        return load(*args)

    monkeypatch.setattr(program, "load_views", load_or_die)
    with pytest.raises(Killed):
        call([*trained, "--out-dir", folder])
    assert activations(folder, "train") and not activations(folder, "val")
    monkeypatch.setattr(program, "load_views", load)
    assert call([*trained, "--out-dir", folder]) == 0
    assert same(checkpoints(tmp_path / "runs"), checkpoints(folder)) and not list(folder.glob("*.tmp"))


# Images that change under the run's feet, and mistakes in transforms


def test_an_image_that_breaks_during_the_run_is_named(small_network, options, own_images, weights, monkeypatch, capsys):
    broken, find = own_images / "train" / "red" / "3.png", program.find_images

    def find_and_break(cfg):
        data = find(cfg)
        broken.write_bytes(b"no longer an image")
        return data

    monkeypatch.setattr(program, "find_images", find_and_break)
    assert call([*options, "--weights", weights]) == 1
    assert is_one_line(capsys.readouterr().err, "3.png", "cannot read")


@pytest.mark.parametrize("workers", [0, 1])
def test_a_mistake_in_the_transforms_is_not_called_an_unreadable_image(small_network, workers, options, monkeypatch, capsys):
    real_transforms = program.make_transforms

    def broken(_image):
        raise RuntimeError("views of unlike sizes")

    monkeypatch.setattr(program, "make_transforms", lambda cfg: real_transforms(cfg)._replace(augment=broken))
    with pytest.raises(RuntimeError, match="views of unlike sizes"):
        call([*options, "--num-workers", workers])
    assert "cannot read" not in without_progress(capsys.readouterr().err)
