"""The basis in which the gradients of a matrix are least correlated: eigenvectors of the averages of G G^T (rows) and G^T G (columns).

::

    first update     eigenvectors of the first average                       exact, O(n^3)
    every refresh    one power step and QR:  basis = qr(average @ basis)     follows the average as it turns
"""

from __future__ import annotations

import torch
from torch import Tensor


def first_basis(average: Tensor) -> Tensor:
    """Eigenvectors of a symmetric matrix as columns, largest eigenvalue first."""
    basis: Tensor = torch.linalg.eigh(average).eigenvectors
    return basis.flip(1).contiguous()


def refreshed_basis(average: Tensor, basis: Tensor) -> tuple[Tensor, Tensor]:
    """``basis`` brought closer to the eigenvectors of ``average`` by one power step, and the new order of its columns.

    Column j of the new basis continues column ``order[j]`` of the old one: what is kept per direction moves along.
    """
    product = average @ basis
    # diag(basis^T average basis), the estimated eigenvalues. Stable: directions that tie must not depend on the sorting algorithm.
    order = (basis * product).sum(0).argsort(descending=True, stable=True)
    # Sorted before QR, which changes the first columns least.
    return torch.linalg.qr(product[:, order])[0], order


def rotated(value: Tensor, row_basis: Tensor | None, column_basis: Tensor | None) -> Tensor:
    """``U^T X V``; a side without a basis stays as it is."""
    if row_basis is not None:
        value = row_basis.mT @ value
    return value if column_basis is None else value @ column_basis


def rotated_back(value: Tensor, row_basis: Tensor | None, column_basis: Tensor | None) -> Tensor:
    """``U X V^T``, the inverse of :func:`rotated`."""
    if row_basis is not None:
        value = row_basis @ value
    return value if column_basis is None else value @ column_basis.mT
