"""Exported checkpoints against the steered model: logits of plain Transformers, what is copied, and what is refused."""

import errno
import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from test_families import QUESTIONS, SIZES, picture
from tiny_families import write_tiny, write_tiny_family
from tiny_found import FOUND, FOUND_TOKENS
from tiny_molmo import write_tiny_molmo
from tiny_more_families import BUILDERS
from transformers import AutoConfig, AutoModelForImageTextToText

from budgetvlm.cli import main
from budgetvlm.errors import CheckpointError, ConfigError, KnobSpaceError, OutputError
from budgetvlm.vlm import cut_weights, exporting, load_vlm
from budgetvlm.vlm.conformance import check
from budgetvlm.vlm.cut_config import changes
from budgetvlm.vlm.cut_weights import INDEX, KeptBlocks, list_of_blocks, read_tensors
from budgetvlm.vlm.exporting import NOTE, ExportOptions, export
from budgetvlm.vlm.probe import Probe, one_knob_at_a_time, setting_with

CLOSE = 1e-5  # standard deviations of the logits


def written(directory, output, **options):
    """The note of an export that compares no logits itself."""
    return export(ExportOptions(str(directory), output, **{"verify": False} | options))


def small_values(vlm, depth=0):
    """Few blocks, fewest experts."""
    space = vlm.knob_space
    values = {"num_active_blocks": int(space.values("num_active_blocks")[depth])}
    return values | ({"top_k": int(space.values("top_k")[0])} if "top_k" in space.names else {})


def plain_model(directory, dtype=torch.float32):
    """The model by Transformers alone, every weight used."""
    config = AutoConfig.from_pretrained(directory)
    model, info = AutoModelForImageTextToText.from_pretrained(
        directory, config=getattr(config, "thinker_config", config), dtype=dtype, output_loading_info=True
    )
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    return model.eval()


@torch.inference_mode()
def apart(vlm, values, model):
    """How far the steered model's logits are from those of another model's own forward, and how far its full ones."""
    probe, setting = Probe(vlm, [picture(0, SIZES[0])], QUESTIONS[:1]), setting_with(vlm.knob_space, **values)
    prompt, crops = probe.prompt(probe.crops(setting)), probe.crops(setting)
    told = vlm.images.plain(probe.images[0], crops) | vlm.family.plain_arguments(prompt, vlm.model)
    wanted = vlm.family.untouched_logits(model, prompt, told)
    both = probe.logits_at(setting), probe.logits_at(vlm.knob_space.full)
    return [float((got - wanted).abs().max() / wanted.std()) for got in both]


@pytest.mark.parametrize("name", BUILDERS)
def test_an_export_of_every_family_is_the_steered_model(models, tmp_path, name):
    vlm = models(name)
    depth = -2 if vlm.family.deepstack_levels(vlm.model) else 0
    values = small_values(vlm, depth)
    note = written(vlm.name, tmp_path / "out", **values)
    close, whole = apart(vlm, values, plain_model(tmp_path / "out"))
    assert close < CLOSE and whole > 100 * CLOSE
    assert note["setting"] == values and note["blocks_kept"] == list(vlm.active_blocks(values["num_active_blocks"]))


@pytest.mark.parametrize("name", ["deepseek_ocr2", "vipllava"])
def test_so_is_one_of_a_type_whose_knobs_were_found(tmp_path, monkeypatch, name):
    """DeepSeek-OCR: a dense first block, shared experts, and an image reader that is made like a language model."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    (tmp_path / name).mkdir()
    write_tiny(*FOUND[name](), tmp_path / name, FOUND_TOKENS)
    vlm = load_vlm(str(tmp_path / name))
    assert written(vlm.name, tmp_path / "out", **small_values(vlm))["apart"] < CLOSE  # verified in any case
    assert apart(vlm, small_values(vlm), plain_model(tmp_path / "out"))[0] < CLOSE


def test_the_bundled_model_is_exported_and_checked_by_the_command(tmp_path, capsys):
    out = tmp_path / "out"
    words = ["export", "--num_active_blocks", "4", "--top_k", "2", "--output", str(out), "--json"]
    assert main(words) == 0
    note = json.loads(capsys.readouterr().out)
    assert note["apart"] < CLOSE and note["setting"] == {"top_k": 2, "num_active_blocks": 4}
    assert note["model"] == "reference" and note["blocks_kept"] == [0, 1, 2, 7] and note["blocks_of_the_model"] == 8
    assert {path.name for path in out.iterdir()} == set(note["files"]) == {
        "config.json", "generation_config.json", "knobs.json", "model.safetensors", "preprocessor_config.json",
        "tokenizer.json", "tokenizer_config.json", NOTE,
    }  # fmt: skip
    assert json.loads((out / "knobs.json").read_text()) == {
        "knob_space": {"max_crops": [1, 4, 12], "top_k": [1, 2], "num_active_blocks": [3, 4]},
        "block_order": [0, 3, 1, 2], "prompt": "<img>{image}</img>{question}<a>",
    }  # fmt: skip


@pytest.mark.parametrize(("name", "depth"), [("qwen2_vl", 1), ("qwen3_5_moe", 1), ("gemma4_shared", 1), ("llava", 0)])
def test_an_export_can_be_steered_further_and_holds_all_checks(models, tmp_path, name, depth):
    """Also where one value is left of a model's only knob."""
    vlm, depths = models(name), models(name).knob_space.values("num_active_blocks")
    written(vlm.name, tmp_path / "out", num_active_blocks=int(depths[depth]))
    smaller = load_vlm(str(tmp_path / "out"))
    images = [picture(i, size) for i, size in enumerate(SIZES)]
    outcomes = check(Probe(smaller, images, QUESTIONS, one_knob_at_a_time(smaller.knob_space)))
    assert [f"{one.name}: {one.detail}" for one in outcomes if one.passed is False] == []
    values = {"num_active_blocks": int(depths[0])}
    both = [Probe(one, images[:1], QUESTIONS[:1]) for one in (vlm, smaller)]
    got, wanted = (probe.logits_at(setting_with(probe.space, **values)) for probe in both)
    assert torch.allclose(got, wanted, atol=1e-5)


# ---- weights


def test_weights_keep_their_bytes_their_types_and_their_shards(tmp_path):
    source, out = write_tiny_family("qwen2_vl", tmp_path / "model"), tmp_path / "out"
    weights = load_file(source / "model.safetensors")
    weights = {name: value.bfloat16() if "mlp" in name else value for name, value in weights.items()}
    (source / "model.safetensors").unlink()
    shards = {"a": [], "b": [], "c": []}  # c holds nothing but a block that goes
    for name in weights:
        shards["c" if "layers.1." in name else "b" if "layers." in name else "a"].append(name)
    for shard, names in shards.items():
        save_file({name: weights[name] for name in names}, source / f"{shard}.safetensors", {"format": "pt"})
    places = {name: f"{shard}.safetensors" for shard, names in shards.items() for name in names}
    (source / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": places}))
    save_file({"other": torch.ones(2)}, source / "consolidated.safetensors")

    written(source, out, num_active_blocks=3)  # 0, 1, 3: the last one becomes 2
    index = json.loads((out / INDEX).read_text())
    files = sorted(path.name for path in out.glob("*.safetensors"))
    assert files == [f"model-0000{i}-of-00003.safetensors" for i in (1, 2, 3)]
    got = {name: value for file in files for name, value in load_file(out / file).items()}
    prefix = list_of_blocks(list(weights), 4)
    old = {name.replace(f"{prefix}.2.", f"{prefix}.3."): name for name in got}
    assert set(old.values()) == set(got) == set(index["weight_map"]) and set(old) < set(weights)
    for name, value in weights.items():
        assert (name in old) == (f"{prefix}.2." not in name)
        if name in old:
            assert got[old[name]].dtype == value.dtype and torch.equal(got[old[name]], value)
    assert index["metadata"]["total_size"] == sum(value.nbytes for value in got.values())
    assert read_tensors(out / files[0])[1] == {"format": "pt"}

    written(source, out, num_active_blocks=2, overwrite=True)
    assert len(list(out.glob("*.safetensors"))) == 2  # c is gone


def test_tied_weights_stay_tied(models, tmp_path):
    vlm = models("glm_ocr")
    written(vlm.name, tmp_path / "out", num_active_blocks=2)
    assert not any("lm_head" in name for name in load_file(tmp_path / "out" / "model.safetensors"))
    model = plain_model(tmp_path / "out")
    assert model.lm_head.weight is model.get_input_embeddings().weight


def test_large_tensors_are_copied_piece_by_piece(tmp_path, monkeypatch):
    """Also those that have a part for each block, of which the kept ones are cut out."""
    import tracemalloc
    from contextlib import nullcontext
    from types import SimpleNamespace

    monkeypatch.setattr(cut_weights, "PIECE", 1 << 16)
    source, out = tmp_path / "model", tmp_path / "out"
    source.mkdir(), out.mkdir()
    generator = torch.Generator().manual_seed(0)
    table = torch.randn(3001, 4 * 96, generator=generator).half()
    projection, big = torch.randn(4 * 96, 65, generator=generator), torch.randn(1500, 1001, generator=generator)
    names = {f"language_model.layers.{i}.self_attn.weight": torch.full((2,), float(i)) for i in range(4)}
    parts = {"embed_tokens_per_layer.weight": table, "per_layer_model_projection.weight": projection, "big": big}
    save_file(names | parts, source / "model.safetensors")
    seen = []
    tracemalloc.start()
    bar = SimpleNamespace(update=seen.append)
    cut_weights.cut_weights(source, out, KeptBlocks((0, 1, 3), 4), lambda total: nullcontext(bar))
    assert tracemalloc.get_traced_memory()[1] < 2e6 < big.nbytes
    tracemalloc.stop()
    got = load_file(out / "model.safetensors")
    assert torch.equal(got["big"], big) and sum(seen) == sum(value.nbytes for value in got.values())
    assert torch.equal(got["embed_tokens_per_layer.weight"], table.view(-1, 4, 96)[:, [0, 1, 3]].flatten(1))
    assert torch.equal(got["per_layer_model_projection.weight"], projection.view(4, 96, 65)[[0, 1, 3]].flatten(0, 1))
    assert got["language_model.layers.2.self_attn.weight"].tolist() == [3, 3]


@pytest.mark.parametrize(
    ("lists", "found"),
    [
        ({"model.layers": 4, "visual.blocks": 4}, "model.layers"),
        ({"model.layers": 4, "model.qwen2_model.layers": 6}, "model.layers"),
        ({"model.layers": 5, "visual.blocks": 4}, "model.layers"),  # one more predicts further tokens
        ({"thinker.model.layers": 4, "talker.model.layers": 4}, "thinker.model.layers"),
        ({"language_model.model.encoder.layers": 4, "vision_model.encoder.layers": 4},
         "language_model.model.encoder.layers"),
        ({"model.layers": 4, "model.encoder.layers": 4}, "model.layers"),
        ({"one.layers": 4, "other.layers": 4}, None),
        ({"model.layers": 3}, None),
    ],
)  # fmt: skip
def test_blocks_are_found_by_their_names(lists, found):
    names = [f"{prefix}.{i}.attn.weight" for prefix, count in lists.items() for i in range(count)]
    names += [f"neck.{i}.weight" for i in range(4)] + ["model.norm.weight"]
    if found:
        assert list_of_blocks(names, 4) == found
        return
    with pytest.raises(ConfigError, match="cannot be told from others"):
        list_of_blocks(names, 4)


def test_blocks_that_predict_further_tokens_stay_behind_the_last():
    kept = KeptBlocks((0, 2, 3), 4)
    assert [kept.place(i) for i in range(6)] == [0, None, 1, 2, 3, 4]


# ---- configurations as public checkpoints have them


def rewritten(directory, change):
    """Change a model's config.json."""
    path = directory / "config.json"
    held = json.loads(path.read_text())
    path.write_text(json.dumps(change(held) or held))
    return directory


def flat(held):
    """As Qwen2-VL's: fields of the language model stand among the others."""
    text = held.pop("text_config")
    return {**{k: v for k, v in text.items() if k not in ("model_type", "layer_types")}, **held}


def bare(held):
    """Without what is computed from other fields."""
    del held["text_config"]["layer_types"]


def twice(held):
    """As some of Qwen2.5-VL's: both."""
    return {**held["text_config"], **held}


@pytest.mark.parametrize("change", [flat, bare, twice])
def test_a_configuration_keeps_its_layout(tmp_path, change):
    source = rewritten(write_tiny_family("qwen2_vl", tmp_path / "model"), change)
    before, vlm = json.loads((source / "config.json").read_text()), load_vlm(str(source))
    written(source, tmp_path / "out", num_active_blocks=2)
    after = json.loads((tmp_path / "out" / "config.json").read_text())
    parts = [("text_config",)] if change is bare else [()] if change is flat else [(), ("text_config",)]
    for part in parts:
        old, new = (held[part[0]] if part else held for held in (before, after))
        assert (old["num_hidden_layers"], new["num_hidden_layers"]) == (4, 2)
    assert apart(vlm, {"num_active_blocks": 2}, plain_model(tmp_path / "out"))[0] < CLOSE
    changed = {name for name in before if before[name] != after[name]} | after.keys() - before.keys()
    own = {"num_hidden_layers", "layer_types", "max_window_layers"} if change is not bare else set()
    assert changed <= own | ({"text_config"} if change is not flat else set())


def test_the_number_of_blocks_is_written_where_the_original_leaves_it_to_a_default(tmp_path):
    """As LLaVA 1.5's language model, of which the file says little."""
    held = {"model_type": "llava", "text_config": {"model_type": "llama", "torch_dtype": "float16"}}
    (tmp_path / "config.json").write_text(json.dumps(held))
    text = AutoConfig.for_model("llava", text_config=held["text_config"]).text_config
    kept = KeptBlocks(tuple(range(12)), text.num_hidden_layers)
    exporting.write_config(tmp_path / "config.json", tmp_path / "new.json", text, changes(text, kept, None))
    assert json.loads((tmp_path / "new.json").read_text())["text_config"]["num_hidden_layers"] == 12


def test_experts_in_every_other_block_are_named_one_by_one(tmp_path):
    source = tmp_path / "model"
    config, *others = BUILDERS["qwen3_vl_moe"]()
    config.text_config.decoder_sparse_step, config.vision_config.deepstack_visual_indexes = 2, []
    write_tiny(config, *others, source)
    vlm = load_vlm(str(source))
    written(source, tmp_path / "out", num_active_blocks=3)
    text = json.loads((tmp_path / "out" / "config.json").read_text())["text_config"]
    assert (text["decoder_sparse_step"], text["mlp_only_layers"]) == (1, [0])  # of 0 dense, 1 sparse, 3 sparse
    assert apart(vlm, {"num_active_blocks": 3}, plain_model(tmp_path / "out"))[0] < CLOSE


def test_a_number_that_is_no_routers_stays(models):
    """Old files have a `top_k` of sampling beside that of the experts."""
    text = AutoConfig.for_model("qwen3_moe", num_hidden_layers=4, num_experts_per_tok=8, top_k=50)
    assert changes(text, KeptBlocks((0, 1, 2, 3), 4), 2, {8}) == {"num_experts_per_tok": 2}


# ---- what is refused, and what is left then


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return write_tiny_family("qwen3_vl_moe", tmp_path_factory.mktemp("model"))


def test_a_block_behind_which_features_are_added_is_not_skipped(source, tmp_path):
    with pytest.raises(ConfigError, match=r"first 2 blocks, and this setting keeps only \[0, 3\]"):
        written(source, tmp_path / "out", num_active_blocks=2)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("values", "error", "message"),
    [
        ({"num_active_blocks": 5}, KnobSpaceError, "num_active_blocks=5 is outside the knob space; allowed: 2, 3, 4"),
        ({"top_k": 6}, KnobSpaceError, "top_k=6 is outside"),
        ({}, ConfigError, "is the whole model .* would be a copy"),
        ({"num_active_blocks": 4, "top_k": 4}, ConfigError, "is the whole model"),
    ],
)
def test_a_setting_that_is_none_or_the_whole_model_is_refused(source, tmp_path, values, error, message):
    with pytest.raises(error, match=message):
        written(source, tmp_path / "out", **values)


def test_a_copy_can_be_asked_for(source, tmp_path):
    written(source, tmp_path / "out", copy=True)
    for name in ("config.json", "tokenizer.json"):
        assert json.loads((tmp_path / "out" / name).read_text()) == json.loads((source / name).read_text())


def test_a_dense_model_has_no_experts_to_leave_out(models, tmp_path):
    with pytest.raises(ConfigError, match="has no knob top_k"):
        written(models("llava").name, tmp_path / "out", top_k=1)


def test_lists_that_name_blocks_in_an_unknown_way_are_refused():
    text = AutoConfig.for_model("mllama_text_model", num_hidden_layers=8, cross_attention_layers=[3, 5])
    with pytest.raises(ConfigError, match=r"cross_attention_layers=\[3, 5\] .* not known"):
        changes(text, KeptBlocks((0, 1, 7), 8), None)


def test_a_configuration_that_says_something_else_is_found_out(models, tmp_path, monkeypatch):
    """As it would be where a list was not cut."""

    def forgetful(*args):
        return {k: v for k, v in changes(*args).items() if k != "layer_types"} | {"layer_types": ["full_attention"] * 3}

    monkeypatch.setattr(exporting, "changes", forgetful)
    with pytest.raises(ConfigError, match=r"block 0: .* is full_attention instead of sliding_attention"):
        written(models("gemma3").name, tmp_path / "out", num_active_blocks=3)
    assert list(tmp_path.iterdir()) == []


def test_other_weights_are_found_out_by_their_logits(source, tmp_path, monkeypatch):
    turned = {
        "language_model.layers.0.": "language_model.layers.1.",
        "language_model.layers.1.": "language_model.layers.0.",
    }
    renamed = cut_weights.renamed

    def swapped(*args):
        for name, one in renamed(*args):
            mark = next((mark for mark in turned if mark in name), "")
            yield name.replace(mark, turned.get(mark, "")), one

    monkeypatch.setattr(cut_weights, "renamed", swapped)
    with pytest.raises(ConfigError, match=r"logits by .* standard deviations"):
        written(source, tmp_path / "out", num_active_blocks=3, verify=True)
    assert list(tmp_path.iterdir()) == []


def test_quantisation_that_names_single_blocks_is_refused(source, tmp_path):
    shutil.copytree(source, tmp_path / "model")
    rewritten(tmp_path / "model", lambda held: held | {"quantization_config": {"ignore": ["model.layers.3.mlp"]}})
    with pytest.raises(ConfigError, match="names single blocks"):
        written(tmp_path / "model", tmp_path / "out", num_active_blocks=3)


def test_pickled_weights_get_the_known_message(source, tmp_path):
    shutil.copytree(source, tmp_path / "model")
    (tmp_path / "model" / "model.safetensors").rename(tmp_path / "model" / "pytorch_model.bin")
    with pytest.raises(ConfigError, match=r"pytorch_model.bin, a pickle"):
        written(tmp_path / "model", tmp_path / "out", num_active_blocks=3)


def cut_short(directory):
    path = directory / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


def without_a_shard(directory):
    (directory / "model.safetensors").rename(directory / "model-1.safetensors")
    (directory / INDEX).write_text(json.dumps({"weight_map": {"a": "model-1.safetensors", "b": "model-2.safetensors"}}))


def without_places(directory):
    (directory / "model.safetensors").rename(directory / "model-1.safetensors")
    (directory / INDEX).write_text("{}")


@pytest.mark.parametrize(
    ("damage", "message"),
    [(cut_short, r"model\.safetensors cannot be read"), (without_a_shard, r"model-2\.safetensors cannot be read"),
     (without_places, "says of no weight where it lies")],
)  # fmt: skip
def test_a_damaged_file_is_named(source, tmp_path, damage, message):
    shutil.copytree(source, tmp_path / "model")
    damage(tmp_path / "model")
    with pytest.raises(CheckpointError, match=message):
        written(tmp_path / "model", tmp_path / "out", num_active_blocks=3)
    assert {path.name for path in tmp_path.iterdir()} == {"model"}


def test_code_that_comes_with_a_model_is_copied_and_runs(tmp_path, monkeypatch):
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    (tmp_path / "model").mkdir()
    source, out = write_tiny_molmo(tmp_path / "model"), tmp_path / "out"
    with pytest.raises(ConfigError, match="trust_remote_code"):
        written(source, out, num_active_blocks=3)
    note = written(source, out, num_active_blocks=3, trust_remote_code=True, verify=True)
    assert note["apart"] < CLOSE and "tiny_code.py" in note["files"]
    assert [len(load_vlm(str(one), trust_remote_code=True).layers) for one in (source, out)] == [4, 3]


# ---- the output


def test_nothing_of_the_users_is_replaced(source, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    written(source, out, top_k=1)  # an empty directory is no loss
    with pytest.raises(OutputError, match=r"holds an earlier export\. Add --overwrite"):
        written(source, out, top_k=2)
    written(source, out, top_k=2, overwrite=True)
    assert json.loads((out / NOTE).read_text())["setting"]["top_k"] == 2
    (out / "mine.txt").write_text("notes")
    with pytest.raises(OutputError, match=r"holds mine\.txt beside"):
        written(source, out, top_k=1, overwrite=True)
    (out / NOTE).unlink()
    with pytest.raises(OutputError, match="is no earlier export"):
        written(source, out, top_k=1, overwrite=True)
    for place in (source / "small", source, source.parent):
        with pytest.raises(OutputError, match="lies within the model's directory or holds it"):
            written(source, place, top_k=1, overwrite=True)
    assert (out / "mine.txt").read_text() == "notes"


DISK_FULL = OSError(errno.ENOSPC, "No space left on device")


@pytest.mark.parametrize(
    ("fault", "error", "message"),
    [
        (KeyboardInterrupt(), KeyboardInterrupt, None),
        (DISK_FULL, OutputError, r"No space left .* nothing was left half-w"),
    ],
)
def test_what_was_there_stays_when_writing_ends_early(source, tmp_path, monkeypatch, fault, error, message):
    written(source, tmp_path / "out", top_k=1)
    before = {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}
    pieces, replace = cut_weights._pieces, os.replace

    def some_pieces(*args):
        yield next(pieces(*args))
        raise fault

    def no_last_step(old, new):
        if Path(old).name == Path(new).name == "out":
            raise fault
        replace(old, new)

    for owner, name, broken in ((cut_weights, "_pieces", some_pieces), (os, "replace", no_last_step)):
        for place in ("out", "new") if broken is some_pieces else ("out",):
            with monkeypatch.context() as patch, pytest.raises(error, match=message):
                patch.setattr(owner, name, broken)
                written(source, tmp_path / place, top_k=2, overwrite=True)
            assert [path.name for path in tmp_path.iterdir()] == ["out"]
            assert {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()} == before


def test_a_disk_that_is_too_small_is_told_before_anything_large_is_written(source, tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr("shutil.disk_usage", lambda _: usage)
    with pytest.raises(OutputError, match=r"GB are to be written to .*, which has 0\.0 GB left"):
        written(source, tmp_path / "out", top_k=1)
    assert list(tmp_path.iterdir()) == []
