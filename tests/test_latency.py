"""The latency model: a planted machine is found again, also at settings that were never measured."""

import json

import numpy as np
import pytest

from budgetvlm.errors import DataError, KnobSpaceError
from budgetvlm.guard.latency_model import LatencyModel, Sizes, relative_errors
from budgetvlm.knobs import KnobSpace
from budgetvlm.table import ProfileTable

SPACE = KnobSpace({"max_crops": [1, 4, 12], "top_k": [1, 4, 12], "num_active_blocks": [2, 4, 8]})
WIDE = KnobSpace(
    {
        "max_crops": [1, 2, 4, 6, 9, 12],
        "top_k": [1, 2, 3, 4, 6, 8, 10, 12],
        "num_active_blocks": [2, 3, 4, 5, 6, 7, 8, 10, 12],
    }
)


def machine(space: KnobSpace, samples: int, seed: int = 0):
    """(tokens, stages) of a made-up machine whose times are exactly what the model's terms can say."""
    rng = np.random.default_rng(seed)
    crops, experts, blocks = space.value_matrix.T
    tiles = np.where(crops > 1, crops + 1, 1)
    vision = np.tile(16.0 * tiles, (samples, 1))
    language = np.repeat(rng.integers(5, 12, (samples, 1)).astype(float), len(space), axis=1)
    output = np.repeat(rng.integers(1, 6, (samples, 1)).astype(float), len(space), axis=1)
    context = vision + language
    stages = {
        "preprocess": 0.5 + 0.01 * vision,
        "vision": 1.0 + 0.08 * vision + 3.0 * (tiles > 1),  # the overview is encoded first and by itself
        "prefill": 2.0 + blocks * (1.0 + 0.004 * context + 0.0011 * context * experts) + 1e-5 * context**2 * blocks,
        "decode": (output - 1) * (0.3 + blocks * (0.8 + 0.05 * experts + 0.001 * context)),
    }
    return {"vision": vision, "language": language, "output": output}, stages


def measured(space: KnobSpace = SPACE, samples: int = 60, noise: float = 0.0, seed: int = 0, **changes) -> ProfileTable:
    tokens, stages = machine(space, samples, seed)
    rng = np.random.default_rng(seed + 1)
    shake = {name: ms * np.exp(noise * rng.standard_normal(ms.shape)) for name, ms in stages.items()}
    total = sum(shake.values())
    given = {"stages_ms": shake, "tokens": tokens, **changes}
    return ProfileTable.from_arrays(space, range(samples), np.zeros(total.shape), total, **given)


def only(table: ProfileTable, columns) -> ProfileTable:
    """The table with the other settings not measured."""
    latency = np.full(table.latency_ms.shape, np.nan)
    latency[:, columns] = table.latency_ms[:, columns]
    stages = {name: np.where(np.isnan(latency), np.nan, values) for name, values in table.stages_ms.items()}
    return ProfileTable.from_arrays(
        table.knob_space, table.sample_ids, table.accuracy, latency, stages_ms=stages, tokens=table.tokens
    )


def test_an_exact_machine_is_found_from_a_quarter_of_the_settings():
    table = measured()
    quarter = np.random.default_rng(3).permutation(27)[:7]
    model = LatencyModel.fit(only(table, quarter))
    others = np.setdiff1d(np.arange(27), quarter)
    errors = relative_errors(model.predict_table(table)[:, others], table.latency_ms[:, others])
    assert np.median(errors) < 0.02
    assert (model.weights >= 0).all()
    assert model.compute_knobs == ("top_k", "num_active_blocks")


def test_experts_cost_what_they_cost_in_each_block():
    """Many experts were only timed at the full depth; at another depth they cost their share of it."""
    table = measured(noise=0.02)
    _, experts, blocks = SPACE.value_matrix.T
    model = LatencyModel.fit(only(table, np.flatnonzero((experts == 1) | (blocks == 8))))
    unseen = (experts == 12) & (blocks == 2)
    errors = relative_errors(model.predict_table(table)[:, unseen], table.latency_ms[:, unseen])
    assert np.median(errors) < 0.03


def test_stages_add_up_and_a_request_alone_takes_what_it_takes_in_a_table():
    table = measured(noise=0.1)
    model, sizes = LatencyModel.fit(table), Sizes.of_table(table)
    total = model.predict(sizes)
    assert set(model.stages) == {"preprocess", "vision", "prefill", "decode"}
    for row in (0, 7):
        by_stage = model.stages_of(5, sizes.vision[row], sizes.language[row, 0], sizes.output[row, 0])
        np.testing.assert_allclose(by_stage.sum(), total[row, 5])


def test_outliers_have_no_pull():
    table = measured(noise=0.02)
    slow = np.random.default_rng(5).random(table.latency_ms.shape) < 0.05
    disturbed = ProfileTable.from_arrays(
        SPACE, table.sample_ids, table.accuracy, np.where(slow, 20 * table.latency_ms, table.latency_ms),
        stages_ms={**table.stages_ms, "vision": table.stages_ms["vision"] + np.where(slow, 19 * table.latency_ms, 0)},
        tokens=table.tokens,
    )  # fmt: skip
    errors = relative_errors(LatencyModel.fit(disturbed).predict_table(table), table.latency_ms)
    assert np.median(errors) < 0.03


def test_other_values_of_the_same_knobs():
    model = LatencyModel.fit(measured(noise=0.02, samples=100)).for_space(WIDE)
    truth = measured(WIDE, samples=20)
    assert len(WIDE) == 432
    errors = relative_errors(model.predict_table(truth), truth.latency_ms)
    assert np.median(errors) < 0.05


def test_settings_that_give_an_image_the_same_tiles_cost_the_same():
    """A small image has one tile whatever `max_crops` allows; only the large ones teach the model what tiles cost."""
    table = measured(samples=40)
    model = LatencyModel.fit(table)
    sizes = Sizes.of_table(table)
    small = Sizes(np.full_like(sizes.vision, 16.0), sizes.language, sizes.output)
    by_crops = (model.predict(small) / model.correction).reshape(-1, 3, 9)
    np.testing.assert_allclose(by_crops[:, 0], by_crops[:, 2])


def test_without_stages_or_tokens_each_setting_has_its_typical_time():
    table = measured(samples=200, stages_ms={}, tokens={})
    model = LatencyModel.fit(table)
    assert model.stages == ("rest",)
    assert model.compute_knobs == SPACE.names
    typical = np.median(table.latency_ms, axis=0)
    np.testing.assert_allclose(model.predict_table(table)[0], typical, rtol=0.05)


def test_a_setting_that_the_terms_cannot_say_is_corrected_where_it_was_measured():
    table = measured()
    odd = np.where(np.arange(27) == 13, 3.0, 1.0)
    strange = ProfileTable.from_arrays(
        SPACE, table.sample_ids, table.accuracy, table.latency_ms * odd,
        stages_ms={n: v * odd for n, v in table.stages_ms.items()}, tokens=table.tokens,
    )  # fmt: skip
    model = LatencyModel.fit(strange)
    errors = relative_errors(model.predict_table(strange), strange.latency_ms)
    assert np.median(errors) < 0.02
    assert relative_errors(model.predict_table(strange)[:, 13], strange.latency_ms[:, 13]).max() < 0.15


def test_it_survives_json():
    model = LatencyModel.fit(measured(noise=0.05))
    again = LatencyModel.from_dict(json.loads(json.dumps(model.to_dict())))
    sizes = Sizes.of_table(measured())
    np.testing.assert_array_equal(again.predict(sizes), model.predict(sizes))
    with pytest.raises(DataError, match="schema version 9"):
        LatencyModel.from_dict({**model.to_dict(), "schema_version": 9})
    with pytest.raises(DataError, match="lacks the field weights"):
        LatencyModel.from_dict({k: v for k, v in model.to_dict().items() if k != "weights"})
    with pytest.raises(DataError, match="shape"):
        LatencyModel.from_dict({**model.to_dict(), "stages": ["vision"]})


def test_other_knobs_and_empty_tables_are_refused():
    table = measured()
    with pytest.raises(KnobSpaceError, match="latency model knows the knobs"):
        LatencyModel.fit(table).for_space(KnobSpace({"beams": [1, 2]}))
    with pytest.raises(DataError, match="no latency was measured"):
        LatencyModel.fit(only(table, []))
