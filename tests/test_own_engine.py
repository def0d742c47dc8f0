"""Our own server as an engine: through it the bundled model is what it is in this process."""

import itertools

import pytest
import yaml
from PIL import Image
from server_process import ROOT, ServerProcess

from budgetvlm.engines.opening import fingerprint_of, open_model
from budgetvlm.errors import ConfigError
from budgetvlm.tasks import load_task
from budgetvlm.vlm import load_vlm

QUESTIONS = "read the sign in red", "read the sign in blue"


@pytest.fixture(scope="module")
def server():
    with ServerProcess() as running:
        yield running


@pytest.fixture(scope="module")
def engine(server):
    return open_model(f"{server.address}/v1")


@pytest.fixture(scope="module")
def model():
    return load_vlm("reference")


def test_it_says_itself_what_it_serves(engine, server, model):
    assert engine.knob_space == model.knob_space
    assert engine.served == model.knob_space.settings
    assert fingerprint_of(engine.name, engine) == open_model(f"{server.address}/v1").fingerprint()
    image = Image.open(ROOT / "examples" / "signs.png")
    for mine, its in zip(engine.prompt_size(image, QUESTIONS[0]), model.prompt_size(image, QUESTIONS[0]), strict=True):
        assert (mine == its) if isinstance(mine, int) else mine.tolist() == its.tolist()


def test_answers_are_the_models_at_every_kind_of_setting(engine, model):
    samples = list(load_task("signs").samples("test", 2, seed=0))
    settings = model.knob_space.settings[::9]
    images, questions = [sample.load_image() for sample in samples], [sample.question for sample in samples]
    for setting, (image, question) in itertools.product(settings, zip(images, questions, strict=True)):
        mine, right = engine.generate(image, question, setting), model.generate(image, question, setting)
        assert mine.text == right.text
        for count in ("num_vision_tokens", "num_language_tokens", "num_output_tokens", "finish_reason"):
            assert getattr(mine, count) == getattr(right, count)
    for setting in settings:
        right = model.generate_batch(images, questions, setting)
        assert [a.text for a in engine.generate_batch(images, questions, setting)] == [a.text for a in right]


@pytest.mark.parametrize("knobs", [{"top_k": [3, 12]}, {"max_crops": [1, 2]}])
def test_values_that_it_does_not_have_are_named(server, tmp_path, knobs):
    path = tmp_path / "engines.yaml"
    path.write_text(yaml.safe_dump({"model_path": "reference", "knobs": knobs, "replicas": [{"url": server.address}]}))
    with pytest.raises(ConfigError, match=r"has (top_k|max_crops) in \[.*\], and not \[[23]\]"):
        open_model(str(path))


def test_it_was_started_with_no_value_of_what_it_takes_with_requests(server, tmp_path):
    """Taken as fixed, the value would not be sent, and each answer be that of the largest one."""
    path = tmp_path / "engines.yaml"
    replica = {"url": server.address, "knobs": {"top_k": 2}}
    path.write_text(yaml.safe_dump({"model_path": "reference", "replicas": [replica]}))
    with pytest.raises(ConfigError, match="takes top_k with each request, so it was started with no value of it"):
        open_model(str(path))
