"""Trees of the public prototype's layout: samples numbered by batch and by rank, ranks side by side or in one file.

Its accuracy tool numbers the samples of each batch from 0, goes on to the end of a batch and chooses the batch's size
anew for each setting; its latency tool numbers those of each rank and leaves out a sample that failed. Rank r of W
runs the samples r, r + W, r + 2W, ... of the split and starts at the first sample again to be as long as the others.
"""

import json
from itertools import chain

import numpy as np
import pytest

from budgetvlm.errors import DataError
from budgetvlm.profiling.prepare.prepared_data import load_prepared
from budgetvlm.profiling.prepare.task_samples import find_samples_by_index
from budgetvlm.profiling.results.reading import iter_results
from budgetvlm.tasks import load_task

KNOBS = {"max_crops": [1, 12], "top_k": [2, 12], "num_active_blocks": [4, 8]}
SETTINGS = [(c, t, b) for c in KNOBS["max_crops"] for t in KNOBS["top_k"] for b in KNOBS["num_active_blocks"]]
RANKS = 3


def list_results(directory, dataset_name, kind):
    return tuple(iter_results(directory, dataset_name, kind))


def score(index, setting):
    """What the made-up model scores: no two samples alike."""
    return round((index * 37 % 101) / 101 * (1 if setting == SETTINGS[-1] else 0.5), 4)


def total_ms(index, setting):
    return 10.0 + index % 7 + 5 * SETTINGS.index(setting)


def indices(rank, count, size, ranks=RANKS):
    """What `DistributedSampler(shuffle=False)` gives to one rank, the first ``count`` of it."""
    padded = [*range(size), *range(-size % ranks)]
    return padded[rank::ranks][:count]


def document(key, samples, setting, split, ranks, **more):
    knobs = dict(zip(KNOBS, setting, strict=True))
    config = {"dataset_name": "signs", "split": split, "max_new_tokens": 16, "world_size": ranks} | knobs | more
    return {"summary": [knobs | {"num_samples": len(samples)}], key: samples, "config": config}


def accuracy_samples(rank, count, batch, setting, size, ranks=RANKS):
    return [
        {"sample_id": place % batch, "score": score(index, setting), "pred": "x", "answers": ["y"], "metadata": {}}
        for place, index in enumerate(indices(rank, count, size, ranks))
    ]


def latency_samples(rank, count, setting, size, failed=(), ranks=RANKS):
    return [
        dict(zip(KNOBS, setting, strict=True))
        | {"sample_id": place, "T_total_ms": total_ms(index, setting), "T_prefill_ms": 4.0, "T_decode_ms": 3.0,
           "num_vision_tokens": 144, "num_language_tokens": 20, "num_output_tokens": 2, "num_total_tokens": 164,
           "accuracy": score(index, setting)}
        for place, index in enumerate(indices(rank, count, size, ranks)) if index not in failed
    ]  # fmt: skip


def write_tree(root, split, size, count, timed, failed=(), merged=False):
    """exp5 and exp6 of all settings; ``count`` and ``timed`` samples of each rank."""
    for name in ("exp5_accuracy_signs", "exp6_latency_signs"):
        (root / name).mkdir(parents=True, exist_ok=True)
    for number, setting in enumerate(SETTINGS):
        batch = 7 + number % 3
        whole = -(-count // batch) * batch
        tail = "_crops{}_topk{}_blocks{}".format(*setting)
        accuracy = [accuracy_samples(rank, whole, batch, setting, size) for rank in range(RANKS)]
        latency = [latency_samples(rank, timed, setting, size, failed if number == 1 else ()) for rank in range(RANKS)]
        for stem, key, ranks in (
            ("exp5_accuracy_signs/exp5_accuracy_results", "all_samples", accuracy),
            ("exp6_latency_signs/exp6_latency", "per_sample_latencies", latency),
        ):
            parts = (
                {"": list(chain.from_iterable(ranks))}
                if merged
                else {f"_rank{rank}": part for rank, part in enumerate(ranks)}
            )
            for suffix, samples in parts.items():
                text = json.dumps(document(key, samples, setting, split, RANKS), indent=2)
                (root / f"{stem}{tail}{suffix}.json").write_text(text)
    (root / "exp5_accuracy_signs" / "exp5_accuracy_results.json").write_text('{"summary": [], "all_samples": []}')
    return root


@pytest.mark.parametrize("merged", [False, True])
def test_numbers_of_batches_and_ranks_become_the_index_in_the_split(tmp_path, merged):
    write_tree(tmp_path, "train", size=100, count=20, timed=9, failed=(4, 13), merged=merged)
    for result in list_results(tmp_path / "exp5_accuracy", "signs", "accuracy"):
        setting = tuple(result.knobs.values())
        assert result.indexed
        assert {int(r.sample_id): r.score for r in result.records} == {
            index: score(index, setting) for index in range(len(result.records))
        }
    for number, result in enumerate(list_results(tmp_path / "exp6_latency", "signs", "latency")):
        setting = tuple(result.knobs.values())
        expected = set(range(27)) - ({4, 13} if number == 1 else set())
        assert {int(r.sample_id): r.T_total_ms for r in result.records} == {
            index: total_ms(index, setting) for index in expected
        }


def test_a_merged_file_and_the_first_ranks_agree(tmp_path):
    write_tree(tmp_path, "train", size=100, count=20, timed=9, merged=True)
    write_tree(tmp_path / "ranks", "train", size=100, count=20, timed=9)
    name = "exp5_accuracy_signs/exp5_accuracy_results_crops1_topk2_blocks4"
    (tmp_path / f"{name}_rank0.json").write_text((tmp_path / "ranks" / f"{name}_rank0.json").read_text())
    first = list_results(tmp_path / "exp5_accuracy", "signs", "accuracy")[0]
    assert len(first.paths) == 2 and len(first.records) == 63


def test_samples_numbered_through_all_ranks_are_left_as_they_are(tmp_path):
    """Also where the last rank took the first sample once more, to be as long as the others."""
    folder = tmp_path / "exp5_accuracy_signs"
    folder.mkdir()
    for rank in range(RANKS):
        samples = [{"sample_id": i, "score": score(i, SETTINGS[0]), "pred": "x"} for i in indices(rank, 9, 26)]
        text = json.dumps(document("all_samples", samples, SETTINGS[0], "train", RANKS))
        (folder / f"exp5_accuracy_results_crops1_topk2_blocks4_rank{rank}.json").write_text(text)
    (result,) = list_results(tmp_path, "signs", "accuracy")
    assert {int(r.sample_id): r.score for r in result.records} == {i: score(i, SETTINGS[0]) for i in range(26)}


def test_a_sample_that_occurs_twice_by_mistake_is_not_taken_for_another(tmp_path):
    folder = tmp_path / "exp5_accuracy_signs"
    folder.mkdir()
    path = folder / "exp5_accuracy_results_crops1_topk2_blocks4.json"
    samples = [{"sample_id": n, "score": 0.5, "pred": "x"} for n in (0, 1, 2, 2, 3)]
    path.write_text(json.dumps(document("all_samples", samples, SETTINGS[0], "train", 1)))
    (result,) = list_results(tmp_path, "signs", "accuracy")
    assert [r.sample_id for r in result.records] == ["0", "1", "2", "3"]
    samples[3]["score"] = 0.1
    path.write_text(json.dumps(document("all_samples", samples, SETTINGS[0], "train", 1)))
    with pytest.raises(DataError, match="sample 2 occurs twice with different values"):
        list_results(tmp_path, "signs", "accuracy")


def test_a_merged_file_that_hides_where_a_rank_begins_is_refused(tmp_path):
    folder = tmp_path / "exp5_accuracy_signs"
    folder.mkdir()
    samples = [{"sample_id": n % 4, "score": 0.5, "pred": str(n)} for n in range(20)]
    path = folder / "exp5_accuracy_results_crops1_topk2_blocks4.json"
    path.write_text(json.dumps(document("all_samples", samples, SETTINGS[0], "train", RANKS)))
    with pytest.raises(DataError, match="do not show where each of the 3 ranks"):
        list_results(tmp_path, "signs", "accuracy")


def test_an_index_beyond_the_split_is_refused_unless_it_only_evens_out_the_ranks():
    task, size = load_task("signs"), load_task("signs").num_samples("validation")
    found = find_samples_by_index(task, [3, size], "validation", world_size=3)
    assert {number: place.sample.sample_id for number, place in found.items()} == {3: "validation-00001-1"}
    with pytest.raises(DataError, match=rf"sample_id {size} is a number .* has {size} samples"):
        find_samples_by_index(task, [3, size], "validation", world_size=2)


def test_the_guides_command_trains_on_a_tree_of_unmerged_ranks(tmp_path, run_script):
    """Every score and latency has to arrive at the sample that it was measured on."""
    size = load_task("signs").num_samples("validation")
    root = write_tree(tmp_path / "results", "validation", size, count=20, timed=14, failed=(5,))
    data = tmp_path / "data" / "d.json"
    done = run_script(
        "experiments/controller/train_controller.py", "--exp5_dir", root / "exp5_accuracy", "--exp6_dir",
        root / "exp6_latency", "--dataset_name", "signs", "--model_path", "reference", "--output_data_path", data,
        "--output_dir", tmp_path / "controller", "--batch_size", "64", "--num_epochs", "2", "--lr", "1e-4",
        "--group_size", "8",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "taken as their index in validation of signs" in done.stdout and "left out" in done.stdout
    assert (tmp_path / "controller" / "best_checkpoint.pt").exists()
    table = load_prepared(data).table
    names = [f"validation-{index // 2:05d}-{index % 2}" for index in range(42)]  # two questions an image
    timed = [index for index in range(42) if index != 5]
    assert list(table.sample_ids) == [names[index] for index in sorted(timed, key=lambda i: (i % RANKS, i))]
    for column, setting in enumerate(SETTINGS):
        rows = [names.index(name) for name in table.sample_ids]
        np.testing.assert_allclose(table.accuracy[:, column], [score(i, setting) for i in rows], atol=1e-6)
        np.testing.assert_allclose(table.latency_ms[:, column], [total_ms(i, setting) for i in rows])
