"""The families of models that can be steered, by the `model_type` of their configuration."""

from budgetvlm.vlm.families.aria import Aria
from budgetvlm.vlm.families.base import Family
from budgetvlm.vlm.families.gemma3 import Gemma3
from budgetvlm.vlm.families.gemma4 import Gemma3n, Gemma4
from budgetvlm.vlm.families.idefics import Idefics2, Idefics3
from budgetvlm.vlm.families.internvl import InternVL, QianfanOCR
from budgetvlm.vlm.families.llama4 import Llama4
from budgetvlm.vlm.families.llava import Llava, LlavaOnevision
from budgetvlm.vlm.families.molmo import Molmo
from budgetvlm.vlm.families.molmo2 import Molmo2
from budgetvlm.vlm.families.mrope import ErnieVL, Exaone, Glm4v, QwenOmni, QwenVL
from budgetvlm.vlm.families.one_size import PaliGemma, PlainLlava
from budgetvlm.vlm.families.pixtral import LightOnOCR, Mistral3
from budgetvlm.vlm.families.squeezed import Cohere2Vision, PerceptionLM

_KNOWN: tuple[Family, ...] = (
    InternVL(), QianfanOCR(), Llava(), LlavaOnevision(), PlainLlava(), Mistral3(), LightOnOCR(), QwenVL(), QwenOmni(),
    Glm4v(), Exaone(), ErnieVL(), Idefics2(), Idefics3(), Cohere2Vision(), PerceptionLM(), Aria(), Gemma3(), Gemma3n(),
    PaliGemma(), Gemma4(), Llama4(), Molmo(), Molmo2(),
)  # fmt: skip
FAMILIES: dict[str, Family] = {model_type: family for family in _KNOWN for model_type in family.model_types}


def supported() -> str:
    """Return the families and their model types, in one line."""
    return ", ".join(f"{family.name} ({', '.join(family.model_types)})" for family in _KNOWN)
