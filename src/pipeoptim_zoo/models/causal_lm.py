"""Any causal language model of Hugging Face Transformers, from its configuration or with its trained weights, stage by stage.

No process holds the whole model: it is made on the ``meta`` device and cut there; then each process reads the weights of its own stages
from the safetensors files, or draws them. What is drawn depends on the seed and on the name of the layer alone, so that it is the same
for any number of stages. An extra: ``pip install 'pipeoptim[causal-lm]'``.
"""

from __future__ import annotations

import importlib
import json
import warnings
from collections.abc import Collection, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any
from zlib import crc32

import torch
from torch import Tensor, nn

from pipeoptim.errors import ConfigError
from pipeoptim.partitioning.weight_slots import WeightSlot, weight_slots
from pipeoptim.train.stagewise import StagewiseModel
from pipeoptim_zoo.hub import from_hub

__all__ = ["causal_lm", "installed"]

_INDEX, _SINGLE = "model.safetensors.index.json", "model.safetensors"
_BASE = ".base_layer"
"""What peft puts into the name of a weight beside which it puts an adapter."""


def installed(package: str) -> Any:
    """The package, imported.

    Raises:
        ConfigError: it is not installed.
    """
    try:
        return importlib.import_module(package)
    except ImportError as error:
        raise ConfigError(
            f"recipe causal_lm needs the package {package}, which cannot be imported ({error}); pip install 'pipeoptim[causal-lm]'"
        ) from error


def causal_lm(
    source: str | Mapping[str, Any], scratch: bool = False, dtype: str = "float32", lora: Mapping[str, Any] | None = None
) -> StagewiseModel:
    """A causal language model of Transformers.

    Args:
        source: a folder that ``save_pretrained`` wrote, or a name on the hub: its weights are trained on. Or a configuration, with its
            ``model_type``: the weights are drawn as the model's class does it.
        scratch: of a folder or name, too, only the configuration is taken.
        dtype: of the weights.
        lora: options of peft's ``LoraConfig``, such as ``{"r": 8}``: only adapters of this rank are trained. The export has them merged.

    Raises:
        ConfigError: a package, the folder or its files are missing, or Transformers or peft refuses the options.
    """
    transformers = installed("transformers")
    if int(transformers.__version__.split(".")[0]) < 5:
        raise ConfigError(f"transformers is {transformers.__version__}, must be 5 or later; pip install 'pipeoptim[causal-lm]'")
    transformers.logging.set_verbosity_error()
    kind = getattr(torch, dtype, None) if isinstance(dtype, str) else None
    if not isinstance(kind, torch.dtype):
        raise ConfigError(f"dtype is {dtype!r}, must be a type of torch: float32, bfloat16")
    adapter = None if lora is None else _adapter(lora)
    folder = None if isinstance(source, Mapping) or scratch else _folder(source)
    skeleton = partial(_skeleton, _config(source), kind, adapter)
    made = skeleton()
    return StagewiseModel(
        made,
        partial(_values, skeleton, folder),
        None if adapter is None else _merge_adapters,
        _sizes(made.config.get_text_config()),
    )


def _sizes(config: Any) -> dict[str, int]:
    context = getattr(config, "max_position_embeddings", None)
    return {"vocab_size": int(config.vocab_size)} | ({"context": context} if isinstance(context, int) else {})


def _config(source: str | Mapping[str, Any]) -> Any:
    from transformers import AutoConfig

    if not isinstance(source, Mapping):
        try:
            with from_hub("source", source):
                config = AutoConfig.from_pretrained(source)
        except ConfigError:
            raise
        except Exception as error:  # the hub's, the network's and the file system's errors have no common base
            raise ConfigError(
                f"source {source!r} has no configuration that can be read: {_line(error)}; name a folder with config.json"
            ) from error
    else:
        given = dict(source)
        kind = given.pop("model_type", None)
        try:
            config = AutoConfig.for_model(kind, **given)
        except Exception as error:
            raise ConfigError(
                f"the configuration {dict(source)} cannot be used: {_line(error)}; it needs a model_type, such as gpt2 or llama, and "
                "options of it"
            ) from error
    config.use_cache = False  # of keys and values, for generation
    return config


def _adapter(options: Mapping[str, Any]) -> Any:
    peft = installed("peft")
    try:
        return peft.LoraConfig(task_type="CAUSAL_LM", **options)
    except (TypeError, ValueError) as error:
        raise ConfigError(f"lora is {dict(options)}, which peft's LoraConfig refuses: {_line(error)}") from error


def _skeleton(config: Any, dtype: torch.dtype, adapter: Any) -> Any:
    auto: Any = installed("transformers").AutoModelForCausalLM
    try:
        with torch.device("meta"):
            model = auto.from_config(config, dtype=dtype)
    except (ValueError, TypeError, AttributeError) as error:
        raise ConfigError(f"no causal language model can be made of {type(config).__name__}: {_line(error)}") from error
    if adapter is None:
        return model
    peft = installed("peft")
    try:
        with warnings.catch_warnings():  # what it says of the orientation of GPT-2's weights, it sets right itself
            warnings.filterwarnings("ignore", "fan_in_fan_out")
            return peft.inject_adapter_in_model(adapter, model, low_cpu_mem_usage=True)
    except ValueError as error:
        raise ConfigError(
            f"the adapters do not fit {type(model).__name__}: {_line(error)}; set target_modules in lora"
        ) from error


def _folder(source: str) -> Path:
    """The folder with the safetensors files of ``source``, downloaded where it is a name on the hub."""
    folder = Path(source).expanduser()
    if not folder.exists():
        from huggingface_hub import snapshot_download

        try:
            with from_hub("source", source):
                folder = Path(snapshot_download(source, allow_patterns=["*.safetensors", _INDEX]))
        except ConfigError:
            raise
        except Exception as error:
            raise ConfigError(
                f"source {source!r} is no folder, and cannot be downloaded: {_line(error)}; give a folder that save_pretrained wrote"
            ) from error
    if not any((folder / name).exists() for name in (_INDEX, _SINGLE)):
        raise ConfigError(
            f"{folder} has no {_SINGLE} and no {_INDEX}; save the model with save_pretrained of Transformers, or, to train only by its "
            "configuration, set scratch to true"
        )
    return folder


class _Files:
    """The tensors of a folder of safetensors files, each read when it is asked for."""

    def __init__(self, folder: Path, prefix: str) -> None:
        from safetensors import safe_open

        index = folder / _INDEX
        if index.exists():
            files = {name: folder / file for name, file in json.loads(index.read_text())["weight_map"].items()}
        else:
            with safe_open(folder / _SINGLE, framework="pt") as single:
                files = dict.fromkeys(single.keys(), folder / _SINGLE)
        self._files, self._prefix, self._open = files, f"{prefix}.", safe_open

    def get(self, names: list[str]) -> Tensor | None:
        """The tensor that has one of ``names``; as Transformers has it, those of the model without its head lack the prefix."""
        for name in names:
            for known in (name, name.removeprefix(self._prefix), self._prefix + name):
                if known in self._files:
                    with self._open(self._files[known], framework="pt") as file:
                        found: Tensor = file.get_tensor(known)
                    return found
        return None


def _values(skeleton: Any, folder: Path | None, names: Collection[str]) -> dict[str, Tensor]:
    """The tensors called ``names``: from the files in ``folder``, and what is in none, drawn."""
    model = skeleton()
    files = None if folder is None else _Files(folder, model.base_model_prefix)
    wanted = _by_tensor(model, names)
    for slots in wanted:
        form, aliases = slots[0].tensor, [name.replace(_BASE, "") for slot in slots for name in slot.names]
        found = None if files is None or slots[0].buffer else files.get(aliases)
        if found is None and files is not None and not slots[0].buffer and "lora_" not in aliases[0]:
            raise ConfigError(
                f"{folder} has no weights called {aliases[0]}, which {type(model).__name__} needs; is it of this model?"
            )
        value = torch.full_like(form, float("nan") if form.is_floating_point() else 0, device="cpu") if found is None else found
        made = value if slots[0].buffer else nn.Parameter(value, requires_grad=value.is_floating_point() and form.requires_grad)
        vars(made)["_is_hf_initialized"] = found is not None  # Transformers' init functions look at it
        for slot in slots:
            slot.put(made)
    _draw(model, torch.initial_seed())
    values = {name: slots[0].tensor for slots in wanted for slot in slots for name in slot.names}
    if missing := next((n for n, t in values.items() if t.is_floating_point() and t.isnan().any()), None):
        raise ConfigError(
            f"{missing} was not drawn by {type(model).__name__}, or is not finite in {folder}; give a folder with weights"
        )
    return values


def _by_tensor(model: nn.Module, names: Collection[str]) -> list[list[WeightSlot]]:
    """The slots of each tensor that has one of ``names``."""
    slots: dict[int, list[WeightSlot]] = {}
    for slot in weight_slots(model):
        slots.setdefault(id(slot.tensor), []).append(slot)
    return [same for same in slots.values() if any(name in names for slot in same for name in slot.names)]


@torch.no_grad()
def _draw(model: Any, seed: int) -> None:
    """Draw what is not on the meta device and has no value, as the model's class does it; each layer from random numbers of its own."""
    for name, module, owner in _from_inside(model, "", model):
        held = [*module.parameters(), *module.buffers()]
        if all(t.is_meta for t in held):
            continue
        torch.manual_seed((seed + crc32(name.encode())) % 2**63)
        if hasattr(module, "reset_lora_parameters"):
            for adapter in module.lora_A:
                module.reset_lora_parameters(adapter, init_lora_weights=True)
        else:
            owner._init_weights(module)


def _from_inside(module: Any, name: str, owner: Any) -> Iterator[tuple[str, Any, Any]]:
    """Modules with their names, what is inside before what is around it, and the model whose class says how they are drawn."""
    owner = module if hasattr(module, "_init_weights") else owner
    for own, child in module.named_children():
        if not own.startswith("lora_"):  # their layer draws them
            yield from _from_inside(child, f"{name}.{own}".removeprefix("."), owner)
    yield name.replace(_BASE, ""), module, owner


def _merge_adapters(stage: nn.Module) -> None:
    """Put the adapters' part into the weights beside them, and remove them."""
    from peft.tuners.lora import LoraLayer

    for path, module in list(stage.named_modules()):
        if isinstance(module, LoraLayer):
            module.merge()
            above, _, own = path.rpartition(".")
            setattr(stage.get_submodule(above), own, module.get_base_layer())


def _line(error: Exception) -> str:
    return " ".join(str(error).split())[:300] or type(error).__name__
