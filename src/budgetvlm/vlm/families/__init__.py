"""The families of models that can be steered, by the `model_type` of their configuration."""

from budgetvlm.vlm.families.aria import Aria
from budgetvlm.vlm.families.base import Family
from budgetvlm.vlm.families.gemma3 import Gemma3
from budgetvlm.vlm.families.gemma4 import Gemma4
from budgetvlm.vlm.families.idefics3 import Idefics3
from budgetvlm.vlm.families.internvl import InternVL
from budgetvlm.vlm.families.llama4 import Llama4
from budgetvlm.vlm.families.llava import Llava
from budgetvlm.vlm.families.molmo import Molmo
from budgetvlm.vlm.families.molmo2 import Molmo2
from budgetvlm.vlm.families.mrope import ErnieVL, Glm4v, Qwen3VL, Qwen35, QwenVL

_KNOWN: tuple[Family, ...] = (
    InternVL(),
    Llava(),
    QwenVL(),
    Qwen3VL(),
    Qwen35(),
    Glm4v(),
    ErnieVL(),
    Idefics3(),
    Aria(),
    Gemma3(),
    Gemma4(),
    Llama4(),
    Molmo(),
    Molmo2(),
)
FAMILIES: dict[str, Family] = {model_type: family for family in _KNOWN for model_type in family.model_types}


def supported() -> str:
    """Return the families and their model types, in one line."""
    return ", ".join(f"{family.name} ({', '.join(family.model_types)})" for family in _KNOWN)
