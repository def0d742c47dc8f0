"""Opening an image as the model gets it: the one decoding of all commands, under the name that scripts know."""

from budgetvlm._io import open_image

__all__ = ["open_image"]
