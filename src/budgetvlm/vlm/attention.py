"""Kinds of attention in a decoder's blocks, and the cache that fits them.

Most blocks keep keys and values of all tokens. Hybrid decoders (Qwen3.5, LFM2) have blocks of linear attention or
convolution beside them, which keep one state however long the text is. How long the cache is can only be asked of a
block that keeps keys and values, and Transformers asks the first one: where it were skipped, the length would be 0 and
positions and masks would be wrong without an error. So it always runs.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from transformers.cache_utils import DynamicCache, DynamicLayer

KEYS_KINDS = {"full_attention", "sliding_attention", "chunked_attention"}
STATE_KINDS = {"linear_attention", "conv"}
SKIPPABLE_KINDS = KEYS_KINDS | STATE_KINDS


def kinds_by_block(language: Any) -> list[str]:
    """Return the kind of attention of each block as the decoder's configuration lists it; none: all are alike."""
    return list(getattr(getattr(language, "config", None), "layer_types", None) or ())


def counting_blocks(language: Any) -> tuple[int, ...]:
    """Return the block that is asked for the cache's length, where it is not the first of all."""
    kinds = kinds_by_block(language)
    return tuple(i for i, kind in enumerate(kinds) if kind in KEYS_KINDS)[:1] if STATE_KINDS & set(kinds) else ()


def unknown_kinds(language: Any) -> list[str]:
    """Return the kinds of attention whose blocks cannot be skipped, because their cache is not known here."""
    return sorted(set(kinds_by_block(language)) - SKIPPABLE_KINDS)


def cache_maker(language: Any) -> Callable[[], DynamicCache]:
    """Return what makes an empty cache: states where blocks keep states, and else all keys and values.

    Keys and values are those of all tokens also where a window would do, so that all their blocks agree on a length;
    masks keep sliding windows.
    """
    kinds = kinds_by_block(language)

    def hybrid() -> DynamicCache:
        cache = DynamicCache(config=language.config)
        pairs = zip(kinds, cache.layers, strict=True)
        cache.layers = [DynamicLayer() if kind in KEYS_KINDS else own for kind, own in pairs]
        return cache

    return DynamicCache if set(kinds) <= KEYS_KINDS else hybrid
