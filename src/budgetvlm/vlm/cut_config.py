"""A model's configuration without some of its blocks and with another number of experts a token.

`config.json` stays as it is but for what changes, under the names that it uses. Shapes: L blocks before, n kept.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from budgetvlm._io import read_json, write_json
from budgetvlm.errors import ConfigError
from budgetvlm.vlm.cut_weights import KeptBlocks
from budgetvlm.vlm.families.base import COUNTS_PER_TOKEN

DEPTHS = ("num_hidden_layers", "n_layers", "n_layer", "num_layers")
NUMBERS_OF_BLOCKS = ("moe_layers", "mlp_only_layers", "rope_scaling_layers")  # lists of numbers of blocks
FIRST_BLOCKS = ("first_k_dense_replace", "num_dense_layers", "max_window_layers")  # counts of blocks from the first on
LAST_BLOCKS = ("num_kv_shared_layers",)  # counts of blocks up to the last
TEXT_PARTS = ("thinker_config", "text_config", "language_config", "llm_config")  # one in another
_OF_BLOCKS = re.compile("layer|block|idx|index")


def changes(text: Any, kept: KeptBlocks, top_k: int | None, counts: Collection[int] = ()) -> dict[str, Any]:
    """Return what changes in a language model's configuration, field by field.

    Args:
        top_k: experts a token; None: as before.
        counts: what its routers choose now; a field of another value is not theirs.

    Raises ConfigError: it has a field that names blocks in a way that is not known here.
    """
    fields = text.to_dict()
    changed = {name: _cut_field(name, value, kept) for name, value in fields.items()}
    changed |= _sparse_blocks(fields, kept)
    if top_k is not None:
        changed |= {name: top_k for name in COUNTS_PER_TOKEN if _is_one_of(fields.get(name), counts)}
    return {name: value for name, value in changed.items() if value != fields.get(name)}


def _is_one_of(value: Any, counts: Collection[int]) -> bool:
    return type(value) is int and value in counts


def _cut_field(name: str, value: Any, kept: KeptBlocks) -> Any:
    """Return a field's value when only some blocks are kept."""
    if name in DEPTHS and value == kept.whole:
        return len(kept.numbers)
    if name in FIRST_BLOCKS and value:
        return sum(i < value for i in kept.numbers)
    if name in LAST_BLOCKS and value:
        return sum(i >= kept.whole - value for i in kept.numbers)
    if name == "per_layer_config" and value:
        return {str(kept.place(int(i))): one for i, one in value.items() if int(i) in kept.numbers}
    if not isinstance(value, list) or "token" in name:
        return value
    if name in NUMBERS_OF_BLOCKS:
        return [kept.place(i) for i in value if i in kept.numbers]
    if len(value) == kept.whole:
        return [value[i] for i in kept.numbers]
    if _OF_BLOCKS.search(name) and value and all(type(i) is int for i in value):
        raise ConfigError(
            f"{name}={value} in the model's configuration names blocks in a way that is not known here, so that it "
            "cannot be changed for fewer of them. This model cannot be exported"
        )
    return value


def _sparse_blocks(fields: Mapping[str, Any], kept: KeptBlocks) -> dict[str, Any]:
    """Return which blocks have experts, by their numbers, where every few of them have."""
    step = fields.get("decoder_sparse_step") or 1
    if step == 1:
        return {}
    dense = {*(fields.get("mlp_only_layers") or ()), *(i for i in range(kept.whole) if (i + 1) % step)}
    return {
        "decoder_sparse_step": 1,
        "mlp_only_layers": [place for place, i in enumerate(kept.numbers) if i in dense],
    }


def write_config(source: Path, target: Path, text: Any, changed: Mapping[str, Any]) -> None:
    """Write `config.json` with these changes of its language model, wherever the file has it. Raises ConfigError."""
    whole = read_json(source)
    if re.search(r"[a-z]\.\d+", str(whole.get("quantization_config", ""))):
        raise ConfigError(
            f"quantization_config in {source} names single blocks, which would be others in the exported model. Export "
            "the model before it is quantised"
        )
    part = whole
    for name in TEXT_PARTS:
        part = part[name] if isinstance(part.get(name), dict) else part
    aliases = {alias: name for alias, name in getattr(text, "attribute_map", {}).items() if name in changed}
    before = text.to_dict()
    for name, value in changed.items():
        used = [one for one in (name, *(alias for alias, of in aliases.items() if of == name)) if one in part]
        part.update(dict.fromkeys(used or [name], value))
        if part is not whole and whole.get(name) == before.get(name) is not None:  # some files say it twice
            whole[name] = value
    write_json(target, whole)
