"""A tensor of another stage: its shape and type are known here, its values are not.

A stage of an ordinary model runs the model's own forward. What comes before its layers belongs to other stages, but also makes
what the stage needs itself, such as masks and rotary embeddings. So that code runs here too, with weights of other stages
absent: whatever is computed from an absent tensor is absent and costs no arithmetic, all else is computed as usual.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map

from pipeoptim.errors import ConfigError

#: Operations that take only the form of a tensor: their result is a real one.
_FORM_ONLY = {
    "zeros_like",
    "ones_like",
    "full_like",
    "empty_like",
    "new_zeros",
    "new_ones",
    "new_full",
    "new_empty",
    "new_empty_strided",
}


class AbsentTensor(Tensor):
    """A tensor with shape, type and device, but without values.

    Args:
        form: a tensor on the ``meta`` device.
        device: where the values would be.

    Example:
        >>> absent = AbsentTensor.like(torch.ones(2, 3))
        >>> type(absent @ torch.ones(3, 4)).__name__, tuple((absent @ torch.ones(3, 4)).shape)
        ('AbsentTensor', (2, 4))
        >>> torch.zeros_like(absent).sum()
        tensor(0.)
    """

    form: Tensor

    @staticmethod
    def __new__(cls, form: Tensor, device: torch.device) -> AbsentTensor:
        made: AbsentTensor = Tensor._make_wrapper_subclass(  # type: ignore[attr-defined]
            cls,
            form.size(),
            strides=form.stride(),
            storage_offset=form.storage_offset(),
            dtype=form.dtype,
            layout=form.layout,
            device=device,
            requires_grad=False,
        )
        made.form = form
        return made

    def __init__(self, form: Tensor, device: torch.device) -> None:
        pass

    @classmethod
    def like(cls, tensor: Tensor) -> AbsentTensor:
        """An absent tensor of the form of ``tensor``."""
        return cls.made(tensor.shape, tensor.dtype, tensor.device)

    @classmethod
    def made(cls, shape: Any, dtype: torch.dtype, device: torch.device) -> AbsentTensor:
        """An absent tensor of this form."""
        return cls(torch.empty(shape, dtype=dtype, device="meta"), device)

    # Everything is decided below autograd, in __torch_dispatch__.
    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        kwargs = dict(kwargs or {})
        name = func.overloadpacket.__name__
        # At least one: torch dispatches here for no other reason.
        absents = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, AbsentTensor)]
        # The result is wherever the real one would be, although it is computed on the meta device.
        device = torch.device(kwargs.get("device") or absents[0].device)
        if name in _FORM_ONLY:
            return func(*tree_map(_template, args), **tree_map(_template, kwargs))
        if name in ("_local_scalar_dense", "equal", "is_nonzero"):
            raise _unknown(name)
        _check_writes(func, args)
        if "device" in kwargs:
            kwargs["device"] = torch.device("meta")
        try:
            result = func(*tree_map(_form, args), **tree_map(_form, kwargs))
        except (NotImplementedError, RuntimeError) as error:
            raise _unknown(f"{name}: {error}") from error
        return tree_map(lambda out: cls(out, device) if isinstance(out, Tensor) else out, result)

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        return f"AbsentTensor({tuple(self.shape)}, {self.dtype}, {self.device})"

    def __reduce_ex__(self, protocol: Any) -> Any:
        return AbsentTensor.made, (tuple(self.shape), self.dtype, self.device)

    def __deepcopy__(self, memo: Any) -> AbsentTensor:
        return AbsentTensor.like(self)


def is_absent(value: Any) -> bool:
    """Whether ``value`` is a tensor without values."""
    return isinstance(value, AbsentTensor)


def _form(value: Any) -> Any:
    if isinstance(value, AbsentTensor):
        return value.form
    if isinstance(value, Tensor):
        return torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device="meta")
    return value


def _template(value: Any) -> Any:
    """A real tensor of the same form that takes no memory."""
    if isinstance(value, AbsentTensor):
        return torch.empty((), dtype=value.dtype, device=value.device).expand(value.shape)
    return value


def _check_writes(func: Any, args: Any) -> None:
    for argument, value in zip(func._schema.arguments, args, strict=False):
        written = argument.alias_info is not None and argument.alias_info.is_write
        if written and isinstance(value, Tensor) and not isinstance(value, AbsentTensor):
            raise _unknown(f"{func} into a tensor of this stage")


def _unknown(what: str) -> ConfigError:
    return ConfigError(
        f"the model's forward asks for the values of a tensor that is computed on another stage ({what}); "
        'cut elsewhere with pins, or partition with how="trace"'
    )
