"""Images on their way to an engine."""

import base64
import io

import numpy as np
import pytest
from PIL import Image

from budgetvlm._io import open_image
from budgetvlm.engines.payload import data_url, fresh_data_url

PIXELS = np.random.default_rng(0).integers(0, 256, (20, 30, 3), dtype=np.uint8)


def received(url):
    """Kind and contents of a file in an address."""
    head, _, data = url.partition(";base64,")
    return head, base64.b64decode(data)


def seen(url):
    return np.asarray(Image.open(io.BytesIO(received(url)[1])))


@pytest.mark.parametrize("form", ["JPEG", "PNG", "WEBP"])
def test_a_file_is_sent_as_it_is(form):
    file = io.BytesIO()
    Image.fromarray(PIXELS).save(file, form)
    assert received(data_url(open_image(file.getvalue()))) == (f"data:image/{form.lower()}", file.getvalue())


def test_a_changed_image_is_sent_as_it_looks():
    file = io.BytesIO()
    Image.fromarray(PIXELS).save(file, "JPEG")
    image = open_image(file.getvalue())
    image.paste((1, 2, 3), (0, 0, 30, 20))
    assert (seen(data_url(image)) == (1, 2, 3)).all()


@pytest.mark.parametrize("lossless", ["PNG", "BMP"])
def test_other_images_are_sent_without_loss(lossless):
    url = data_url(Image.fromarray(PIXELS), None, lossless)
    assert received(url)[0] == f"data:image/{lossless.lower()}"
    np.testing.assert_array_equal(seen(url), PIXELS)


@pytest.mark.parametrize("lossless", ["PNG", "BMP"])
def test_a_scaled_image_is_no_file_any_more(lossless):
    file = io.BytesIO()
    Image.fromarray(PIXELS).save(file, "PNG")
    assert seen(data_url(open_image(file.getvalue()), (15, 10), lossless)).shape == (10, 15, 3)


def test_a_fresh_image_differs_each_time_in_the_lowest_bits_of_a_few_pixels():
    file = io.BytesIO()
    Image.fromarray(PIXELS).save(file, "PNG")
    image = open_image(file.getvalue())
    first, second = (seen(fresh_data_url(image)) for _ in range(2))
    assert (first != second).any()
    assert np.abs(first.astype(int) - PIXELS).max() == 1 and (first != PIXELS).any(2).sum() <= 8
    np.testing.assert_array_equal(np.asarray(image), PIXELS)
