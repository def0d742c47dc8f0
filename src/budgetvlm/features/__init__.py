"""What the controller sees of a sample's image and question, and how such features are made without a model."""

from budgetvlm.features.arrays import SCHEMA_VERSION, Features

__all__ = ["SCHEMA_VERSION", "Features"]
