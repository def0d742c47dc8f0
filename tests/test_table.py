"""The profile table: what it refuses, that it survives the disk, and that splits never share an image."""

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from budgetvlm._io import first_few
from budgetvlm.errors import ConfigError, DataError, OutputError
from budgetvlm.knobs import KnobSpace
from budgetvlm.table import ProfileTable, draw_splits

SPACE = KnobSpace({"resolution": [1, 2], "depth": [4, 8, 16]})


def make_table(samples=10, **changes):
    rng = np.random.default_rng(0)
    arguments = {
        "accuracy": rng.random((samples, 6)),
        "latency_ms": rng.random((samples, 6)) + 1,
        "stages_ms": {"decode": rng.random((samples, 6))},
        "tokens": {"output": rng.integers(1, 5, (samples, 6))},
        "groups": {"image_id": [row // 2 for row in range(samples)], "kind": ["read"] * samples},
        "metadata": {"made": "by hand"},
    } | changes
    return ProfileTable.from_arrays(SPACE, range(samples), **arguments)


def with_entry(value):
    values = np.full((10, 6), 0.5)
    values[3, 2] = value
    return values


def test_a_table_survives_the_disk(tmp_path):
    latency = with_entry(np.nan)
    table = make_table(latency_ms=latency).with_splits({"train": 0.6, "validation": 0.4})
    table.save(tmp_path / "t.parquet")
    loaded = ProfileTable.load(tmp_path / "t.parquet")
    assert loaded.knob_space == SPACE
    assert loaded.sample_ids == tuple("0123456789")
    np.testing.assert_array_equal(loaded.accuracy, table.accuracy)
    np.testing.assert_array_equal(loaded.latency_ms, latency.astype(np.float32))
    np.testing.assert_array_equal(loaded.stages_ms["decode"], table.stages_ms["decode"])
    np.testing.assert_array_equal(loaded.tokens["output"], table.tokens["output"])
    assert (loaded.groups, loaded.split, loaded.metadata) == (table.groups, table.split, {"made": "by hand"})
    assert loaded.accuracy.flags.writeable  # a reader may hand it to torch.from_numpy


def test_columns_are_the_settings_in_order():
    table = make_table(accuracy=np.tile(np.arange(6) / 10, (10, 1)))
    assert table.accuracy[0, SPACE.index({"resolution": 2, "depth": 4})] == pytest.approx(0.3)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"accuracy": with_entry(1.5)}, r"accuracy\[3, 2\] is 1.5; it has to be between 0 and 1"),
        ({"accuracy": with_entry(-0.1)}, r"accuracy\[3, 2\]"),
        ({"latency_ms": with_entry(0.0)}, r"latency_ms\[3, 2\] is 0.0; it has to be above 0"),
        ({"latency_ms": with_entry(np.inf)}, r"latency_ms\[3, 2\] is inf"),
        ({"stages_ms": {"decode": with_entry(-1.0)}}, r"stage decode\[3, 2\] is -1.0"),
        ({"tokens": {"output": with_entry(-1.0)}}, r"tokens output\[3, 2\] is -1.0"),
        ({"accuracy": np.zeros((10, 5))}, r"accuracy has shape \(10, 5\); 10 samples x 6 settings need \(10, 6\)"),
        ({"accuracy": [["a"]]}, "accuracy is not an array of numbers"),
        ({"groups": {"kind": ["read"]}}, "group 'kind' has 1 labels for 10 samples"),
        ({"split": ["train"] * 9 + ["dev"]}, "unknown splits dev"),
        ({"split": ["train"] + ["test"] * 9}, "splits share 1 images \\(0\\); draw splits by image"),
    ],
)
def test_what_cannot_be_is_refused(changes, message):
    with pytest.raises(DataError, match=message):
        make_table(**changes)


def test_all_problems_are_named_at_once():
    with pytest.raises(DataError, match=r"occur more than once: 1.*accuracy has shape"):
        ProfileTable.from_arrays(SPACE, [1, 1], np.zeros((1, 6)), np.ones((2, 6)))


def test_subsets():
    split = ["train"] * 6 + ["test"] * 4
    table = make_table(split=split)
    assert table.subset("test").sample_ids == ("6", "7", "8", "9")
    assert table.subset(np.arange(10) > 7).sample_ids == ("8", "9")
    by_row = table.subset([4, 0])
    assert by_row.sample_ids == ("4", "0")
    assert by_row.groups["image_id"] == ("2", "0")
    np.testing.assert_array_equal(by_row.stages_ms["decode"], table.stages_ms["decode"][[4, 0]])
    np.testing.assert_array_equal(by_row.tokens["output"], table.tokens["output"][[4, 0]])


@pytest.mark.parametrize(
    ("which", "message"),
    [
        ("validation", "split 'validation' is empty; this table has: train"),
        (np.ones(9, dtype=bool), r"mask of shape \(9,\)"),
        ([10], "go beyond the 10 samples"),
        ([], "a subset needs"),
    ],
)
def test_subsets_that_do_not_exist(which, message):
    with pytest.raises(DataError, match=message):
        make_table(split=["train"] * 10).subset(which)


def test_no_split_is_invented():
    with pytest.raises(DataError, match="stores no splits"):
        make_table().subset("train")


@given(
    images=st.lists(st.integers(0, 12), min_size=20, max_size=60),
    seed=st.integers(0, 5),
)
@settings(max_examples=30, deadline=None)
def test_splits_never_share_an_image(images, seed):
    count = len(images)
    table = make_table(count, groups={"image_id": images})
    if len(set(images)) < 8:
        return
    split = np.array(table.with_splits({"train": 0.5, "validation": 0.25, "test": 0.25}, seed).split)
    sides = [set(np.array(images)[split == name]) for name in ("train", "validation", "test")]
    assert all(sides)
    assert sum(map(len, sides)) == len(set(images))


def test_splits_have_their_shares_and_follow_the_seed():
    names = [str(number) for number in range(1000)]
    fractions = {"train": 0.8, "validation": 0.2}
    sides = draw_splits(names, fractions, seed=1)
    assert sum(side == "train" for side in sides.values()) == 800
    assert sides == draw_splits(names[::-1], fractions, seed=1)  # the order of the samples does not matter
    assert sides != draw_splits(names, fractions, seed=2)


@pytest.mark.parametrize(
    ("fractions", "message"),
    [
        ({"train": 0.8}, "sum to 1"),
        ({"train": 0.5, "dev": 0.5}, "sum to 1"),
        ({"train": 1.2, "test": -0.2}, "sum to 1"),
        ({"train": 0.99, "validation": 0.01}, "leaves split 'validation' empty: there are 5 images"),
    ],
)
def test_shares_that_cannot_work(fractions, message):
    with pytest.raises(ConfigError, match=message):
        make_table().with_splits(fractions)


def test_splits_by_another_label():
    assert set(make_table(groups={"book": list("aabbccddee")}).with_splits({"train": 1.0}, by="book").split) == {
        "train"
    }
    with pytest.raises(DataError, match="cannot be grouped by 'shelf': the labels are image_id, kind"):
        make_table().with_splits({"train": 1.0}, by="shelf")


def test_what_samples_are_grouped_by_travels_with_the_table(tmp_path):
    books = list("aabbccddee")
    table = make_table(groups={"book": books, "image_id": range(10)}).grouped_by("book")
    table = table.with_splits({"train": 0.6, "test": 0.4}, seed=3)
    table.save(tmp_path / "t.parquet")
    loaded = ProfileTable.load(tmp_path / "t.parquet")
    assert (loaded.unit, loaded.unit_name, loaded.units) == ("book", "book", tuple(books))
    assert {book: set(np.array(loaded.split)[np.array(books) == book]) for book in books}.keys() == set(books)
    assert all(len(set(np.array(loaded.split)[np.array(books) == book])) == 1 for book in books)
    assert loaded.subset("test").unit == "book" and loaded.with_splits({"train": 1.0}).unit == "book"


@pytest.mark.parametrize(
    ("groups", "label", "name", "units"),
    [
        ({"image_id": list("aabbccddee")}, None, "image", "aabbccddee"),
        ({"book": list("aabbccddee")}, None, "sample", "0123456789"),
        ({"image_id": list("aabbccddee")}, "sample_id", "sample", "0123456789"),
    ],
)
def test_the_unit_is_the_image_unless_another_is_named(groups, label, name, units):
    table = make_table(groups=groups)
    table = table.grouped_by(label) if label else table
    assert (table.unit_name, "".join(table.units)) == (name, units)


def test_splits_that_part_a_group_are_refused_in_words():
    table = make_table(groups={"book": list("aabbccddee")}, split=["train"] * 5 + ["test"] * 5)
    with pytest.raises(DataError, match=r"splits share 1 books \(c\); draw splits by book"):
        table.grouped_by("book")


@pytest.mark.parametrize(("groups", "held_out"), [(9, 0.0), (10, 0.2)])
def test_a_fifth_is_held_out_where_there_are_ten_groups(groups, held_out):
    table = make_table(20, groups={"image_id": [row % groups for row in range(20)]})
    rest = 1 - held_out
    expected = {"train": 0.8 * rest, "validation": 0.2 * rest, "test": held_out}
    assert table.shares_of_splits(0.8) == pytest.approx(expected)
    assert table.shares_of_splits(0.8, 0.5)["test"] == 0.5


def test_fewer_groups_than_splits_are_refused_in_words():
    table = make_table(groups={"book": list("aaaaabbbbb")})
    with pytest.raises(ConfigError, match="there are 2 images \\(or other groups\\) to share out"):
        table.with_splits({"train": 0.4, "validation": 0.3, "test": 0.3}, by="book")


def test_files_that_are_no_table(tmp_path):
    path = tmp_path / "t.parquet"
    with pytest.raises(DataError, match="does not exist"):
        ProfileTable.load(path)
    path.write_bytes(b"PAR1 not really")
    with pytest.raises(DataError, match="not a Parquet file, or truncated"):
        ProfileTable.load(path)
    pq.write_table(pa.table({"a": [1]}), path)
    with pytest.raises(DataError, match="no profile table"):
        ProfileTable.load(path)
    make_table().save(path)
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(DataError, match="truncated"):
        ProfileTable.load(path)


def test_a_table_of_another_schema_version(tmp_path):
    make_table().save(tmp_path / "t.parquet")
    arrow = pq.read_table(tmp_path / "t.parquet")
    header = arrow.schema.metadata[b"budgetvlm.profile_table"].replace(b'"schema_version": 1', b'"schema_version": 9')
    pq.write_table(arrow.replace_schema_metadata({b"budgetvlm.profile_table": header}), tmp_path / "t.parquet")
    with pytest.raises(DataError, match="schema version 9"):
        ProfileTable.load(tmp_path / "t.parquet")


def test_nothing_half_written(tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(OutputError, match="cannot write"):
        make_table().save(tmp_path / "file" / "t.parquet")
    with pytest.raises(DataError, match="cannot be stored as JSON"):
        make_table(metadata={"a": float("nan")}).save(tmp_path / "t.parquet")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_first_few():
    assert first_few("cab") == "a, b, c"
    assert first_few("abcdef", limit=2) == "a, b and 4 more"


def test_thinned_rows_are_spread_over_the_table():
    table = make_table(10)
    assert table.thinned(10) is table
    assert table.thinned(4).sample_ids == tuple(table.sample_ids[i] for i in (0, 3, 6, 9))
