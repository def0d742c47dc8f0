"""The model's own processor of Transformers, to compare prompts with."""

from __future__ import annotations

from pathlib import Path

from PIL import Image

from budgetvlm.vlm.families.base import SOME_SIZE, Images
from budgetvlm.vlm.whole_processor import NoReference, processor_of


class OwnProcessor:
    """The processor of the model in a directory.

    Args:
        images: gives the image processor, set to a `max_crops`.

    Raises:
        NoReference: Transformers has none for this type of model, or it cannot be made here.
    """

    def __init__(self, directory: Path, images: Images) -> None:
        self._images = images
        self._processor = processor_of(directory, image_processor=images.set_to(*SOME_SIZE, images.most_crops))
        if not self._processor.chat_template:
            self._processor.chat_template = self._processor.tokenizer.chat_template

    def ids(self, image: Image.Image, question: str, max_crops: int, *, plain: bool = False) -> tuple[int, ...]:
        """Return the token ids of a prompt.

        Args:
            plain: names of special tokens in the question are plain text.

        Raises:
            NoReference: the processor has no such setting, or no way to keep special tokens plain.
        """
        size = image.height, image.width
        options = self._images.options(*size, max_crops)
        if options is None:
            raise NoReference(f"the processor has nothing like max_crops={max_crops}")
        content = [{"type": "image", "image": image}, {"type": "text", "text": question}]
        self._processor.image_processor = self._images.set_to(*size, max_crops)
        try:
            if not self._processor.chat_template and not plain:
                done = self._processor(images=image, text=f"<image>{question}", images_kwargs=options)
                return tuple(done["input_ids"][0])
            done = self._processor.apply_chat_template(
                [{"role": "user", "content": content}],
                add_generation_prompt=True,
                tokenize=True,
                return_dict=True,
                return_tensors="pt",
                processor_kwargs={"images_kwargs": options},
                **({"sanitize_control_tokens": True} if plain else {}),
            )
        except Exception as error:
            if plain:  # many processors know no such thing
                raise NoReference(str(error)) from None
            raise
        return tuple(done["input_ids"][0].tolist())
