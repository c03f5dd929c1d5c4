"""Counts the bytes of live tensors: on the CPU, or on the meta device, where tensors have shapes and no values."""

from __future__ import annotations

import weakref
from functools import partial
from typing import Any

from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class LiveBytes(TorchDispatchMode):
    """While it is on: bytes of the tensors that operations make and that are still alive, and the most there were.

    Counted by storage, so a view costs nothing, and what is shared is counted once, until the last tensor on it is
    gone. Tensors made before are not counted. Memory that an operation takes and gives back inside itself is not
    seen. On the meta device attention counts as one operation with one result, as every fused kernel has it.

    Attributes:
        live: bytes alive now.
        peak: the most that were alive at the end of an operation.
    """

    def __init__(self) -> None:
        TorchDispatchMode.__init__(self)
        self.live = 0
        self.peak = 0
        self._sizes: dict[int, int] = {}
        self._watched: dict[int, weakref.ref[Any]] = {}
        self._attention: Any = FusedAttention()

    def __enter__(self) -> LiveBytes:
        self._attention.__enter__()
        TorchDispatchMode.__enter__(self)
        return self

    def __exit__(self, *error: Any) -> None:
        TorchDispatchMode.__exit__(self, *error)
        self._attention.__exit__(*error)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        given = {storage._cdata for storage in storages((args, kwargs))}
        result = func(*args, **kwargs)
        for storage in storages(result):
            key = storage._cdata
            if key in self._sizes or key not in given:  # otherwise it was there before we began
                self._count(storage, key)
        self.peak = max(self.peak, self.live)
        return result

    def _count(self, storage: Any, key: int) -> None:
        """Enter a storage, or its new size: `resize_` changes it in place."""
        self.live += storage.nbytes() - self._sizes.get(key, 0)
        self._sizes[key] = storage.nbytes()
        if key not in self._watched:
            self._watched[key] = weakref.ref(storage, partial(self._forget, key))

    def _forget(self, key: int, _: weakref.ref[Any]) -> None:
        del self._watched[key]
        self.live -= self._sizes.pop(key)


class FusedAttention(TorchFunctionMode):
    """Attention on meta tensors as one result, without the `[T,T]` scores into which it would be taken apart.

    It must be caught as a torch function: `scaled_dot_product_attention` is a composite operation, so a dispatch mode
    sees only its parts, whichever these are on the device.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is scaled_dot_product_attention and all(storage.device.type == "meta" for storage in storages(args)):
            return attention_result(*args, **kwargs)
        return func(*args, **kwargs)


def attention_result(query: Tensor, key: Tensor, value: Tensor, *_: Any, **__: Any) -> Tensor:
    """An empty result of `scaled_dot_product_attention`."""
    return query.new_empty(*query.shape[:-1], value.shape[-1])


def storages(tree: Any) -> list[Any]:
    """Storages of all tensors in nested lists, tuples and dicts."""
    return [leaf.untyped_storage() for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]
