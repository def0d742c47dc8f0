"""Result files: names and layout as other tools write them, and no value taken on trust."""

import json

import pytest

from budgetvlm.errors import ConfigError, DataError, KnobSpaceError, OutputError
from budgetvlm.profiling.results.measurements import AccuracyRecord, LatencyRecord
from budgetvlm.profiling.results.reading import iter_results
from budgetvlm.profiling.results.result_files import latency_statistics, result_path, write_result

KNOBS = {"max_crops": 4, "top_k": 2, "num_active_blocks": 6}
CONFIG = {"split": "train", "max_new_tokens": 4, "world_size": 1, "versions": {"torch": "2"}}
BLOCKS = {"num_total_blocks": 8, "active_block_indices": [0, 1, 2, 3, 4, 7]}


def read_results(directory, dataset_name, kind):
    return tuple(iter_results(directory, dataset_name, kind))


def accuracy(name="a", score=1.0, **more):
    return AccuracyRecord(name, score, "blue", ("blue",), **more)


def latency(name="a", total=10.0, **more):
    values = {"num_vision_tokens": 16, "num_language_tokens": 9, "num_output_tokens": 3, "accuracy": 1.0} | more
    return LatencyRecord(name, total, 4.0, 5.0, **values)


def foreign(tmp_path, name="exp5_accuracy_results_crops4_topk2_blocks6.json", samples=None, **more):
    """A file as a tool without schema version writes it, in the directory itself."""
    samples = samples or [{"sample_id": 0, "score": 0.3, "pred": "down", "answers": ["down", "up"]}]
    document = {"summary": [dict(KNOBS)], "all_samples": samples, "config": {"dataset_name": "text_vqa"}} | more
    (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / name).write_text(json.dumps(document))
    return tmp_path / name


def foreign_latency(tmp_path, rank=0, **sample):
    values = {"sample_id": 0, "T_total_ms": 324.6, "T_prefill_ms": 91.5, "T_decode_ms": 233.1, "accuracy": 1.0}
    values |= {"num_vision_tokens": 1152, "num_language_tokens": 50, "num_output_tokens": 5} | KNOBS | sample
    values = {key: value for key, value in values.items() if value is not None}
    name = f"exp6_latency_crops4_topk2_blocks6_rank{rank}.json"
    document = {"summary": [dict(KNOBS)], "per_sample_latencies": [values], "config": {"dataset_name": "text_vqa"}}
    (tmp_path / name).write_text(json.dumps(document))
    return tmp_path / name


def test_names_and_places(tmp_path):
    assert result_path("x", "text_vqa", "accuracy", KNOBS).as_posix() == (
        "x/exp5_accuracy_text-vqa/exp5_accuracy_results_crops4_topk2_blocks6.json"
    )
    assert result_path("y", "signs", "latency", KNOBS, rank=3).as_posix() == (
        "y/exp6_latency_signs/exp6_latency_crops4_topk2_blocks6_rank3.json"
    )
    with pytest.raises(KnobSpaceError, match="given: depth=3"):
        result_path("x", "signs", "accuracy", {"depth": 3})


def test_an_accuracy_file_holds_what_readers_expect_and_comes_back(tmp_path):
    records = [accuracy("a", 1.0, num_output_tokens=3, groups={"kind": "read"}), accuracy("b", 0.5)]
    path = write_result("accuracy", tmp_path, "signs", KNOBS, records, config=CONFIG, blocks=BLOCKS)
    document = json.loads(path.read_text())
    assert document["schema_version"] == 1
    assert document["summary"] == [KNOBS | BLOCKS | {"num_samples": 2, "accuracy": 0.75, "std": 0.25}]
    assert document["all_samples"][1] == {"sample_id": "b", "score": 0.5, "pred": "blue", "answers": ["blue"]}
    assert document["config"] == {"dataset_name": "signs"} | CONFIG | KNOBS | BLOCKS
    (result,) = read_results(tmp_path, "signs", "accuracy")
    assert (result.knobs, result.records, result.paths) == (KNOBS, tuple(records), (path,))


def test_a_latency_file_holds_what_readers_expect_and_comes_back(tmp_path):
    records = [latency("a", 10.0, T_preprocess_ms=0.5, T_vision_ms=0.5), latency("b", 20.0)]
    path = write_result("latency", tmp_path, "signs", KNOBS, records, config=CONFIG, rank=0, blocks=BLOCKS)
    document = json.loads(path.read_text())
    summary = document["summary"][0]
    assert summary["latency_total_ms"] == {"mean": 15.0, "std": 5.0, "P50": 15.0, "P95": 19.5, "P99": 19.9}
    assert set(summary) >= {"accuracy", "latency_prefill_ms", "latency_decode_ms"}
    assert "latency_vision_ms" not in summary  # one sample has no such stage
    assert document["per_sample_latencies"][0].items() >= KNOBS.items()
    (result,) = read_results(tmp_path, "signs", "latency")
    assert result.records == tuple(records)


def test_statistics_by_hand():
    assert latency_statistics([1, 2, 3, 4, 5]) == {"mean": 3, "std": 2**0.5, "P50": 3, "P95": 4.8, "P99": 4.96}


@pytest.mark.parametrize(
    ("records", "config", "message"),
    [
        ([], CONFIG, "needs a sample"),
        ([accuracy(), accuracy()], CONFIG, "each only once"),
        ([accuracy()], {"split": "train"}, "missing: max_new_tokens, world_size, versions"),
    ],
)
def test_writing_what_could_not_be_read(tmp_path, records, config, message):
    with pytest.raises(ConfigError, match=message):
        write_result("accuracy", tmp_path, "signs", KNOBS, records, config=config, blocks=BLOCKS)
    assert not list(tmp_path.rglob("*.json"))


def test_nothing_half_written(tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(OutputError, match="cannot write"):
        write_result("accuracy", tmp_path / "file", "signs", KNOBS, [accuracy()], config=CONFIG, blocks=BLOCKS)


@pytest.mark.parametrize(
    "place", [".", "exp5_accuracy_text-vqa", "exp5_accuracy_text_vqa", "../results_text-vqa", "../results_text_vqa"]
)
def test_the_three_usual_places(tmp_path, place):
    root = tmp_path / "results"
    root.mkdir()
    foreign(root / place)
    (root / place / "exp5_accuracy_results.json").write_text("{}")  # names that do not match are no concern
    (root / place / ".exp5_accuracy_results_crops4_topk2_blocks6.json.x.tmp").write_text("half")
    (result,) = read_results(root, "text_vqa", "accuracy")
    assert result.records == (AccuracyRecord("0", 0.3, "down", ("down", "up")),)  # whole numbers become names


def test_results_of_another_data_set_in_the_directory_itself_do_not_hide_the_right_ones(tmp_path):
    foreign(tmp_path, config={"dataset_name": "coco_2014_vqa"})
    with pytest.raises(DataError, match=r"config.dataset_name is 'coco_2014_vqa', but results of 'text_vqa'"):
        read_results(tmp_path, "text_vqa", "accuracy")
    foreign(tmp_path / "exp5_accuracy_text-vqa")
    assert len(read_results(tmp_path, "text_vqa", "accuracy")) == 1


def test_two_places_are_one_too_many(tmp_path):
    foreign(tmp_path / "r" / "exp5_accuracy_text-vqa")
    foreign(tmp_path / "r_text-vqa")
    with pytest.raises(DataError, match="lie in several places"):
        read_results(tmp_path / "r", "text_vqa", "accuracy")


def test_nothing_there_names_the_command(tmp_path):
    with pytest.raises(
        DataError, match=r"holds no accuracy results of signs.*budgetvlm profile accuracy --dataset_name signs"
    ):
        read_results(tmp_path, "signs", "accuracy")
    with pytest.raises(DataError, match=r"does not exist.*python experiments/profiling/exp6_latency.py"):
        read_results(tmp_path / "nowhere", "signs", "latency")


def test_ranks_are_put_together(tmp_path):
    for rank in (0, 1):
        foreign_latency(tmp_path, rank, sample_id=rank)
    (result,) = read_results(tmp_path, "text_vqa", "latency")
    assert [record.sample_id for record in result.records] == ["0", "1"]
    assert result.records[0].T_vision_ms is None  # that tool does not part the vision stage


def test_ranks_that_number_their_samples_alike_are_refused(tmp_path):
    foreign_latency(tmp_path, 0)
    foreign_latency(tmp_path, 1, T_total_ms=400.0)
    with pytest.raises(DataError, match="sample 0 occurs twice with different values"):
        read_results(tmp_path, "text_vqa", "latency")


def test_a_rank_that_is_missing(tmp_path):
    foreign(tmp_path, "exp5_accuracy_results_crops4_topk2_blocks6_rank0.json", config={"world_size": 2})
    with pytest.raises(DataError, match="world_size is 2, but the files of ranks 1 are missing"):
        read_results(tmp_path, "text_vqa", "accuracy")


def test_a_merged_file_stands_for_its_ranks_only_if_it_holds_all(tmp_path):
    sample = {"sample_id": 0, "score": 1.0, "pred": "a"}
    other = sample | {"sample_id": 1}
    foreign(tmp_path, samples=[sample, other], config={"world_size": 4})
    foreign(tmp_path, "exp5_accuracy_results_crops4_topk2_blocks6_rank1.json", samples=[other])
    (result,) = read_results(tmp_path, "text_vqa", "accuracy")
    assert len(result.records) == 2
    foreign(tmp_path, samples=[sample])
    with pytest.raises(DataError, match="lacks 1 samples that the ranks' files beside it have: 1"):
        read_results(tmp_path, "text_vqa", "accuracy")


def test_knobs_come_from_wherever_they_are(tmp_path):
    for number, where in enumerate(("summary", "config", "name")):
        document = {"summary": [{}], "config": {"dataset_name": "text_vqa"}}
        if where == "summary":
            document["summary"] = [dict(KNOBS)]
        if where == "config":
            document["config"] |= KNOBS
        foreign(tmp_path / str(number), **document)
        assert read_results(tmp_path / str(number), "text_vqa", "accuracy")[0].knobs == KNOBS


def test_knobs_that_contradict_each_other(tmp_path):
    foreign(tmp_path, config={"top_k": 3})
    with pytest.raises(DataError, match="field top_k is 3 in config but 2 in summary"):
        read_results(tmp_path, "text_vqa", "accuracy")
    foreign(tmp_path, summary=[KNOBS | {"max_crops": 9}])
    with pytest.raises(DataError, match="field max_crops is 9 in summary but 4 in the file's name"):
        read_results(tmp_path, "text_vqa", "accuracy")


BAD_ACCURACY = [
    ({"score": float("nan")}, "sample 0: score is nan"),
    ({"score": 1.5}, "score is 1.5; it has to be between 0 and 1"),
    ({"score": "1"}, "score is '1', which is no finite number"),
    ({"score": None}, "missing field score"),
    ({"sample_id": None}, "field sample_id is None"),
    ({"num_output_tokens": -1}, "num_output_tokens is -1"),
]


@pytest.mark.parametrize(("change", "message"), BAD_ACCURACY)
def test_accuracy_values_that_cannot_be(tmp_path, change, message):
    path = foreign(tmp_path, samples=[{"sample_id": 0, "score": 1.0, "pred": "a"} | change])
    with pytest.raises(DataError, match=message) as caught:
        read_results(tmp_path, "text_vqa", "accuracy")
    assert str(path) in str(caught.value)


BAD_LATENCY = [
    ({"T_total_ms": -3.0}, "sample 0: T_total_ms is -3.0; it has to be above 0"),
    ({"T_total_ms": 0}, "T_total_ms is 0; it has to be above 0"),
    ({"T_prefill_ms": float("inf")}, "T_prefill_ms is inf"),
    ({"T_decode_ms": None}, "missing field T_decode_ms"),
    ({"num_vision_tokens": 1.5}, "num_vision_tokens is 1.5"),
    ({"T_vision_ms": -1}, "T_vision_ms is -1; it has to be 0 or more"),
]


@pytest.mark.parametrize(("change", "message"), BAD_LATENCY)
def test_latency_values_that_cannot_be(tmp_path, change, message):
    path = foreign_latency(tmp_path, **change)
    with pytest.raises(DataError, match=message) as caught:
        read_results(tmp_path, "text_vqa", "latency")
    assert str(path) in str(caught.value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"summary": [{"num_samples": 7}]}, "truncated: field summary.num_samples is 7, but all_samples holds 1"),
        ({"all_samples": []}, "field all_samples has to be a list"),
        ({"all_samples": [3]}, "a sample has to be an object"),
        ({"summary": []}, "field summary has to be a list of one"),
        ({"config": []}, "field config has to be an object"),
        ({"schema_version": 2}, "field schema_version is 2"),
    ],
)
def test_documents_of_another_shape(tmp_path, change, message):
    foreign(tmp_path, **change)
    with pytest.raises(DataError, match=message):
        read_results(tmp_path, "text_vqa", "accuracy")


def test_truncated_and_foreign_files(tmp_path):
    path = foreign(tmp_path)
    path.write_text(path.read_text()[:-20])
    with pytest.raises(DataError, match="is not valid JSON"):
        read_results(tmp_path, "text_vqa", "accuracy")
    path.write_text("[1, 2]")
    with pytest.raises(DataError, match="not a result file"):
        read_results(tmp_path, "text_vqa", "accuracy")
    path.write_text('{"per_sample_latencies": []}')
    with pytest.raises(DataError, match="missing field all_samples"):
        read_results(tmp_path, "text_vqa", "accuracy")


def test_a_model_may_lack_a_knob(tmp_path):
    """A dense model has no top_k: neither names nor contents of its files speak of it."""
    knobs = {"max_crops": 4, "num_active_blocks": 6}
    path = write_result("accuracy", tmp_path, "text_vqa", knobs, [accuracy()], config=CONFIG, blocks=BLOCKS)
    assert path.name == "exp5_accuracy_results_crops4_blocks6.json"
    assert read_results(tmp_path, "text_vqa", "accuracy")[0].knobs == knobs
    with pytest.raises(KnobSpaceError, match="given: none"):
        result_path(tmp_path, "text_vqa", "accuracy", {})
