"""BudgetVLM as a model of lmms-eval: what its arguments may be, and a run of the real program where it is installed."""

import json
import os
import subprocess
import sys
import textwrap
from types import SimpleNamespace

import pytest
from PIL import Image
from tiny_vlm import KNOBS, write_tiny_model

from budgetvlm.cli import main
from budgetvlm.controller.network import GRPOController
from budgetvlm.errors import ConfigError, InputError, KnobSpaceError
from budgetvlm.integrations.lmms import (
    ModelArgs,
    cut,
    longest_answer,
    one_image,
    open_model,
    question_of,
    summary,
)
from budgetvlm.knobs import KnobSpace
from budgetvlm.table import ProfileTable
from budgetvlm.vlm import load_vlm

SPACE = KnobSpace(KNOBS)
QUESTION = "what is the red sign"
BOUNDS = [1000.0 * (k + 1) for k in range(len(SPACE))]  # far above what the tiny model takes


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    return write_tiny_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def controller(tmp_path_factory):
    """Prefers the dearest setting that its bounds allow."""
    made = GRPOController(
        image_feat_dim=64, lang_feat_dim=32, knob_values=KNOBS, bounds_ms=BOUNDS, hidden_dim=8
    )  # fmt: skip
    made.start_from([k / len(SPACE) for k in range(len(SPACE))])
    path = tmp_path_factory.mktemp("controller")
    made.save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def picture():
    return Image.linear_gradient("L").resize((256, 192)).convert("RGB")


def test_arguments_as_lmms_eval_reads_them():
    args = ModelArgs.parse(
        {
            "pretrained": "m",
            "controller": "c",
            "budget_ms": 80,
            "batch_size": "1",
            "max_batch_size": None,
            "device": None,
        }
    )
    assert args == ModelArgs("m", "c", 80)
    fixed = ModelArgs.parse({"max_crops": 4, "top_k": 2, "num_active_blocks": 8, "batch_size": 1})
    assert fixed.knobs == (("max_crops", 4), ("top_k", 2), ("num_active_blocks", 8))


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ({}, "given: neither"),
        ({"budget_ms": 5, "top_k": 2}, "given: both"),
        ({"budget_ms": -5}, "not a positive number of milliseconds"),
        ({"budget_ms": 5, "when_infeasible": "reject"}, "leaves samples without an answer"),
        ({"budget_ms": 5, "max_new_tokens": 0}, "max_new_tokens=0"),
        ({"top_k": 2, "controller": "c"}, "nothing to choose beside a fixed setting"),
        ({"budget_m": 5}, "has no budget_m.*Did you mean budget_ms?"),
        ({"budget_ms": 5, "batch_size": "8"}, "batch_size=8: requests are answered one at a time"),
    ],
)
def test_arguments_that_cannot_work(words, message):
    with pytest.raises(ConfigError, match=message):
        ModelArgs.parse(words)


def test_a_request_within_a_budget_says_what_it_cost(directory, controller, picture):
    ask = open_model(ModelArgs(str(directory), str(controller), budget_ms=5_900))
    text, record = ask(picture, QUESTION, 3)
    assert record["setting"] == dict(SPACE.settings[4])  # the bound of setting k is 1000 (k + 1) ms
    assert (record["budget_ms"], record["budget_met"], record["feasible"]) == (5_900, True, True)
    assert sum(record["stages_ms"].values()) <= record["latency_ms"] + 0.01
    assert record["input_tokens"] > record["vision_tokens"] > 0 and isinstance(text, str)
    json.dumps(record)


def test_a_fixed_setting_answers_as_the_model_does(directory, picture):
    setting = {"max_crops": 2, "top_k": 1, "num_active_blocks": 3}
    text, record = open_model(ModelArgs(str(directory), knobs=tuple(setting.items())))(picture, QUESTION, 3)
    alone = load_vlm(str(directory)).generate(picture, QUESTION, SPACE.setting(**setting), max_new_tokens=3)
    assert (text, record["setting"], record["output_tokens"]) == (alone.text, setting, alone.num_output_tokens)
    assert "budget_met" not in record
    with pytest.raises(KnobSpaceError, match="top_k=3 is outside the knob space"):
        open_model(ModelArgs(str(directory), knobs=tuple((setting | {"top_k": 3}).items())))


def test_what_tasks_ask_for():
    picture = Image.new("RGB", (2, 2))
    assert one_image([picture], "x") is picture and one_image([[picture]], "x") is picture
    for visuals, found in (([], "nothing"), ([picture, picture], "Image, Image"), (["film.mp4"], "str")):
        with pytest.raises(InputError, match=f"sample 3 of t has {found} to be seen"):
            one_image(visuals, "sample 3 of t")
    assert question_of("<image>\nwhat is it <image>") == "what is it"
    assert question_of(" A.\nB. ") == "A.\nB."
    assert cut("one\n\ntwo</s>", {"until": ["</s>", "\n\n", ""]}) == "one" and cut("a b", {"until": " "}) == "a"
    assert longest_answer(ModelArgs(budget_ms=1), {"max_new_tokens": 5}) == 5
    assert longest_answer(ModelArgs(budget_ms=1, max_new_tokens=2), {"max_new_tokens": 5}) == 2
    assert longest_answer(ModelArgs(budget_ms=1), {}) == 16


def test_the_summary_of_a_run():
    records = [{"latency_ms": float(ms), "budget_met": ms <= 80} for ms in range(1, 101)]
    assert summary(records) == {"p50_latency_ms": 51.0, "p95_latency_ms": 95.0, "violation_rate": pytest.approx(0.2)}
    assert "violation_rate" not in summary([{"latency_ms": 1.0}])


def test_the_class_keeps_the_order_and_refuses_what_it_cannot(directory, picture):
    pytest.importorskip("lmms_eval")
    from budgetvlm.integrations.lmms_model import BudgetVLM

    model = BudgetVLM(pretrained=str(directory), max_crops=1, top_k=1, num_active_blocks=2, batch_size="1")
    model.task_dict = {"t": {"test": [{"image": picture}, {"image": picture.rotate(90)}]}}
    requests = [
        SimpleNamespace(args=(QUESTION, {"max_new_tokens": 2}, lambda doc: [doc["image"]], doc_id, "t", "test"),
                        task_name="t") for doc_id in (1, 0)
    ]  # fmt: skip
    results = model.generate_until(requests)
    again = [model.ask(model.task_dict["t"]["test"][doc_id]["image"], QUESTION, 2)[0] for doc_id in (1, 0)]
    assert [result.text for result in results] == again
    assert results[0].token_counts.to_dict()["setting"]["top_k"] == 1
    with pytest.raises(ConfigError, match="t asks for loglikelihood"):
        model.loglikelihood(requests)


TASK = """
    task: signs_local
    dataset_path: json
    dataset_kwargs:
      data_files:
        test: {folder}/docs.jsonl
    test_split: test
    output_type: generate_until
    doc_to_visual: !function signs_utils.doc_to_visual
    doc_to_text: question
    doc_to_target: answer
    generation_kwargs:
      max_new_tokens: 8
    metric_list:
      - metric: exact_match
        aggregation: mean
        higher_is_better: true
"""


@pytest.fixture
def local_task(tmp_path):
    """A task file with its data: three questions of the bundled task."""
    from itertools import islice

    from budgetvlm.tasks import load_task

    folder = tmp_path / "task"
    folder.mkdir()
    lines = []
    for number, sample in enumerate(islice(load_task("signs").samples("test"), 3)):
        sample.load_image().save(folder / f"{number}.png")
        line = {"image": str(folder / f"{number}.png"), "question": sample.question, "answer": sample.answers[0]}
        lines.append(json.dumps(line))
    (folder / "docs.jsonl").write_text("\n".join(lines) + "\n")
    (folder / "signs_local.yaml").write_text(textwrap.dedent(TASK.format(folder=folder)))
    (folder / "signs_utils.py").write_text(
        "from PIL import Image\n\n\ndef doc_to_visual(doc):\n    return [Image.open(doc['image']).convert('RGB')]\n"
    )
    return folder


def test_lmms_eval_evaluates_the_bundled_model_within_a_budget(tmp_path, local_task):
    """The program itself, as a user calls it; the entry point is that of the installed package."""
    pytest.importorskip("lmms_eval")
    budget_ms = 100_000
    vlm = load_vlm("reference")
    overview, question = vlm.encode_overview(Image.new("RGB", (256, 192))), vlm.question_feature("read")
    made = GRPOController(
        image_feat_dim=len(overview.feature), lang_feat_dim=len(question), knob_values=vlm.knob_space.to_dict(),
        bounds_ms=[1.0] * len(vlm.knob_space), hidden_dim=8,
    )  # fmt: skip
    made.start_from([k / len(vlm.knob_space) for k in range(len(vlm.knob_space))])
    made.save_pretrained(tmp_path / "controller")
    command = [sys.executable, "-m", "lmms_eval", "--model", "budgetvlm", "--model_args",
               f"pretrained=reference,controller={tmp_path / 'controller'},budget_ms={budget_ms}", "--tasks",
               "signs_local", "--include_path", local_task, "--batch_size", "1", "--log_samples", "--output_path",
               tmp_path / "out"]  # fmt: skip
    offline = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "HF_HOME": str(tmp_path / "cache")}
    done = subprocess.run(
        list(map(str, command)), env=os.environ | offline, capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    (log,) = (tmp_path / "out").rglob("*_samples_signs_local.jsonl")
    samples = [json.loads(line) for line in log.read_text().splitlines()]
    assert [sample["doc_id"] for sample in samples] == [0, 1, 2]
    for sample in samples:
        (cost,) = sample["token_counts"]
        assert cost["setting"] == dict(vlm.knob_space.full)  # the dearest of those allowed
        assert cost["budget_met"] is True and 0 < cost["latency_ms"] < budget_ms
    (results,) = (tmp_path / "out").rglob("*_results.json")
    assert main(["import", "lmms", "--run", str(tmp_path / "out"), "--output", str(tmp_path / "t.parquet")]) == 0
    table = ProfileTable.load(tmp_path / "t.parquet")
    assert table.latency_ms[:, 0] == pytest.approx([sample["token_counts"][0]["latency_ms"] for sample in samples])
    document = json.loads(results.read_text())
    assert document["throughput"]["avg_violation_rate"] == 0
    assert document["results"]["signs_local"]["exact_match,none"] == sum(s["exact_match"] for s in samples) / 3
