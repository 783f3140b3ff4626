"""The model is torchvision's own, cut in two without loss, and takes weights as people have saved them."""
import argparse

import numpy as np
import pytest
import torch
from conftest import call, is_one_line, settings
from torchvision.models import efficientnet_b0, efficientnet_b3
from torchvision.models.efficientnet import EfficientNet_B3_Weights

import efficientnet_b3 as program

FIRST = "features.0.0.weight"
small = pytest.mark.usefixtures("small_network")  # stands for B3, and takes a tenth of its time


def test_the_model_is_torchvisions_and_the_same_for_the_same_seed():
    states = [program.build_model(5, seed=seed).state_dict() for seed in (0, 0, 1)]
    efficientnet_b3(num_classes=5).load_state_dict(states[0])
    assert all(torch.equal(states[0][key], states[1][key]) for key in states[0])
    assert not torch.equal(states[0][FIRST], states[2][FIRST])


@pytest.mark.parametrize("blocks", [0, 2, 9])
def test_the_two_parts_are_the_models_own_layers_and_lose_nothing(blocks):
    model, images = program.build_model(5), torch.rand(2, 3, 64, 64)
    frozen, unfrozen = program.split_model(model, blocks)
    with torch.no_grad():
        torch.testing.assert_close(model.classifier(unfrozen(frozen(images))), model(images))
    ids = {id(parameter) for parameter in unfrozen.parameters()}
    assert ids == {id(parameter) for block in model.features[9 - blocks:] for parameter in block.parameters()}


@pytest.mark.parametrize("learns", [True, False])
def test_the_fast_pooling_is_torchvisions(learns):
    maps = torch.rand(3, 8, 5, 4).to(memory_format=torch.channels_last).requires_grad_(learns)
    pooled, expected = program.average_pool(maps), torch.nn.AdaptiveAvgPool2d(1)(maps)
    torch.testing.assert_close(pooled, expected)
    if learns:
        gradients = [torch.autograd.grad(part.square().sum(), maps)[0] for part in (pooled, expected)]
        torch.testing.assert_close(*gradients)


def wrapped(state):
    """What trainers make of a state dict."""
    module = {f"module.{key}": value for key, value in state.items()}
    return {"as it is": state, "parameters": {key: torch.nn.Parameter(value) if value.is_floating_point() else value
                                              for key, value in state.items()},
            "half precision": {key: value.half() for key, value in state.items()},
            "state_dict": {"state_dict": state, "epoch": 3, "optimizer": {"lr": 0.1}}, "module": module,
            "compiled": {f"_orig_mod.{key}": value for key, value in state.items()},
            "nested": {"model": {"state_dict": module}, "args": dict.fromkeys("abcdefgh", 1), "epoch": 3},
            "named": {"model": "efficientnet_b3", "state_dict": state},
            "averaged": {"n_averaged": torch.tensor(3), **module},
            "no classifier": {key: value for key, value in state.items() if not key.startswith("classifier")}}


@small
@pytest.mark.parametrize("kind", ["as it is", "parameters", "half precision", "state_dict", "module", "compiled",
                                  "nested", "named", "averaged", "no classifier"])
def test_weights_are_freed_of_what_trainers_wrap_around_them(kind, weights):
    state = torch.load(weights, weights_only=True)
    torch.save(wrapped(state)[kind], weights)
    loaded = program.load_pretrained(str(weights))
    assert loaded.keys() == {key for key in state if key.startswith("features.")}
    tolerance = 1e-2 if kind == "half precision" else 0
    for key, value in loaded.items():
        torch.testing.assert_close(value, state[key], rtol=tolerance, atol=tolerance)  # of the same type
        assert not value.requires_grad
    program.build_model(7, loaded)  # whose classifier is of another size


def test_a_checkpoint_of_the_program_is_a_file_of_weights_too(finished):
    path = program.run_file(program.parse_command_line(finished), "best.pth")
    state = torch.load(path, weights_only=True)["model"]
    assert torch.equal(program.load_pretrained(str(path))[FIRST], state[FIRST])


@small
def test_a_path_that_does_not_exist_is_not_blamed_on_the_network(options, downloads, capsys):
    assert call([*options, "--weights", "typo.pth"]) == 2
    error = capsys.readouterr().err
    assert is_one_line(error, "typo.pth") and "network" not in error


@small
def test_no_weights_and_a_path_in_the_home_folder(weights, options, monkeypatch):
    monkeypatch.setenv("HOME", str(weights.parent))
    assert program.load_pretrained("none") is None
    assert FIRST in program.load_pretrained(settings(options, "--weights", "~/weights.pth").weights)


class Evil:
    """A pickle that runs code where it is loaded."""

    def __reduce__(self):
        return print, ("code from a stranger ran",)


def other_shape():
    state = program.build_model(2).state_dict()
    return {**state, FIRST: torch.zeros(3)}


def timm_names():
    return {"conv_stem.weight": torch.zeros(40, 3, 3, 3), "blocks.0.0.conv_dw.weight": torch.zeros(1),
            "classifier.weight": torch.zeros(2, 1536)}


@small
@pytest.mark.parametrize("content, phrases", [
    (lambda: efficientnet_b0(num_classes=2).state_dict(), ["Missing"]),
    (lambda: {"weight": torch.zeros(3)}, ["Missing"]), (other_shape, ["0.0.weight", "size"]),
    (Evil, ["print"]), (dict, []),
    (lambda: [1, 2], []), (lambda: torch.zeros(3), []), (lambda: {"state_dict": {"a": {"b": {}}}}, []),
    (lambda: {"state_dict": [1]}, []),
    (lambda: b"\0" * 99, []),
    (lambda: {**{f"features.{n}.x": torch.zeros(1) for n in range(9)}, FIRST: torch.zeros(40, 3, 3, 3)}, ["Missing"]),
    (timm_names, ["0.0.weight", "Missing"]),
    (lambda: {"state_dict": {FIRST: torch.zeros(1)}, "args": argparse.Namespace(lr=0.1)}, ["argparse.Namespace"]),
    (lambda: {"state_dict": {FIRST: torch.zeros(1)}, "best": np.float64(0.9)}, ["numpy"])],
    ids=["another network", "few", "other shape", "code", "empty", "list", "tensor", "hollow",
         "list within", "bytes", "a key", "timm", "settings", "numpy"])
def test_files_that_hold_no_weights_are_named_with_what_they_hold(content, phrases, options, tmp_path, capsys):
    torch.save(content(), tmp_path / "own.pth")
    assert call([*options, "--weights", tmp_path / "own.pth"]) == 2
    printed = capsys.readouterr()
    assert is_one_line(printed.err, "own.pth", *phrases) and "delete" not in printed.err and "\x1b" not in printed.err
    assert "code from a stranger ran" not in printed.out


@small
@pytest.mark.parametrize("content", [b"", b"no pickle", b"PK\x03\x04 no archive", b"\x08" + bytes(7) + b'{"a":{}}'],
                         ids=["empty", "text", "zip", "safetensors"])
def test_files_that_torch_cannot_read_are_named(content, options, tmp_path, capsys):
    (tmp_path / "own.safetensors").write_bytes(content)
    assert call([*options, "--weights", tmp_path / "own.safetensors"]) == 2
    error = capsys.readouterr().err
    assert is_one_line(error, "own.safetensors") and "delete" not in error and "\x1b" not in error


@pytest.fixture
def cached(tmp_path, monkeypatch):
    """Where torch keeps the downloaded weights."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    name = EfficientNet_B3_Weights.IMAGENET1K_V1.url.rsplit("/", 1)[1]
    (tmp_path / "torch" / "hub" / "checkpoints").mkdir(parents=True)
    return tmp_path / "torch" / "hub" / "checkpoints" / name


@small
@pytest.mark.parametrize("share", [0, 0.5, 0.999])
def test_a_truncated_download_is_named_and_left_as_it_is(share, cached, weights, options, downloads, capsys):
    whole = weights.read_bytes()
    cached.write_bytes(whole[:int(share * len(whole))])
    assert call([*options, "--weights", "IMAGENET1K_V1"]) == 2
    assert is_one_line(capsys.readouterr().err, str(cached), "load") and not downloads
    assert cached.exists()


@small
def test_cached_weights_need_no_network(cached, weights, downloads):
    cached.write_bytes(weights.read_bytes())
    assert FIRST in program.load_pretrained("IMAGENET1K_V1") and not downloads


@small
@pytest.mark.parametrize("error", [OSError("[SSL: CERTIFICATE_VERIFY_FAILED] self-signed certificate"),
                                   PermissionError(13, "Permission denied", "/some/cache"), TimeoutError("timed out")])
def test_a_failed_download_is_told_as_the_system_tells_it(error, cached, options, monkeypatch, capsys):
    def fail(*_args, **_kwargs):
        raise error

    monkeypatch.setattr(torch.hub, "download_url_to_file", fail)
    assert call([*options, "--weights", "IMAGENET1K_V1"]) == 2
    assert is_one_line(capsys.readouterr().err, program.one_line(error), str(cached), "--demo")
