"""Features: alignment by sample, a round trip over the disk, and files that cannot be used."""

import numpy as np
import pytest
from safetensors.numpy import save_file

from budgetvlm.errors import DataError, OutputError
from budgetvlm.features import Features


def make_features():
    return Features(("a", "b", "c"), np.arange(6).reshape(3, 2), np.arange(9).reshape(3, 3), {"model": "toy"})


def test_features_survive_the_disk(tmp_path):
    make_features().save(tmp_path / "f.safetensors")
    loaded = Features.load(tmp_path / "f.safetensors")
    assert (loaded.sample_ids, loaded.metadata) == (("a", "b", "c"), {"model": "toy"})
    assert loaded.image.dtype == loaded.language.dtype == np.float32
    np.testing.assert_array_equal(loaded.image, [[0, 1], [2, 3], [4, 5]])
    np.testing.assert_array_equal(loaded.language[2], [6, 7, 8])


def test_rows_follow_their_samples():
    aligned = make_features().aligned(["c", "a"])
    assert aligned.sample_ids == ("c", "a")
    np.testing.assert_array_equal(aligned.image, [[4, 5], [0, 1]])
    np.testing.assert_array_equal(aligned.language, [[6, 7, 8], [0, 1, 2]])


def test_samples_without_features_are_named():
    with pytest.raises(DataError, match="2 of 3 samples have no features: x, y"):
        make_features().aligned(["y", "a", "x"])


@pytest.mark.parametrize(
    ("ids", "image", "message"),
    [
        (("a", "a"), np.ones((2, 2)), "occur more than once"),
        (("a", "b"), np.ones((3, 2)), r"image has shape \(3, 2\)"),
        (("a", "b"), np.ones(2), r"image has shape \(2,\)"),
        (("a", "b"), [[1, 2], [np.nan, 1]], "image of sample b is not finite"),
        (("a", "b"), [["x", 2], [1, 1]], "image features are not an array of numbers"),
        ((), np.ones((0, 2)), "no samples"),
    ],
)
def test_what_cannot_be_is_refused(ids, image, message):
    with pytest.raises(DataError, match=message):
        Features(ids, image, np.ones((len(ids), 2)))


def test_files_that_are_no_features(tmp_path):
    path = tmp_path / "f.safetensors"
    with pytest.raises(DataError, match="does not exist"):
        Features.load(path)
    save_file({"image": np.ones((1, 1), np.float32)}, path)
    with pytest.raises(DataError, match="holds no features"):
        Features.load(path)
    make_features().save(path)
    path.write_bytes(path.read_bytes()[:-4])
    with pytest.raises(DataError, match="truncated"):
        Features.load(path)


def test_nothing_half_written(tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(OutputError, match="cannot write"):
        make_features().save(tmp_path / "file" / "f.safetensors")
    assert (tmp_path / "file").read_text() == "in the way"


def test_numbers_of_another_kind_are_refused(tmp_path):
    made = make_features()
    made.save(tmp_path / "f.safetensors")
    content = (tmp_path / "f.safetensors").read_bytes()
    (tmp_path / "f.safetensors").write_bytes(content.replace(b'"dtype":"F32"', b'"dtype":"I32"'))
    with pytest.raises(DataError, match="holds I32 numbers as image, not float32"):
        Features.load(tmp_path / "f.safetensors")
