"""The controller under the guide's name; it lives in `budgetvlm.controller.network`."""

from budgetvlm.controller.checkpoint import from_pretrained, load_controller, save_pretrained
from budgetvlm.controller.network import GRPOController

__all__ = ["GRPOController", "from_pretrained", "load_controller", "save_pretrained"]
