"""The tensors of one message as the computation reads them: block by block, in fp32, and none forgotten.

A product reads rows of its weight, widens and multiplies them, and drops them: however large a layer is, no more than
a block of it is in memory. Blocks depend on shapes alone, so that equal weights give equal sums in every format.

Legend: s tokens, e experts; a weight is [out, in].
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch

from ckptconv import dtypes
from ckptconv.errors import TableError, some
from ckptconv.lazy import LazyTensor, as_torch

Tensor = torch.Tensor

#: Elements that are read at once.
BLOCK = 4 << 20


def rows(tensor: LazyTensor, first: int, count: int) -> Tensor:
    """Rows [count, cols] of a tensor, which is seen as a matrix, in fp32."""
    out = np.empty((count, tensor.cols), dtypes.opaque(tensor.dtype))
    tensor.read(out, first, 0)
    return as_torch(out, tensor.dtype).float()


def product(x: Tensor, weight: LazyTensor, first: int = 0, count: int | None = None) -> Tensor:
    """x [s, in] times the transpose of `count` rows of a weight from `first` on (all of them): [s, count]."""
    count = weight.rows - first if count is None else count
    out = x.new_empty(x.shape[0], count)
    step = max(1, BLOCK // weight.cols)
    for start in range(0, count, step):
        block = rows(weight, first + start, min(step, count - start))
        torch.mm(x, block.T, out=out[:, start : start + len(block)])
    return out


class Weights:
    """The tensors of a message. `check` finds what nothing has asked for."""

    def __init__(self, name: str, tensors: Mapping[str, LazyTensor], expert: int | None = None) -> None:
        self._name, self._tensors, self._expert = name, dict(tensors), expert
        self._used: set[str] = set()

    def add(self, tensors: Mapping[str, LazyTensor]) -> None:
        """Tensors of a further message of the same layer."""
        self._tensors |= tensors

    def of_expert(self, number: int) -> Weights:
        """The same for one expert, whose tensors are slices of those with an axis e."""
        one = Weights(self._name, self._tensors, number)
        one._used = self._used
        return one

    def vector(self, key: str) -> Tensor:
        """A small tensor, whole."""
        self._used.add(key)
        tensor = self._tensors[key]
        if self._expert is not None:
            return rows(tensor, self._expert, 1)[0]
        return rows(tensor, 0, tensor.rows).reshape(tensor.shape)

    def optional(self, key: str) -> Tensor | None:
        """The same, None where the model has no such tensor."""
        return self.vector(key) if key in self._tensors else None

    def linear(self, x: Tensor, key: str, bias: str | None = None) -> Tensor:
        """x [s, in] -> [s, out], with the bias where the model has it."""
        self._used.add(key)
        weight = self._tensors[key]
        if self._expert is None:
            out = product(x, weight)
        else:
            height = weight.shape[-2]
            out = product(x, weight, self._expert * height, height)
        added = self.optional(bias) if bias else None
        return out if added is None else out.add_(added)

    def skip(self, *keys: str) -> None:
        """Keys that are not needed this time."""
        self._used.update(keys)

    def check(self) -> None:
        """Raise TableError for tensors that had no part in the computation: the result would be another model's."""
        left = [key for key in self._tensors if key not in self._used]
        if left:
            raise TableError(f"message {self._name!r} has {some(left)}, for which `logits` has no rule yet.")
