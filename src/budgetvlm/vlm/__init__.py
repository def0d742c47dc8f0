"""The model under control."""

from budgetvlm.vlm.protocol import STAGES, VLM, Deadline, Generation, Overview

__all__ = ["STAGES", "VLM", "Deadline", "Generation", "Overview", "load_vlm"]


def load_vlm(model_path: str, *, device: str = "cpu", num_threads: int | None = None) -> VLM:
    """Open a model by path, or the bundled one by the name "reference".

    Args:
        model_path: "reference" or a directory with a Transformers model.
        device: a torch device.
        num_threads: torch's intra-op threads; None leaves them as they are.

    Raises:
        ConfigError: the model cannot be found or is of a family that this version does not know.
    """
    from budgetvlm.vlm.loading import load

    return load(model_path, device=device, num_threads=num_threads)
