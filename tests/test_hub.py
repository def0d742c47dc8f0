"""Data sets on the hub: read through the library, and what is said when they cannot be."""

import json
import sys
import types

import pytest
from small_data_sets import ROWS, write_parquet

from budgetvlm.errors import ConfigError, DataError
from budgetvlm.tasks import TaskOptions, load_task
from budgetvlm.tasks.hub import HubSource
from budgetvlm.tasks.layouts import LAYOUTS


@pytest.fixture
def cache(monkeypatch, tmp_path):
    """The real library, with a cache of its own."""
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    datasets.disable_progress_bars()
    return datasets


@pytest.mark.parametrize("name", ["coco_2014_vqa", "doc_qa", "chart_qa", "tally_qa", "mmmu"])
def test_a_repository_is_read_like_its_files(cache, tmp_path, name):
    layout = LAYOUTS[name]
    split, theirs = next(iter(layout.splits.items()))
    path = write_parquet(tmp_path / "repo" / layout.folder / f"{theirs}-00000-of-00001.parquet", ROWS[name])
    _declare_images(path)
    hub = load_task(TaskOptions(name, repository=str(tmp_path / "repo")))
    local = load_task(TaskOptions(name, data_files=f"{split}={path}"))
    ours, wanted = list(hub.samples(split)), list(local.samples(split))
    shown = [(s.sample_id, s.image_id, s.question, s.answers, s.options, s.groups) for s in ours]
    assert shown == [(s.sample_id, s.image_id, s.question, s.answers, s.options, s.groups) for s in wanted]
    assert [s.load_image().tobytes() for s in ours] == [s.load_image().tobytes() for s in wanted]
    assert [s.sample_id for s in hub.samples(split, 1, 5)] == [s.sample_id for s in local.samples(split, 1, 5)]


def _declare_images(path):
    """Say in the file which columns are images, as the hub's files do."""
    import pyarrow.parquet as pq

    table = pq.read_table(path)
    features = {}
    for field in table.schema:
        features[field.name] = (
            {"_type": "Image"} if field.name.startswith("image") and "struct" in str(field.type) else None
        )
    if None in features.values():
        from datasets import Features

        inferred = Features.from_arrow_schema(table.schema).to_dict()
        features = {name: feature or inferred[name] for name, feature in features.items()}
    info = {"huggingface": json.dumps({"info": {"features": features}})}
    pq.write_table(table.replace_schema_metadata(info), path)


def test_only_the_files_of_the_split_are_needed(cache, tmp_path):
    folder = tmp_path / "repo/data"
    write_parquet(folder / "test-0.parquet", ROWS["chart_qa"])
    (folder / "train-0.parquet").write_text("not to be read")
    task = load_task(TaskOptions("chart_qa", repository=str(tmp_path / "repo")))
    assert task.num_samples("test") == 4


def test_without_a_network_or_a_repository_it_says_what_to_do(cache, tmp_path):
    with pytest.raises(DataError, match=r"lmms-lab-encoder/textvqa is not in the cache and the hub cannot be reached"):
        load_task("text_vqa").num_samples("validation")  # the tests run with HF_HUB_OFFLINE=1
    (tmp_path / "repo").mkdir()
    with pytest.raises(DataError, match=r"has no files data/validation-\*.*--repository.*--data_files"):
        load_task(TaskOptions("text_vqa", repository=str(tmp_path / "repo"))).num_samples("validation")


def test_a_missing_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ConfigError, match=r"pip install -e '.\[data\]'\), or give files .* --data_files"):
        load_task("pope").num_samples("test")


class GatedError(Exception):
    pass


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (GatedError("Dataset 'a/b' is a gated dataset on the Hub."), "is gated: ask for access.*hf auth login"),
        (ConnectionError("Couldn't reach 'a/b' on the Hub"), "cannot be reached.*HF_HUB_OFFLINE"),
        (
            FileNotFoundError("Dataset 'a/b' doesn't exist on the Hub or cannot be accessed."),
            "does not exist on the hub",
        ),
        (OSError("[Errno 28] No space left on device"), "cannot be loaded .*No space left.*Try again"),
    ],
)
def test_what_the_library_says_is_told_with_what_to_do(monkeypatch, error, message):
    def load_dataset(*args, **options):
        raise error

    monkeypatch.setitem(sys.modules, "datasets", types.SimpleNamespace(load_dataset=load_dataset))
    with pytest.raises(DataError, match=message):
        HubSource("a/b", "test")
