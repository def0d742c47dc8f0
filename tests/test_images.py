"""Images: one decoding for all commands and families. Known answers by mode, by file format and by way of arrival."""

import io

import numpy as np
import pytest
from PIL import Image, ImageDraw

from budgetvlm._io import file_of, open_image, to_rgb
from budgetvlm.errors import InputError

INK, GROUND = (255 // 5, 0, 0), (255, 255, 255)
RAMP = np.tile(np.linspace(0, 1, 256), (4, 1))


def contents(image, form="PNG", **how):
    file = io.BytesIO()
    image.save(file, form, **how)
    return file.getvalue()


def ways(image, form="PNG", **how):
    """The same picture as bytes, as an opened file, and as a copy of one."""
    data = contents(image, form, **how)
    opened = Image.open(io.BytesIO(data))
    return [open_image(data), open_image(Image.open(io.BytesIO(data))), to_rgb(opened.copy())]


def transparent(mode):
    image = Image.new("RGBA", (40, 20), (0, 0, 0, 0))
    ImageDraw.Draw(image).rectangle((8, 4, 20, 12), fill=(*INK, 255))
    return image.convert(mode)


@pytest.mark.parametrize(("mode", "form"), [("RGBA", "PNG"), ("LA", "PNG"), ("RGBA", "WEBP"), ("RGBA", "TIFF")])
def test_a_transparent_ground_is_white(mode, form):
    for image in ways(transparent(mode), form, **({"lossless": True} if form == "WEBP" else {})):
        assert image.mode == "RGB" and image.getpixel((0, 0)) == GROUND
        assert image.getpixel((10, 8)) == (INK if mode == "RGBA" else (15, 15, 15))


@pytest.mark.parametrize(("mode", "clear"), [("P", 0), ("L", 0), ("RGB", (0, 0, 0)), ("1", 0), ("I;16", 0)])
def test_one_colour_that_stands_for_nothing_is_white(mode, clear):
    image = Image.new(mode, (40, 20), 0)
    if mode == "P":
        image.putpalette([0] * 768)
    image.paste({"P": 1, "L": 51, "RGB": INK, "1": 1, "I;16": 51 * 257}[mode], (8, 4, 20, 12))
    inside = {"P": (0, 0, 0), "L": (51,) * 3, "RGB": INK, "1": GROUND, "I;16": (51,) * 3}[mode]
    for arrived in ways(image, transparency=clear):
        assert (arrived.getpixel((0, 0)), arrived.getpixel((10, 8))) == (GROUND, inside)


def test_half_transparent_ink_is_mixed_with_white():
    assert to_rgb(Image.new("RGBA", (2, 2), (0, 0, 0, 51))).getpixel((0, 0)) == (204, 204, 204)


@pytest.mark.parametrize(
    ("values", "form"),
    [
        ((RAMP * 65535).astype(np.uint16), "PNG"),
        ((RAMP * 65535).astype(np.uint16), "TIFF"),
        ((RAMP * 65535).astype(">u2"), "TIFF"),
        ((RAMP * 4095).astype(np.uint16), "PNG"),
        ((RAMP * 255).astype(np.int32), "TIFF"),
        ((RAMP * 65535).astype(np.int32), "TIFF"),
        ((RAMP * (2**31 - 1)).astype(np.int32), "TIFF"),
        ((RAMP * 2000 - 1000).astype(np.int32), "TIFF"),
        (RAMP.astype(np.float32), "TIFF"),
        ((RAMP * 255).astype(np.float32), "TIFF"),
        ((RAMP * 65535).astype(np.float32), "TIFF"),
    ],
)
def test_deep_greys_keep_their_shades(values, form):
    for image in [*ways(Image.fromarray(values), form), to_rgb(Image.fromarray(values))]:
        assert np.abs(np.asarray(image)[..., 0] - RAMP * 255).max() <= 1.01
        assert image.mode == "RGB"


@pytest.mark.parametrize("mode", ["I;16", "I"])
def test_a_deep_grey_is_as_bright_as_its_twin_of_eight_bits(mode):
    eight = np.random.default_rng(0).integers(20, 230, (6, 7)).astype(np.uint8)
    deep = Image.fromarray(eight.astype(np.uint16 if mode == "I;16" else np.int32) * 257)
    assert np.array_equal(np.asarray(to_rgb(deep))[..., 0], eight)


def test_values_that_are_no_numbers_are_no_shades():
    with pytest.raises(InputError, match="no numbers"):
        to_rgb(Image.fromarray(np.array([[0.5, np.nan]], dtype=np.float32)))


@pytest.mark.parametrize("mode", ["1", "L", "P", "CMYK", "YCbCr", "HSV", "RGBX"])
def test_other_modes_keep_their_colours(mode):
    picture = Image.new("RGB", (20, 10), (255, 255, 255))
    picture.paste((0, 0, 0), (0, 0, 10, 10))
    image = to_rgb(picture.convert(mode))
    assert (image.mode, image.getpixel((3, 3)), image.getpixel((15, 3))) == ("RGB", (0, 0, 0), (255, 255, 255))


def corners(image):
    return [np.argmax(image.getpixel(at)) for at in ((2, 2), (image.width - 3, 2))]


@pytest.mark.parametrize("tag", range(1, 9))
@pytest.mark.parametrize("form", ["JPEG", "PNG", "TIFF", "WEBP"])
def test_a_photograph_is_upright_in_every_way_it_can_arrive(tag, form, tmp_path):
    """Red at the upper left and blue at the upper right, once it is turned as its tag says."""
    shown = Image.new("RGB", (48, 32), "lime")
    shown.paste("red", (0, 0, 16, 16))
    shown.paste("blue", (32, 0, 48, 16))
    undo = {2: 0, 3: 3, 4: 1, 5: 5, 6: 2, 7: 6, 8: 4}
    stored = shown.transpose(Image.Transpose(undo[tag])) if tag > 1 else shown
    exif = Image.Exif()
    exif[274] = tag
    path = tmp_path / f"photo.{form.lower()}"
    stored.save(path, form, exif=exif)
    arrivals = [open_image(path), open_image(path.read_bytes()), open_image(Image.open(path))]
    arrivals += [to_rgb(Image.open(path).convert("RGB")), to_rgb(Image.open(path).copy())]
    for image in arrivals:
        assert image.size == (48, 32) and corners(image) == [0, 2]
        assert to_rgb(image) is image  # not turned twice


def test_of_two_pages_none_is_taken_in_silence(tmp_path):
    pages = [Image.new("L", (8, 8), shade) for shade in (10, 200)]
    for form in ("TIFF", "GIF", "PNG", "WEBP"):
        data = contents(pages[0], form, save_all=True, append_images=pages[1:])
        with pytest.raises(InputError, match="2 pages or frames"):
            open_image(data)
        with pytest.raises(InputError, match="2 pages or frames"):
            open_image(Image.open(io.BytesIO(data)))
    chosen = Image.open(io.BytesIO(contents(pages[0], "TIFF", save_all=True, append_images=pages[1:])))
    chosen.seek(1)
    assert open_image(chosen).getpixel((0, 0)) == (200, 200, 200)


def test_a_long_name_stays_out_of_the_message():
    with pytest.raises(InputError) as caught:
        open_image("x" * 5000)
    assert len(str(caught.value)) < 300


@pytest.mark.parametrize("form", ["JPEG", "PNG", "WEBP"])
def test_an_image_knows_the_file_that_it_was_opened_from(form, tmp_path):
    data = contents(Image.new("RGB", (8, 6), INK), form)
    (tmp_path / "image").write_bytes(data)
    for given in (data, tmp_path / "image", str(tmp_path / "image")):
        assert file_of(open_image(given)) == (form, data)


@pytest.mark.parametrize(
    "change",
    [
        lambda image: image.putpixel((1, 1), (9, 9, 9)),
        lambda image: image.paste((9, 9, 9), (0, 0, 2, 2)),
        lambda image: ImageDraw.Draw(image).point((1, 1), fill=(9, 9, 9)),
    ],
)
def test_a_changed_image_has_no_file_any_more(change):
    image = open_image(contents(Image.new("RGB", (8, 6), INK)))
    change(image)
    assert image.getpixel((1, 1)) == (9, 9, 9) and file_of(image) is None


def test_an_image_that_its_file_shows_otherwise_has_none():
    exif = Image.Exif()
    exif[0x112] = 6
    turned = contents(Image.new("RGB", (8, 6), INK), "JPEG", exif=exif)
    others = Image.new("RGBA", (8, 6)), Image.new("L", (8, 6)), Image.new("P", (8, 6))
    assert [file_of(open_image(data)) for data in (turned, *map(contents, others))] == [None] * 4
    for made in (open_image(contents(Image.new("RGB", (8, 6)))).resize((4, 3)), Image.new("RGB", (8, 6))):
        assert file_of(made) is None
