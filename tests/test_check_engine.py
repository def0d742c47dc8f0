"""`budgetvlm check-model --engine`: what is found of an engine, and what is said of one with faults."""

import json

import pytest
import yaml
from fake_engine import FakeEngine, Faults
from tiny_families import write_tiny_family

from budgetvlm import cli
from budgetvlm.engines import verification
from budgetvlm.engines.engine_probe import EngineProbe, NotTold
from budgetvlm.engines.fleet_file import read_fleet
from budgetvlm.engines.fleet_opening import reach
from budgetvlm.engines.payload import data_url
from budgetvlm.engines.verification import ENGINE_CHECKS, best_in_flight
from budgetvlm.vlm.loading import load
from budgetvlm.vlm.probe import Broken

LONG = " ".join("ABC123" * 30)


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Directories without weights, and models of them for the engine."""
    made = {}
    for name in ("idefics3", "qwen2_5_vl"):
        directory = write_tiny_family(name, tmp_path_factory.mktemp(name))
        (directory / "model.safetensors").unlink()
        made[name] = directory, load(str(directory), device="meta")
    return made


@pytest.fixture
def engine(models):
    """Make an engine; what it answers is long where it is asked for an essay."""

    def make(family="idefics3", **options):
        directory, sketch = models[family]
        made = FakeEngine(sketch, answer=answer, **{"token_ms": 3.0, **options})
        made.directory = directory
        return made

    def answer(image, question, crops, knobs):
        return LONG if question == verification.ESSAY else f"{question} {crops}"

    return make


def probe_of(engine):
    (endpoint,) = reach(read_fleet(engine.url, str(engine.directory)))
    return EngineProbe(endpoint)


def run(engine, capsys, *words):
    code = cli.main(["check-model", "--engine", engine.url, "--model_path", str(engine.directory), *words])
    return code, capsys.readouterr()


def said(name, probe):
    """What one check says, after those before it that it needs."""
    needed = list(ENGINE_CHECKS.values())[:2]
    for check in needed:
        if check is ENGINE_CHECKS[name]:
            break
        check(probe)
    return ENGINE_CHECKS[name](probe)


def test_a_good_engine_gets_a_page_a_fleets_file_and_exit_code_0(engine, capsys, tmp_path, monkeypatch):
    """And is asked one request at a time, but where it is measured how many it takes at once."""
    monkeypatch.setenv("COLUMNS", "300")
    monkeypatch.setattr(verification, "MOST_IN_FLIGHT", 1)
    with engine() as running:
        code, seen = run(running, capsys, "--repeats", "1")
        assert code == 0, seen.out
        for words in (*ENGINE_CHECKS, "All checks hold", "1, 4, 8, 9", "longest_edge", "vllm", "first_token"):
            assert words in seen.out, words
        page, _, suggested = seen.out.partition("(engines.yaml):")
        assert "1: 7 / 7 / 7, 4: 31 / 19 / 31" in page
        (tmp_path / "engines.yaml").write_text(suggested)
        fleet = read_fleet(str(tmp_path / "engines.yaml"))
        (replica,) = fleet.replicas
        assert (replica.url, replica.engine, replica.model) == (running.url, "vllm", "tiny")
        assert replica.model_path == str(running.directory) and fleet.steer == "kwargs" and not fleet.knobs
        verdicts = [line.split(":")[0] for line in seen.err.splitlines() if line.startswith("... ")]
        assert (verdicts.count("... holds"), verdicts.count("... left out")) == (len(ENGINE_CHECKS) - 1, 1)
        assert running.most_running == 1


@pytest.mark.parametrize(
    ("family", "options", "offered", "steer", "why"),
    [
        ("idefics3", {"trusted": False}, (9,), "none", "--trust-request-mm-kwargs"),
        ("idefics3", {"faults": Faults(ignores=True)}, (9,), "none", "ignored in silence"),
        ("idefics3", {"faults": Faults(most_crops=1)}, (1, 9), "kwargs", "taken for 1"),
        ("qwen2_5_vl", {"trusted": False}, (1, 2, 4), "pixels", None),
        ("qwen2_5_vl", {"faults": Faults(ignores=True)}, (1, 2, 4), "pixels", None),
    ],
)
def test_values_that_are_not_heeded_are_not_offered_and_the_page_says_why(
    engine, capsys, monkeypatch, family, options, offered, steer, why
):
    first = dict(list(ENGINE_CHECKS.items())[:2])
    monkeypatch.setattr(verification, "ENGINE_CHECKS", first)
    with engine(family, **options) as running:
        code, seen = run(running, capsys, "--json", "--repeats", "0")
    document = json.loads(seen.out)
    (found,) = document["engines"]
    assert code == 0 and document["passed"] is True
    assert (tuple(found["knob_space"]["max_crops"]), found["steer"]) == (offered, steer)
    assert document["fleet"].get("knobs") == ({"max_crops": list(offered)} if why else None)
    (heeded,) = (one for one in found["checks"] if one["name"] == "max_crops is heeded")
    assert (heeded["passed"] is None) == (len(offered) == 1)
    if why:
        assert why in heeded["detail"] and all(why in text for text in found["not_offered"].values())
    else:
        assert "by scaling images" in heeded["detail"] and set(found["tokens"]) == {"1", "2", "4"}


def test_after_a_request_that_an_engine_failed_on_nothing_more_is_sent(engine, capsys):
    with engine(faults=Faults(deadly=("size",))) as running:
        code, seen = run(running, capsys, "--json")
        (found,) = json.loads(seen.out)["engines"]
        first, second, *others = found["checks"]
        assert code == 1 and first["passed"] is True
        assert second["passed"] is False and "EngineCore encountered an issue" in second["detail"]
        assert {(one["passed"], one["detail"].partition(",")[0]) for one in others} == {(None, "not tried")}
        assert "mm_processor_kwargs" in running.asked[-1] and "mm_processor_kwargs" not in running.asked[-2]


def test_another_model_behind_the_engine(engine):
    with engine() as running:
        running.tokens = lambda conversation, crops: (conversation.images[0].width // 16, 3)
        with pytest.raises(Broken, match=r"is read as 33 tokens, where .*: it serves another model"):
            said("prompts are the model's", probe_of(running))


def test_a_longer_text_around_questions_is_no_other_model(engine):
    with engine() as running:
        own = running.tokens
        running.tokens = lambda *asked: (own(*asked)[0], own(*asked)[1] + 5)
        assert "longer by 5 tokens" in said("prompts are the model's", probe_of(running))


def test_confused_caches_are_found_out(engine):
    with engine() as running:
        probe = probe_of(running)
        assert "the same answer again" in said("caches are not confused", probe)
        running.faults.confuses_caches, running._seen = True, {}
        with pytest.raises(Broken, match="after the same image at another max_crops, 9 is taken for 1"):
            ENGINE_CHECKS["caches are not confused"](probe)


def test_answers_of_another_setting_are_found_out(engine):
    """The counts are right, and what is said is of the first time."""
    with engine() as running:
        probe, held = probe_of(running), []
        said("caches are not confused", probe)
        running.answer = lambda image, question, crops, knobs: held.append(crops) or f"at {held[:2][-1]}"
        with pytest.raises(Broken, match="it gives that one's answer, 'at 9', not"):
            ENGINE_CHECKS["caches are not confused"](probe)


@pytest.mark.parametrize(
    ("name", "options", "error", "says"),
    [
        ("prompts are the model's", {"faults": Faults(counts=False)}, Broken, "count no tokens"),
        ("answers are streamed", {"faults": Faults(pieces=False)}, Broken, "8 tokens came in one piece"),
        ("leaving ends the work", {"faults": Faults(deaf=True)}, Broken, "still works on the request"),
        ("leaving ends the work", {"token_ms": 0.0}, NotTold, "too short to tell"),
        ("tokens are told apart", {"details": False}, NotTold, "--enable-prompt-tokens-details"),
        ("times are told", {"metrics": False}, NotTold, "--enable-per-request-metrics"),
    ],
)
def test_what_an_engine_does_not_do_is_said(engine, monkeypatch, name, options, error, says):
    monkeypatch.setattr(verification, "LEAST_S", 0.25 if error is Broken else 60.0)
    with engine(**options) as running, pytest.raises(error, match=says):
        said(name, probe_of(running))


def test_images_that_are_drawn_anew_and_come_from_a_cache_are_found_out(engine, monkeypatch):
    monkeypatch.setattr(verification, "fresh_data_url", data_url)
    with engine() as running, pytest.raises(Broken, match="drawn anew come from a cache"):
        said("repeats", probe_of(running))


@pytest.mark.parametrize(
    ("throughput", "best"),
    [({1: 10.0, 2: 20.0, 4: 21.0}, 2), ({1: 10.0, 2: 11.5}, 2), ({1: 10.0, 2: 9.0}, 1), ({}, 1)],
)
def test_the_fewest_requests_in_flight_with_about_the_best_throughput(throughput, best):
    assert best_in_flight(throughput) == best


@pytest.mark.parametrize(
    ("rates", "measured"), [({1: 10.0, 2: 19.0, 4: 20.0, 8: 99.0}, [1, 2, 4]), ({1: 10.0, 2: 9.0}, [1, 2])]
)
def test_throughput_is_measured_until_it_no_longer_grows(engine, monkeypatch, rates, measured):
    monkeypatch.setattr(EngineProbe, "answers_per_s", lambda probe, in_flight: rates[in_flight])
    with engine() as running:
        probe = probe_of(running)
        ENGINE_CHECKS["several requests at once"](probe)
        assert list(probe.throughput) == measured


def test_throughput_is_that_of_requests_side_by_side(engine):
    with engine(first_ms=200.0) as running:
        assert 0 < probe_of(running).answers_per_s(2) <= 2 / 0.2
        assert running.most_running == 2 and len(running.asked) == 4


def test_an_engine_that_is_not_there_and_mistakes_are_one_message_and_exit_code_2(models, tmp_path, capsys):
    directory, _ = models["idefics3"]
    (tmp_path / "engines.yaml").write_text(yaml.safe_dump({"replicas": [{"url": "here"}], "model_path": "x"}))
    for words, message in (
        (["--engine", "http://127.0.0.1:9/v1", "--model_path", str(directory)], "no engine of http://127.0.0.1:9/v1"),
        (["--engine", str(tmp_path / "engines.yaml")], "replicas[0].url is 'here'"),
        ([], "name a model"),
        (["reference", "--repeats", "-1"], "repeats=-1"),
    ):
        assert cli.main(["check-model", *words]) == 2
        assert message in capsys.readouterr().err
