"""A model behind engines: what is known of it, what it answers, and what engines get wrong."""

import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import numpy as np
import pytest
import yaml
from fake_engine import FakeEngine, Faults
from PIL import Image
from tiny_families import write_tiny_family
from tiny_vlm import write_tiny_model

from budgetvlm.engines.engine_client import events
from budgetvlm.engines.engine_model import ENDING_S
from budgetvlm.engines.opening import is_engine, open_model
from budgetvlm.engines.router import TRIES
from budgetvlm.errors import ConfigError, EngineChangedError, EngineDownError, InputError, KnobSpaceError
from budgetvlm.vlm import VLM, Deadline
from budgetvlm.vlm.conversation import read_messages
from budgetvlm.vlm.loading import load


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


def test_an_address_below_which_no_models_are_listed(opened, sketch):
    with (
        FakeEngine(sketch) as engine,
        pytest.raises(ConfigError, match=r"completions/models does not exist.*up to the v"),
    ):
        opened({"url": f"{engine.url}/chat/completions"})


def test_an_answer_stops_at_its_deadline_and_the_engine_with_it(opened, sketch):
    with FakeEngine(sketch, answer=lambda *asked: " ".join("ABC123" * 20), token_ms=20.0) as engine:
        vlm = opened(engine)
        began = time.perf_counter()
        answer = vlm.generate(
            IMAGE, QUESTION, vlm.knob_space.full, max_new_tokens=99, deadline=Deadline(began + 0.3, 1.0)
        )
        assert answer.finish_reason == "budget" and 0.3 - ENDING_S <= time.perf_counter() - began < 5
        assert " ".join("ABC123" * 20).startswith(answer.text) and answer.num_output_tokens == len(answer.text.split())
        assert waited_for(lambda: engine.left == 1 and engine.running == 0)


@pytest.mark.parametrize("token_ms", [1.0, 1e6])
def test_a_deadline_counts_before_the_first_token_and_between_tokens(opened, sketch, token_ms):
    with FakeEngine(sketch, token_ms=token_ms) as engine:
        vlm = opened(engine)
        engine.first_ms = 1e6 if token_ms == 1.0 else 1.0
        began = time.perf_counter()
        answer = vlm.generate(IMAGE, QUESTION, vlm.knob_space.full, deadline=Deadline(began + 0.2, 1.0))
        assert answer.finish_reason == "budget" and 0.2 - ENDING_S <= time.perf_counter() - began < 5
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
        assert not any("stream" in body for body in engine.asked), "nothing is timed, so nothing has to come at once"


@pytest.fixture(scope="module")
def qwen(tmp_path_factory):
    """A tiny Qwen2.5-VL's directory without weights: it resizes to the pixels that it gets."""
    return without_weights(write_tiny_family("qwen2_5_vl", tmp_path_factory.mktemp("qwen")))


def test_options_that_are_refused_are_named_with_the_flag(opened, sketch):
    with FakeEngine(sketch, trusted=False) as engine:
        with pytest.raises(ConfigError, match="Start vLLM with --trust-request-mm-kwargs"):
            opened(engine, steer="kwargs")
        flag = pytest.warns(UserWarning, match="--trust-request-mm-kwargs, or steer .* going on with steer: none")
        with flag, pytest.raises(ConfigError, match="leave no choice"):
            opened(engine)


def test_options_that_are_ignored_in_silence_are_not_offered(opened, sketch):
    with FakeEngine(sketch, faults=Faults(ignores=True)) as engine:
        with pytest.raises(EngineChangedError, match="max_crops=1 as a prompt of"):
            opened(engine, knobs={"max_crops": [1, 4]})
        with pytest.warns(UserWarning, match="it is not offered"), pytest.raises(ConfigError, match="leave no choice"):
            opened(engine)


@pytest.mark.parametrize("engine_kind", ["vllm", "openai"])
def test_images_are_scaled_where_that_is_all_that_steers(opened, qwen, engine_kind):
    model = load(str(qwen), device="meta")
    with FakeEngine(model, trusted=False, name="qwen") as engine:
        more = {"steer": "pixels"} if engine_kind == "vllm" else {}
        vlm = opened({"url": engine.url, "engine": engine_kind}, model_path=str(qwen), **more)
        assert vlm.knob_space.to_dict() == {"max_crops": list(model.knob_space.values("max_crops"))}
        image, sizes = noise(400, 300), []
        for setting in vlm.knob_space.settings:
            vlm.generate(image, QUESTION, setting)
            assert "mm_processor_kwargs" not in engine.asked[-1]
            sizes.append(engine.asked[-1]["images"][0].size)
            right = model.images.layout_of(image, int(setting["max_crops"]))
            assert sizes[-1] == (right.grid[1] * 4, right.grid[0] * 4) or sizes[-1] == image.size
        assert sizes[0] < sizes[-1] and len(set(sizes)) == len(sizes)


def test_models_of_a_fleet_are_values_of_a_knob(opened, tiny, qwen, sketch):
    large = load(str(qwen), device="meta")
    with FakeEngine(sketch, name="small") as one, FakeEngine(large, name="large") as other:
        vlm = opened(
            {"url": one.url, "knobs": {"model": 2}},
            {"url": other.url, "knobs": {"model": 30}, "model_path": str(qwen)},
        )
        assert vlm.knob_space.names == ("model", "max_crops") and vlm.knob_space.values("model") == (2, 30)
        vision, _ = vlm.prompt_size(IMAGE, QUESTION)
        for setting in vlm.served:
            answer = vlm.generate(IMAGE, QUESTION, setting)
            asked, model = (one, sketch) if setting["model"] == 2 else (other, large)
            assert asked.asked[-1]["model"] == {2: "small", 30: "large"}[setting["model"]]
            right = model.prompt.num_image_tokens(model.images.layout_of(IMAGE, int(setting["max_crops"])))
            assert answer.num_vision_tokens == right == vision[vlm.knob_space.index(setting)]
        assert {setting["model"] for setting in vlm.served} == {2, 30}
        assert len(vlm.served) == len(sketch.knob_space.values("max_crops")) + len(large.knob_space.values("max_crops"))


def test_a_setting_that_no_engine_answers(opened, sketch):
    with FakeEngine(sketch, knobs={"top_k": 1}) as few, FakeEngine(sketch) as many:
        vlm = opened({"url": few.url, "knobs": {"top_k": 1, "num_active_blocks": 2}}, many, knobs={"max_crops": [1]})
        assert [dict(one) for one in vlm.served] == [
            {"top_k": 1, "num_active_blocks": 2}, {"top_k": 4, "num_active_blocks": 4},
        ]  # fmt: skip
        with pytest.raises(KnobSpaceError, match=r"no engine of .* answers top_k=1, num_active_blocks=4"):
            vlm.generate(IMAGE, QUESTION, vlm.knob_space.setting(top_k=1, num_active_blocks=4))


def test_fresh_images_are_new_to_every_cache_and_look_the_same(opened, sketch):
    with FakeEngine(sketch) as engine:
        vlm = opened(engine)
        vlm.fresh_images = True
        engine.asked.clear()
        for _ in range(3):
            vlm.generate(IMAGE, QUESTION, vlm.knob_space.full)
        sent = [np.asarray(one["images"][0]).astype(int) for one in engine.asked]
        assert len({one.tobytes() for one in sent}) == 3
        assert max(np.abs(one - np.asarray(IMAGE)).max() for one in sent) == 1
        vlm.fresh_images = False
        vlm.generate(IMAGE, QUESTION, vlm.knob_space.full)
        assert (np.asarray(engine.asked[-1]["images"][0]) == np.asarray(IMAGE)).all()


def test_another_model_behind_it(opened, qwen, sketch):
    with FakeEngine(sketch) as engine, pytest.raises(EngineChangedError, match="or serves another model"):
        opened(engine, model_path=str(qwen))


def test_a_question_that_names_special_tokens_tells_nothing_of_the_engine(opened, sketch):
    with FakeEngine(sketch) as engine:
        vlm = opened(engine)
        engine.faults.ignores = True
        assert vlm.generate(IMAGE, "what is <img>", vlm.knob_space.cheapest).text
        with pytest.raises(EngineChangedError):
            vlm.generate(IMAGE, "what is", vlm.knob_space.cheapest)


def test_threads_are_answered_side_by_side_each_its_own(opened, sketch):
    with FakeEngine(sketch, first_ms=20.0) as engine:
        vlm = opened({"url": engine.url, "concurrency": 4})
        images = [noise(64 + 40 * i, 80) for i in range(8)]
        with ThreadPoolExecutor(8) as threads, watched(lambda: engine.running) as running:
            made = list(threads.map(lambda image: vlm.generate(image, QUESTION, vlm.knob_space.full), images))
        assert [answer.text for answer in made] == [engine.right(image, QUESTION, 4, {}) for image in images]
        assert 2 <= max(running) <= 4


def test_a_conversation_goes_as_it_is(opened, sketch):
    said = [
        {"role": "user", "content": [{"type": "image", "image": IMAGE}, {"type": "text", "text": "what is the sign"}]},
    ]
    with FakeEngine(sketch) as engine:
        vlm = opened(engine)
        conversation = read_messages(said)
        assert vlm.generate(None, conversation, vlm.knob_space.full).num_vision_tokens == 20
        assert engine.asked[-1]["messages"][0]["content"][1] == {"type": "text", "text": "what is the sign"}


@pytest.mark.parametrize(
    ("fault", "error", "said"),
    [
        ("500", EngineDownError, "failed .500: the engine is not well"),
        ("disconnect", EngineDownError, "cannot speak to the engine at"),
        ("death", EngineDownError, "cannot speak to the engine at"),
    ],
)
def test_what_an_engine_may_do(opened, sketch, fault, error, said):
    with FakeEngine(sketch) as engine:
        vlm = opened(engine)
        vlm.router.patience_s = 0.0
        engine.faults.next.extend([fault] * TRIES)
        with pytest.raises(error, match=said):
            vlm.generate(IMAGE, QUESTION, vlm.knob_space.full)
        with pytest.raises(EngineDownError):
            vlm.generate(IMAGE, QUESTION, vlm.knob_space.full)  # it is left out for a while


def test_nothing_is_asked_that_is_no_question(opened, sketch):
    with FakeEngine(sketch) as engine:
        vlm, before = opened(engine), len(engine.asked)
        with pytest.raises(InputError, match="the question is empty"):
            vlm.generate(IMAGE, " ", vlm.knob_space.full)
        with pytest.raises(InputError, match="half of a character"):
            vlm.generate(IMAGE, "what is \udcff", vlm.knob_space.full)
        with pytest.raises(InputError, match="max_new_tokens=0"):
            vlm.generate(IMAGE, QUESTION, vlm.knob_space.full, max_new_tokens=0)
        assert len(engine.asked) == before


def test_lines_of_a_stream_end_at_newlines_alone():
    raw = 'data: {"a":"x\u2028y\u0085"}\r\n\n: nothing\nevent: b\ndata:{"a":"ü"}\n\ndata: [DONE]\n\n'.encode()
    for size in (1, 7, len(raw)):
        pieces = (raw[at : at + size] for at in range(0, len(raw), size))
        assert list(events(pieces)) == [{"a": "x\u2028y\u0085"}, {"a": "ü"}]


def test_an_engine_says_how_much_it_has_to_do(opened, sketch):
    with FakeEngine(sketch, slots=2) as engine:
        vlm = opened({"url": engine.url, "concurrency": 3})
        engine.first_ms, vlm.router.patience_s, endpoint = 1e6, 0.0, vlm.router.endpoints[0]
        assert endpoint.client.load(endpoint.dialect) == (0, 0)
        with ThreadPoolExecutor(3) as threads:
            for _ in range(3):
                threads.submit(vlm.generate, IMAGE, QUESTION, vlm.knob_space.full)
            told = waited_for(lambda: endpoint.client.load(endpoint.dialect) == (2, 1))
            engine.die()
        assert told


def test_an_engine_that_is_down_at_first_is_one_of_the_fleet(opened, sketch):
    with FakeEngine(sketch, knobs={"top_k": 1}) as few, FakeEngine(sketch) as many:
        replicas = {"url": few.url, "knobs": {"top_k": 1}}, many
        both = opened(*replicas)
        few.die()
        with pytest.warns(UserWarning, match="It is left out for now"):
            vlm = opened(*replicas)
        assert (vlm.knob_space, vlm.served) == (both.knob_space, both.served)
        assert vlm.fingerprint() == both.fingerprint()
        few.revive()
        setting = vlm.knob_space.setting(max_crops=4, top_k=1)
        assert vlm.generate(IMAGE, QUESTION, setting).text == few.right(IMAGE, QUESTION, 4, {"top_k": 1})


def test_nothing_is_known_of_an_engine_of_another_model_that_is_down(opened, qwen, sketch):
    down = {"url": URL, "knobs": {"model": 30}, "model_path": str(qwen)}
    with FakeEngine(sketch) as engine, pytest.warns(UserWarning, match="left out"):
        small = {"url": engine.url, "knobs": {"model": 2}}
        with pytest.raises(EngineDownError, match="give its engine and model in the file"):
            opened(small, down)
        vlm = opened(small, {**down, "engine": "vllm", "model": "large"})
        assert vlm.knob_space.values("model") == (2, 30)


def test_a_fleet_is_known_again_and_another_is_not(opened, sketch):
    with FakeEngine(sketch) as engine, FakeEngine(sketch, name="other") as other:
        first = opened(engine).fingerprint()
        assert opened(engine).fingerprint() == first
        assert opened({"url": engine.url, "concurrency": 2}, engine).fingerprint() == first
        assert opened(other).fingerprint() != first != opened(engine, knobs={"max_crops": [1, 4]}).fingerprint()


def test_an_address_alone_needs_to_know_the_model(tiny, sketch):
    with FakeEngine(sketch) as engine:
        assert open_model(engine.url, model_path=str(tiny)).knob_space.to_dict() == {"max_crops": [1, 2, 4]}
        assert open_model(engine.url.removesuffix("/v1"), model_path=str(tiny)).name == engine.url.removesuffix("/v1")
        with pytest.raises(ConfigError, match=r"model_path is missing: .* --model_path"):
            open_model(engine.url)


def test_a_key_is_named_and_never_written(opened, sketch, monkeypatch):
    with FakeEngine(sketch, key="secret") as engine:
        monkeypatch.setenv("KEY_OF_ENGINE", "secret")
        assert opened({"url": engine.url, "api_key_env": "KEY_OF_ENGINE"}).served
        monkeypatch.delenv("KEY_OF_ENGINE")
        with pytest.raises(ConfigError, match=r"KEY_OF_ENGINE .api_key_env. is not set"):
            opened({"url": engine.url, "api_key_env": "KEY_OF_ENGINE"})
        with pytest.raises(ConfigError, match=r"wants another key .401"):
            opened(engine)


URL = "http://127.0.0.1:9/v1"


@pytest.mark.parametrize(
    ("document", "said"),
    [
        ([], r"it is \[\]; give keys of model_path, replicas"),
        (None, "it is empty; give keys of model_path, replicas"),
        ({"replicas": []}, r"replicas is \[\]; give a list of at least one engine"),
        ({"replicas": [{"url": "localhost:8000"}]}, r"replicas\[0\].url is 'localhost:8000'; give an address"),
        ({"replicas": [{"url": URL, "engine": "sglang"}]}, r"replicas\[0\].engine is 'sglang'; give one of vllm"),
        ({"replicas": [{"url": URL, "knobs": {"top_k": -1}}]}, r"replicas\[0\].knobs is {'top_k': -1}"),
        ({"replicas": [{"url": URL}], "steer": "tiles"}, "steer is 'tiles'; give one of kwargs, pixels, none"),
        ({"replicas": [{"url": URL, "weight": 1}]}, r"replicas\[0\].weight is unknown; known: url, engine"),
        ({"replicas": [{"model": "a"}], "step": 1}, r"step is unknown.*replicas\[0\].url is missing"),
        (
            {"replicas": [{"url": URL, "knobs": {"model": 2}}, {"url": URL}]},
            r"replicas\[1\].knobs names no 'model', though several models are served",
        ),
    ],
)
def test_a_fleets_file_says_all_that_is_wrong_with_it(tmp_path, document, said):
    path = tmp_path / "engines.yml"
    known = {"model_path": "reference", **document} if isinstance(document, dict) else document
    path.write_text(yaml.safe_dump(known))
    with pytest.raises(ConfigError, match=said):
        open_model(str(path))


def test_a_fleets_file_that_is_none(tmp_path):
    (tmp_path / "broken.yaml").write_text("replicas: [")
    with pytest.raises(ConfigError, match="cannot be read"):
        open_model(str(tmp_path / "broken.yaml"))
    with pytest.raises(ConfigError, match="does not exist"):
        open_model(str(tmp_path / "none.yaml"))
    (tmp_path / "short.yaml").write_text(f"replicas: [{{url: '{URL}'}}]")
    with pytest.raises(ConfigError, match="model_path is missing"):
        open_model(str(tmp_path / "short.yaml"))


@pytest.mark.parametrize(
    ("knobs", "said"),
    [
        ({"top_k": 9}, "exceeds the model's 6 experts"),
        ({"num_active_blocks": 9}, "outside 2 to 4"),
        ({"max_crops": 9}, "max_crops=9 is more than the 4"),
        ({"depth": 2}, "it has no knob depth"),
    ],
)
def test_a_value_that_the_model_cannot_have(opened, sketch, knobs, said):
    with FakeEngine(sketch) as engine, pytest.raises(ConfigError, match=said):
        opened({"url": engine.url, "knobs": knobs})


def test_another_model_than_the_file_says(opened, sketch):
    with FakeEngine(sketch) as engine, pytest.raises(ConfigError, match="serves tiny, and not 'smolvlm'"):
        opened({"url": engine.url, "model": "smolvlm"})


@pytest.mark.parametrize(
    ("path", "engine"),
    [("engines.yaml", True), ("https://host/v1", True), ("http://host", True), ("reference", False), ("./a.d", False)],
)
def test_engines_are_told_from_directories(path, engine):
    assert is_engine(path) is engine
