"""Transforms are the mission's, a view is a function of (seed, view, image), and any picture becomes upright RGB."""
import numpy as np
import pytest
import torch
from conftest import draw, settings
from PIL import Image
from torchvision.transforms import v2

import efficientnet_b3 as program

RAMP = np.linspace(0, 1, 50) * np.ones((30, 1))  # black on the left, white on the right


def test_transforms_are_those_of_the_mission(options):
    resize, augment, centre, normalize = program.make_transforms(settings(options, "--img-size", "300", "300"))
    flip, rotation, jitter = augment.transforms
    assert tuple(resize.size) == (300, 300) and resize.interpolation == v2.Resize(1).interpolation
    assert isinstance(flip, v2.RandomHorizontalFlip) and flip.p == 0.5
    assert list(rotation.degrees) == [-15, 15] and rotation.interpolation == v2.RandomRotation(1).interpolation
    assert jitter.brightness == jitter.contrast == jitter.saturation == (0.8, 1.2) and jitter.hue == (-0.2, 0.2)
    noise = np.random.default_rng(0).integers(0, 256, (300, 300, 3), dtype=np.uint8)
    assert np.array_equal(centre(Image.fromarray(noise)), noise)  # and nothing else for validation
    white = normalize(torch.full((1, 3, 2, 2), 255, dtype=torch.uint8))[0, :, 0, 0]
    assert torch.allclose(white, torch.tensor([(1 - 0.485) / 0.229, (1 - 0.456) / 0.224, (1 - 0.406) / 0.225]))


def test_crops_are_those_of_torchvisions_preset(options, tmp_path):
    cfg = settings(options, "--img-size", "300", "300", "--crop", "0.5")
    transforms = program.make_transforms(cfg)
    assert transforms.resize(Image.new("RGB", (400, 800))).size == (320, 640)
    crop = transforms.augment.transforms[0]
    assert isinstance(crop, v2.RandomResizedCrop) and tuple(crop.scale) == (0.5, 1) and tuple(crop.size) == (300, 300)
    draw(tmp_path / "wide.png", (9, 9, 9), 0, (320, 600))
    assert program.load_views(tmp_path / "wide.png", 0, 2, cfg).shape == (3, 300, 300, 3)
    assert program.load_views(tmp_path / "wide.png", 0, 0, cfg).shape == (1, 300, 300, 3)


def test_a_view_depends_on_seed_view_and_image_alone(options, tmp_path):
    path, cfg = draw(tmp_path / "a.png", (90, 140, 60), 0), settings(options)
    views = program.load_views(path, 7, 3, cfg)
    torch.manual_seed(99)
    torch.rand(5)
    assert np.array_equal(program.load_views(path, 7, 2, cfg), views[:3])
    others = [*views, program.load_views(path, 8, 1, cfg)[1],
              program.load_views(path, 7, 1, settings(options, "--seed", "1"))[1]]
    assert views.dtype == np.uint8 and len({image.tobytes() for image in others}) == 6


@pytest.mark.parametrize("num_views", [0, 3])
def test_view_0_is_resized_and_nothing_else(num_views, options, tmp_path):
    path = draw(tmp_path / "a.png", (90, 140, 60), 0)
    expected = v2.Resize((36, 56))(Image.open(path))
    images = program.load_views(path, 0, num_views, settings(options, "--img-size", "36", "56"))
    assert images.shape == (1 + num_views, 36, 56, 3) and np.array_equal(images[0], np.asarray(expected))


def test_a_file_is_decoded_once_for_all_its_views(options, tmp_path, monkeypatch):
    decoded, load = [], program.load_image
    monkeypatch.setattr(program, "load_image", lambda path: decoded.append(path) or load(path))
    assert len(program.load_views(draw(tmp_path / "a.png", (90, 140, 60), 0), 0, 5, settings(options))) == 6
    assert len(decoded) == 1


def test_neighbouring_seeds_and_streams_do_not_collide():
    lists = [(seed, *rest) for seed in range(12) for rest in (
        (), (0,), (0, 0), ("folds",), ("validation",), *((word, e) for word in ("view", "epoch") for e in range(12)),
        *(("view", v, i) for v in range(12) for i in range(30)))]
    seeds = {program.mix_seed(*parts) for parts in lists}
    assert len(seeds) == len(lists) and all(0 <= seed < 2**63 for seed in seeds)
    first = {torch.rand(1, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).item() for seed in seeds}
    assert len(first) == len(lists)


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
    for name, mode in (("grey.png", "L"), ("palette.png", "P"), ("cmyk.jpg", "CMYK"), ("bits.png", "1"),
                       ("grey_alpha.png", "LA"), ("lab.tif", "LAB"), ("ycc.jpg", "YCbCr")):
        picture.convert(mode).save(tmp_path / name)
    picture.save(tmp_path / "moving.gif", save_all=True, append_images=[picture.rotate(180)])
    Image.fromarray(np.full((30, 50), 30000, np.uint16)).save(tmp_path / "deep.png")
    loaded = {path.name: program.load_image(path) for path in tmp_path.iterdir()}
    assert all(image.mode == "RGB" for image in loaded.values())
    assert np.array_equal(loaded["plain.png"], pixels)
    assert np.asarray(loaded["clear.png"]).min() == 255
    assert np.array_equal(loaded["turned.png"], np.rot90(pixels, -1))
    assert np.asarray(loaded["deep.png"])[0, 0].tolist() == [117, 117, 117]
    first = Image.open(tmp_path / "moving.gif").convert("RGB")
    assert np.array_equal(loaded["moving.gif"], first)
    assert {image.size for name, image in loaded.items() if name != "turned.png"} == {(50, 30)}


@pytest.mark.parametrize("brightest", [255, 256, 4095, 4096, 65535])
def test_one_rule_for_all_deep_greys(brightest, tmp_path):
    """Whatever the brightest pixel: pictures that differ in it alone would else be 16 times as bright as each other."""
    pixels = np.full((30, 50), 200, np.uint16)
    pixels[:, :25], pixels[0, 0] = 40 * 256 + 13, brightest
    pictures = {"deep.png": Image.fromarray(pixels), "deep.tif": Image.fromarray(pixels),
                "big_endian.tif": Image.frombytes("I;16B", (50, 30), pixels.astype(">u2").tobytes())}
    for name, picture in pictures.items():
        picture.save(tmp_path / name)
        loaded = np.asarray(program.load_image(tmp_path / name))
        assert np.array_equal(loaded, (pixels // 256).astype(np.uint8)[..., None].repeat(3, 2))


@pytest.mark.parametrize("pixels", [(RAMP * 65535).astype(np.int32), RAMP.astype(np.float32)], ids=["int", "float"])
def test_pixels_of_32_bits_have_no_white_and_are_named(pixels, tmp_path):
    Image.fromarray(pixels).save(tmp_path / "deep.tif")
    with pytest.raises(program.UserError, match=r"deep\.tif: .*32 bits"):
        program.load_image(tmp_path / "deep.tif")


def test_a_broken_exif_block_costs_the_orientation_only(tmp_path, recwarn):
    path = draw(tmp_path / "a.jpg", (90, 140, 60), 0)
    blocks = b"Exif\0\0MM\0*\0\0\0\x08\0\x05\x01\x12\0\x03", b"Exif\0\0rubbish" * 9, b"Exif\0\0"
    for number, block in enumerate(blocks):
        header = b"\xff\xd8\xff\xe1" + (len(block) + 2).to_bytes(2, "big") + block
        (tmp_path / f"{number}.jpg").write_bytes(header + path.read_bytes()[2:])
        assert np.array_equal(program.load_image(tmp_path / f"{number}.jpg"), program.load_image(path))
    assert not recwarn.list


def test_a_large_image_is_a_picture_and_a_bomb_an_error(tmp_path, monkeypatch, recwarn):
    path = draw(tmp_path / "a.png", (90, 140, 60), 0)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 40 * 48 - 1)
    assert program.load_image(path).size == (48, 40) and not recwarn.list
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    with pytest.raises(program.UserError, match="DecompressionBombError"):
        program.load_image(path)
