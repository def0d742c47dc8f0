"""A model behind engines: what is known of it, what it answers, and what engines get wrong."""

import pytest
from PIL import Image
from tiny_vlm import write_tiny_model

from budgetvlm.engines.opening import open_model
from budgetvlm.errors import EngineChangedError, EngineDownError
from budgetvlm.vlm import VLM
from budgetvlm.vlm.loading import load

FakeEngine = pytest.importorskip("fake_engine").FakeEngine

IMAGE, QUESTION = Image.effect_noise((300, 200), 50).convert("RGB"), "what is the red sign"


def without_weights(directory):
    for path in directory.glob("*.safetensors"):
        path.unlink()
    return directory


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """A tiny InternVL's directory without weights: up to 4 tiles."""
    return without_weights(write_tiny_model(tmp_path_factory.mktemp("tiny")))


@pytest.fixture(scope="module")
def sketch(tiny):
    return load(str(tiny), device="meta")


def fleet_file(tmp_path, tiny, *replicas, **more):
    import yaml

    path = tmp_path / "engines.yaml"
    path.write_text(yaml.safe_dump({"model_path": str(tiny), "replicas": list(replicas), **more}))
    return str(path)


def test_a_vllm_is_a_model_with_knobs(tmp_path, tiny, sketch):
    with FakeEngine(sketch) as engine:
        vlm = open_model(fleet_file(tmp_path, tiny, {"url": engine.url}))
        assert isinstance(vlm, VLM)
        assert vlm.knob_space.to_dict() == {"max_crops": [1, 2, 4]}
        vision, language = vlm.prompt_size(IMAGE, QUESTION)
        assert vision.tolist() == [4, 12, 20]
        assert language == sketch.prompt_size(IMAGE, QUESTION)[1]
        answer = vlm.generate(IMAGE, QUESTION, vlm.knob_space.cheapest)
        assert answer.text == engine.right(IMAGE, QUESTION, 1, {})
        assert (answer.num_vision_tokens, answer.num_output_tokens) == (4, 2)
        assert answer.finish_reason == "stop" and answer.whole
        assert answer.stages_ms["vision"] == 0 < min(answer.stages_ms[s] for s in ("preprocess", "prefill", "decode"))
        assert engine.asked[-1]["mm_processor_kwargs"] == {"max_patches": 1}


def test_a_fleet_is_the_product_of_its_engines(tmp_path, tiny, sketch):
    with FakeEngine(sketch, knobs={"top_k": 1}) as few, FakeEngine(sketch) as many:
        replicas = {"url": few.url, "knobs": {"top_k": 1}}, {"url": many.url}
        vlm = open_model(fleet_file(tmp_path, tiny, *replicas, knobs={"max_crops": [1, 4]}))
        assert vlm.knob_space.to_dict() == {"max_crops": [1, 4], "top_k": [1, 4]}
        before = len(few.asked), len(many.asked)
        vlm.generate(IMAGE, QUESTION, vlm.knob_space.setting(max_crops=4, top_k=1))
        assert (len(few.asked), len(many.asked)) == (before[0] + 1, before[1])


def test_an_engine_that_was_restarted_with_other_flags_is_noticed(tmp_path, tiny, sketch):
    with FakeEngine(sketch) as engine:
        vlm = open_model(fleet_file(tmp_path, tiny, {"url": engine.url}))
        engine.faults.ignores = True
        vlm.generate(IMAGE, QUESTION, vlm.knob_space.full)
        with pytest.raises(EngineChangedError, match=f"{engine.url} read a prompt of .* restarted with other flags"):
            vlm.generate(IMAGE, QUESTION, vlm.knob_space.cheapest)


def test_no_engine_at_that_address(tmp_path, tiny):
    with pytest.warns(UserWarning, match="there is no engine at"), pytest.raises(EngineDownError, match="is up"):
        open_model(fleet_file(tmp_path, tiny, {"url": "http://127.0.0.1:9/v1"}))
