"""`budgetvlm check-model`: the page, the document, the exit codes, and what it says where a model cannot be checked."""

import io
import json
from types import SimpleNamespace

import pytest
import torch
from rich.console import Console
from tiny_families import write_tiny_family
from tiny_vlm import write_tiny_model
from torch import nn

from budgetvlm import cli
from budgetvlm.commands import check_model
from budgetvlm.errors import ConfigError
from budgetvlm.vlm import detect, knob_limits, load_vlm, loading, repositories
from budgetvlm.vlm.conformance import CHECKS, check, time_settings
from budgetvlm.vlm.families.base import find_dials
from budgetvlm.vlm.families.internvl import InternVL
from budgetvlm.vlm.families.mrope import QwenVL
from budgetvlm.vlm.probe import Probe, fastest, one_knob_at_a_time
from budgetvlm.vlm.prompt import DecoderInputs


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    return write_tiny_model(tmp_path_factory.mktemp("model"))


def run(words, capsys):
    code = cli.main(["check-model", *map(str, words)])
    return code, capsys.readouterr()


def test_a_good_model_gets_a_page_and_exit_code_0(directory, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "300")
    code, seen = run([directory, "--quick", "--repeats", "1"], capsys)
    assert code == 0
    for words in (
        "InternVLForConditionalGeneration",
        "top_k",
        "1, 2, 4",
        "All checks hold",
        "Time per setting",
        *CHECKS,
    ):
        assert words in seen.out, words
    assert "cached decoding is uncached decoding" in seen.err


def test_the_page_fits_a_terminal_of_80_columns(directory):
    """No word of its headings is folded, with times of seconds."""
    vlm = load_vlm(str(directory))
    probe = Probe(vlm, [check_model.made_up_image((90, 60))], ["what"])
    stages = dict.fromkeys(("preprocess", "vision", "prefill", "decode", "total"), 1234.5)
    console = Console(width=80, file=io.StringIO())
    times = dict.fromkeys(vlm.knob_space.settings, stages)
    console.print(check_model.page(check_model.document(vlm, probe, [], times)))
    words = console.file.getvalue().split()
    assert {"_crops", "top_k", "_blocks", "visual", "preprocess", "prefill", "decode", "total", "1234.5"} <= set(words)


def test_the_document_holds_everything(directory, capsys):
    code, seen = run([directory, "--quick", "--repeats", "1", "--json"], capsys)
    document = json.loads(seen.out)
    assert code == 0 and document["passed"] is True
    assert document["family"] == "InternVL" and document["dtype"] == "float32"
    assert [one["name"] for one in document["checks"]] == list(CHECKS)
    assert "language_model.layers.0.mlp.gate.top_k and 3 more; 4 of 6 experts" in document["found"]["top_k"]
    assert len(document["times_ms"]) == len(one_knob_at_a_time(load_vlm(str(directory)).knob_space)) == 8
    assert {"max_crops", "top_k", "num_active_blocks", "visual_tokens", "prefill", "total"} <= set(
        document["times_ms"][0]
    )


def test_a_knob_that_misses_a_router_is_found_out(directory, monkeypatch, capsys):
    monkeypatch.setattr(InternVL, "dials", lambda self, model: find_dials(model)[:2])
    code, seen = run([directory, "--quick", "--repeats", "0"], capsys)
    assert code == 1
    assert "2 routers still choose 4 experts" in " ".join(seen.out.split())


def test_questions_and_options_of_ones_own(directory, tmp_path, capsys):
    from budgetvlm.commands.check_model import made_up_image

    made_up_image((300, 200)).save(tmp_path / "own.png")
    words = [directory, "--quick", "--json", "--repeats", "0", "--image", tmp_path / "own.png", "--question", "code"]
    code, seen = run(words, capsys)
    document = json.loads(seen.out)
    assert code == 0 and document["image"] == [300, 200] and document["times_ms"] == []
    code, seen = run([directory, "--repeats", "-1"], capsys)
    assert code == 2 and "repeats=-1" in seen.err
    code, seen = run([directory, "--image", tmp_path / "none.png"], capsys)
    assert code == 2 and "does not exist" in seen.err


def probe_of(directory):
    from test_families import QUESTIONS, SIZES, picture

    vlm = load_vlm(str(directory))
    images = [picture(i, size) for i, size in enumerate(SIZES)]
    return Probe(vlm, images, QUESTIONS, one_knob_at_a_time(vlm.knob_space))


def broken(outcomes):
    return {one.name for one in outcomes if one.passed is False}


def test_a_gap_where_the_decoder_goes_by_place_is_found_out(tmp_path, monkeypatch):
    """Without stand-ins Gemma's sliding blocks would be given the masks of others, and of a cache not their own."""
    from budgetvlm.vlm.families.gemma3 import Gemma3

    directory = write_tiny_family("gemma3", tmp_path)
    whole = probe_of(directory)
    monkeypatch.setattr(Gemma3, "goes_by_place", lambda self, model: False)
    short = probe_of(directory)
    setting = whole.space.setting(**{**whole.space.full, "num_active_blocks": 4})
    with torch.inference_mode():
        assert not torch.allclose(whole.logits_at(setting), short.logits_at(setting), atol=1e-3)


def test_wrong_positions_are_found_out(tmp_path, monkeypatch):
    directory = write_tiny_family("qwen3_vl", tmp_path)
    assert broken(check(probe_of(directory))) == set()
    monkeypatch.setattr(QwenVL, "inputs_type", DecoderInputs)
    assert "full setting is the untouched model" in broken(check(probe_of(directory)))


@pytest.fixture
def config_only(tmp_path):
    def write(**fields):
        (tmp_path / "config.json").write_text(json.dumps(fields))
        return tmp_path

    return write


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"model_type": "llama", "hidden_size": 8}, "model of text alone"),
        ({"model_type": "molmo", "auto_map": {"AutoConfig": "x.Y"}, "vision_backbone": {}}, "--trust_remote_code"),
        ({"model_type": "internvl_chat", "auto_map": {"AutoModel": "x.Y"}, "vision_config": {}}, "-HF"),
        ({"model_type": "nobody", "vision_config": {}}, "its configuration cannot be read"),
    ],
)
def test_models_that_cannot_be_checked(config_only, fields, message, capsys):
    code, seen = run([config_only(**fields)], capsys)
    assert code == 2 and message in seen.err and "Traceback" not in seen.err


def test_what_was_found_of_an_unknown_family_is_listed(config_only, capsys, monkeypatch):
    """Aya Vision: no tiling at all; its decoder's blocks are found all the same."""
    small = {"hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 16}
    directory = config_only(
        model_type="aya_vision",
        text_config={"model_type": "gemma", **small, "num_key_value_heads": 1, "vocab_size": 50},
        vision_config={"model_type": "siglip_vision_model", **small},
    )  # fmt: skip
    monkeypatch.setattr(detect, "can_be_tried", lambda model_type: False)
    code, seen = run([directory], capsys)
    assert code == 2
    assert "model.language_model.layers (3)" in seen.err
    assert "no router with a top_k" in seen.err and "no limit found" in seen.err


def test_structure_is_read_off_any_model():
    block = nn.ModuleDict({"attention": nn.Linear(2, 2), "mlp": nn.Module()})
    block["mlp"].num_experts_per_tok = 2
    model = nn.ModuleDict({
        "vision": nn.ModuleDict({"blocks": nn.ModuleList([nn.ModuleDict({"attention": nn.Linear(2, 2)})] * 9)}),
        "decoder": nn.ModuleDict({"h": nn.ModuleList([block, nn.ModuleDict({"attention": nn.Linear(2, 2)})])}),
    })  # fmt: skip
    assert detect.find_blocks(model) == "decoder.h (2)"
    assert detect.find_routers(model) == {"decoder.h.0.mlp.num_experts_per_tok": 2}
    assert detect.limits(SimpleNamespace(max_crops=12, other=1)) == {"max_crops": 12}


def test_a_model_without_knobs(tmp_path, monkeypatch):
    directory = write_tiny_family("internvl_dense", tmp_path)
    monkeypatch.setattr(knob_limits, "unknown_kinds", lambda language: ["mystery"])
    monkeypatch.setattr("budgetvlm.vlm.families.base.Images.crop_values", lambda self: [1])
    with pytest.raises(ConfigError, match="no knob to turn"):
        load_vlm(str(directory))


def test_blocks_of_a_foreign_kind_cannot_be_skipped(tmp_path, monkeypatch):
    directory = write_tiny_family("internvl_dense", tmp_path)
    monkeypatch.setattr("budgetvlm.vlm.families.base.unknown_kinds", lambda language: ["mystery"])
    with pytest.raises(ConfigError, match=r"mystery.*num_active_blocks one value"):
        load_vlm(str(directory))


RESPONSE = SimpleNamespace(headers={}, request=None)


def test_repositories_that_cannot_be_had(monkeypatch, capsys):
    from huggingface_hub import errors

    reasons = {
        "is gated": errors.GatedRepoError("gated", response=RESPONSE),
        "no model 'org/name' on the hub": errors.RepositoryNotFoundError("missing", response=RESPONSE),
        "cannot be fetched: it broke": errors.HfHubHTTPError("it broke", response=RESPONSE),
        "cannot be fetched: no space": OSError("no space"),
    }
    for message, reason in reasons.items():
        monkeypatch.setattr("huggingface_hub.snapshot_download", raising(reason))
        code, seen = run(["org/name"], capsys)
        assert code == 2 and message in seen.err


def raising(error):
    def call(*args, **kwargs):
        raise error

    return call


def test_offline_and_not_in_the_cache(capsys, monkeypatch, tmp_path):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    code, seen = run(["nobody-here/no-such-model"], capsys)
    assert code == 2 and "offline" in seen.err


def test_a_hub_name_is_fetched_and_a_directory_is_not(monkeypatch, directory, tmp_path):
    asked = []
    monkeypatch.setattr(
        "huggingface_hub.snapshot_download", lambda name, **options: asked.append(options) or str(directory)
    )
    assert loading.model_directory("org/name") == directory
    assert loading.model_directory(str(directory)) == directory
    assert "*.py" not in asked[0]["allow_patterns"] and len(asked) == 1
    repositories.fetch("org/name", trust_remote_code=True)
    assert "*.py" in asked[1]["allow_patterns"]
    monkeypatch.chdir(tmp_path)
    (tmp_path / "org" / "name").mkdir(parents=True)
    assert not repositories.is_hub_name("org/name")


def test_verdicts_fall_one_by_one_behind_an_estimate(directory):
    told, seen = [], probe_of(directory)
    outcomes = check(seen, told.append)
    assert told[0].startswith("about ") and told[0].endswith(f"{len(CHECKS)} checks at 8 settings")
    words = {True: "holds", False: "BROKEN", None: "left out"}
    assert told[1:] == [f"{words[o.passed]}: {o.name}: {o.detail}" for o in outcomes]


@pytest.mark.parametrize("name", ["idefics3", "qwen2_5_vl"])
def test_checks_encode_each_picture_once_for_each_number_of_crops(tmp_path, monkeypatch, name):
    """Beside the model's own forward, which is compared with; after the checks encoding is as before."""
    seen = probe_of(write_tiny_family(name, tmp_path))
    images, encoded = seen.vlm.images, []
    tiled = hasattr(images, "encode_tiles")
    own = type(images).encode_tiles if tiled else type(images).encode
    monkeypatch.setattr(
        type(images),
        "encode_tiles" if tiled else "encode",
        lambda self, pixels, *layouts: encoded.append(len(pixels)) or own(self, pixels, *layouts),
    )
    seen = Probe(seen.vlm, seen.images, seen.questions, seen.settings)
    assert broken(check(seen)) == set()
    crops = [int(value) for value in seen.space.values("max_crops")]
    most = sum(len(images.all(seen.images[0], value)) if tiled else 1 for value in crops)
    # the second picture is encoded at the fewest crops alone; the estimate encodes the first one again
    assert sum(encoded) <= most + 4 and "encode_tiles" not in vars(images) and "encode" not in vars(images)


def test_what_takes_long_is_not_timed_again():
    slow, quick = iter([{"a": 1500.0}, {"a": 1.0}]), iter([{"a": 3.0}, {"a": 2.0}, {"a": 1.0}, {"a": 0.5}])
    assert fastest(lambda: next(slow), 3) == {"a": 1500.0}
    assert fastest(lambda: next(quick), 2) == {"a": 1.0}  # the first one warms up


def test_times_of_a_setting_hold_all_stages(directory):
    seen = probe_of(directory)
    check(seen)
    times = time_settings(seen, repeats=1)
    assert list(times) == seen.settings
    for stages in times.values():
        assert list(stages) == ["preprocess", "vision", "prefill", "decode", "total"]
        assert stages["total"] == pytest.approx(sum(list(stages.values())[:-1])) and min(stages.values()) > 0


def test_a_package_that_is_missing_is_named(tmp_path, monkeypatch):
    def load(self, directory, **options):
        raise ImportError("TimmWrapperModel requires the timm library: pip install timm")

    monkeypatch.setattr(QwenVL, "load", load)
    with pytest.raises(ConfigError, match="pip install timm"):
        load_vlm(str(write_tiny_family("qwen3_vl", tmp_path)))
