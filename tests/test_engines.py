"""A model behind engines: what is known of it, what it answers, and what engines get wrong."""

import threading
import time
from contextlib import contextmanager

import numpy as np
import pytest
import yaml
from PIL import Image
from tiny_vlm import write_tiny_model

from budgetvlm.engines.opening import open_model
from budgetvlm.errors import EngineChangedError, EngineDownError
from budgetvlm.vlm import VLM, Deadline
from budgetvlm.vlm.loading import load

FakeEngine = pytest.importorskip("fake_engine").FakeEngine


def noise(width, height):
    return Image.fromarray(np.random.default_rng(width).integers(0, 256, (height, width, 3), dtype=np.uint8))


IMAGE, QUESTION = noise(300, 200), "what is the red sign"


def without_weights(directory):
    for path in directory.glob("*.safetensors"):
        path.unlink()
    return directory


def waited_for(condition, most_s=5.0):
    end_s = time.perf_counter() + most_s
    while not condition() and time.perf_counter() < end_s:
        time.sleep(0.005)
    return condition()


@contextmanager
def watched(figure):
    """What a figure was, every now and then within a ``with`` block."""
    seen, over = [figure()], threading.Event()

    def watch():
        while not over.wait(0.002):
            seen.append(figure())

    thread = threading.Thread(target=watch)
    thread.start()
    yield seen
    over.set()
    thread.join()


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """A tiny InternVL's directory without weights: up to 4 tiles."""
    return without_weights(write_tiny_model(tmp_path_factory.mktemp("tiny")))


@pytest.fixture(scope="module")
def sketch(tiny):
    return load(str(tiny), device="meta")


@pytest.fixture
def opened(tmp_path, tiny):
    """Open a fleet of these replicas, each an engine or what the fleet's file says of one."""

    def open_fleet(*replicas, **more):
        listed = [{"url": one.url} if isinstance(one, FakeEngine) else one for one in replicas]
        path = tmp_path / "engines.yaml"
        path.write_text(yaml.safe_dump({"model_path": str(tiny), "replicas": listed, **more}))
        return open_model(str(path))

    return open_fleet


def test_a_vllm_is_a_model_with_knobs(opened, sketch):
    with FakeEngine(sketch) as engine:
        vlm = opened(engine)
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


def test_a_fleet_is_the_product_of_its_engines(opened, sketch):
    with FakeEngine(sketch, knobs={"top_k": 1}) as few, FakeEngine(sketch) as many:
        vlm = opened({"url": few.url, "knobs": {"top_k": 1}}, many, knobs={"max_crops": [1, 4]})
        assert vlm.knob_space.to_dict() == {"max_crops": [1, 4], "top_k": [1, 4]}
        before = len(few.asked), len(many.asked)
        vlm.generate(IMAGE, QUESTION, vlm.knob_space.setting(max_crops=4, top_k=1))
        assert (len(few.asked), len(many.asked)) == (before[0] + 1, before[1])


def test_an_engine_that_was_restarted_with_other_flags_is_noticed(opened, sketch):
    with FakeEngine(sketch) as engine:
        vlm = opened(engine)
        engine.faults.ignores = True
        vlm.generate(IMAGE, QUESTION, vlm.knob_space.full)
        with pytest.raises(EngineChangedError, match=f"{engine.url} reads this request at .* started with other flags"):
            vlm.generate(IMAGE, QUESTION, vlm.knob_space.cheapest)


def test_no_engine_at_that_address(opened):
    with pytest.warns(UserWarning, match="there is no engine at"), pytest.raises(EngineDownError, match="is up"):
        opened({"url": "http://127.0.0.1:9/v1"})


def test_an_answer_stops_at_its_deadline_and_the_engine_with_it(opened, sketch):
    with FakeEngine(sketch, answer=lambda *asked: " ".join("ABC123" * 20), token_ms=20.0) as engine:
        vlm = opened(engine)
        began = time.perf_counter()
        answer = vlm.generate(
            IMAGE, QUESTION, vlm.knob_space.full, max_new_tokens=99, deadline=Deadline(began + 0.3, 1.0)
        )
        assert answer.finish_reason == "budget" and 0.3 <= time.perf_counter() - began < 5
        assert " ".join("ABC123" * 20).startswith(answer.text) and answer.num_output_tokens == len(answer.text.split())
        assert waited_for(lambda: engine.left == 1 and engine.running == 0)


@pytest.mark.parametrize("token_ms", [1.0, 1e6])
def test_a_deadline_counts_before_the_first_token_and_between_tokens(opened, sketch, token_ms):
    with FakeEngine(sketch, token_ms=token_ms) as engine:
        vlm = opened(engine)
        engine.first_ms = 1e6 if token_ms == 1.0 else 1.0
        began = time.perf_counter()
        answer = vlm.generate(IMAGE, QUESTION, vlm.knob_space.full, deadline=Deadline(began + 0.2, 1.0))
        assert answer.finish_reason == "budget" and 0.2 <= time.perf_counter() - began < 5
        assert answer.num_output_tokens == (0 if token_ms == 1.0 else 1)


def test_who_reads_an_answer_can_end_it(opened, sketch):
    with FakeEngine(sketch, answer=lambda *asked: "A B C 1 2 3", token_ms=30.0) as engine:
        vlm, pieces = opened(engine), []
        answer = vlm.generate(
            IMAGE, QUESTION, vlm.knob_space.full, on_text=lambda piece: pieces.append(piece) or len(pieces) < 3
        )
        assert (answer.text, answer.finish_reason, answer.whole) == ("A B C", "stopped", False)
        assert "".join(pieces) == answer.text
        assert waited_for(lambda: engine.left == 1)


def test_a_batch_asks_what_is_equal_once_and_the_rest_at_the_same_time(opened, sketch):
    images, questions = [noise(60, 60), *[noise(300, 90)] * 3], [QUESTION, "what", "what", "red"]

    def said(image, question, crops, knobs):
        return f"{question} {sketch.images.layout_of(image, crops).grid}"

    with FakeEngine(sketch, answer=said, first_ms=20.0) as engine:
        vlm = opened({"url": engine.url, "concurrency": 2})
        engine.asked.clear()
        with watched(lambda: engine.running) as running:
            for setting in vlm.knob_space.settings:
                answers = vlm.generate_batch(images, questions, setting)
                right = [said(*one, setting["max_crops"], {}) for one in zip(images, questions, strict=True)]
                assert [answer.text for answer in answers] == right
        # the small image is one tile at every setting; the large one is shown in as many ways as it has layouts
        assert len({sketch.images.layout_of(images[1], n).grid for n in (1, 2, 4)}) == 3
        assert len(engine.asked) == 1 + 2 * 3
        assert max(running) == 2
