"""A square matrix made of its LU factors, and its gradients in closed form."""

from typing import NamedTuple

import torch
from torch import Tensor


class LUFactors(NamedTuple):
    r"""The factors of :math:`W = P L (U + \operatorname{diag}(s \exp(d)))`.

    Attributes:
        lower: L, of which the part below the diagonal counts; its diagonal is 1.
        upper: U, of which the part above the diagonal counts.
        log_diagonal: d.
        sign: s, 1 or -1 each.
        permutation: P.
    """

    lower: Tensor
    upper: Tensor
    log_diagonal: Tensor
    sign: Tensor
    permutation: Tensor

    def right(self) -> Tensor:
        """Returns the right factor, diagonal included."""
        return self.upper.triu(1) + torch.diag(self.sign * self.log_diagonal.exp())

    def matrix(self) -> Tensor:
        """Returns W."""
        return self.product(self.right())

    def product(self, right: Tensor) -> Tensor:
        """Returns W, given its right factor."""
        return self.permutation @ torch.addmm(right, self.lower.tril(-1), right)

    def gradients(self, right: Tensor, dmatrix: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Returns the gradients of `lower`, `upper` and `log_diagonal`, given that of W."""
        dproduct = self.permutation.T @ dmatrix
        dright = torch.addmm(dproduct, self.lower.tril(-1).T, dproduct)
        dlower = (dproduct @ right.T).tril(-1)
        return dlower, dright.triu(1), dright.diagonal() * right.diagonal()
