"""What describes a model of Hugging Face Transformers beside its weights; read by its methods' names, without importing the library."""

from __future__ import annotations

import json
from typing import Any

from torch import nn


def model_files(model: nn.Module) -> dict[str, str]:
    """Name of a file -> text, as the model's own ``save_pretrained`` writes them; empty for other models.

    Example:
        >>> model_files(nn.Linear(2, 2))
        {}
    """
    config: Any = getattr(model, "config", None)
    if not hasattr(config, "to_json_string"):
        return {}
    # from_pretrained of the Auto classes finds the model's class by this entry.
    described = {**json.loads(config.to_json_string()), "architectures": [type(model).__name__]}
    files = {"config.json": json.dumps(described, indent=2, sort_keys=True) + "\n"}
    generation: Any = getattr(model, "generation_config", None)
    if hasattr(generation, "to_json_string"):
        files["generation_config.json"] = generation.to_json_string()
    return files
