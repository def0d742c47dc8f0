"""The model under control."""

from budgetvlm.vlm.protocol import STAGES, VLM, Conversation, Deadline, Generation, OnText, Overview, Quicker, Revise

__all__ = [
    "STAGES",
    "VLM",
    "Conversation",
    "Deadline",
    "Generation",
    "OnText",
    "Overview",
    "Quicker",
    "Revise",
    "load_vlm",
]


def load_vlm(
    model_path: str, *, device: str = "cpu", num_threads: int | None = None, trust_remote_code: bool = False
) -> VLM:
    """Open a model by path or hub name, or the bundled one by the name "reference".

    Args:
        model_path: "reference", a directory with a Transformers model, or a hub name (organisation/name).
        device: a torch device.
        num_threads: torch's intra-op threads; None leaves them as they are.
        trust_remote_code: run the Python code that comes with the model.

    Raises ConfigError: the model cannot be found or is of a family that this version does not know.
    """
    from budgetvlm.vlm.loading import load

    return load(model_path, device=device, num_threads=num_threads, trust_remote_code=trust_remote_code)
