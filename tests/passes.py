"""Which of PyTorch's ops pass over the elements of a large tensor, and how many bytes they move.

Views touch no elements, and memory that is only asked for neither. What an op copies within
itself does not show here.
"""

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class Passes(TorchDispatchMode):
    """Within it, collects every op on tensors of at least `n_elements`: its name and its bytes."""

    def __init__(self, n_elements):
        super().__init__()
        self.n_elements = n_elements
        self.ops = []
        self.nbytes = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        results = func(*args, **(kwargs or {}))
        if not func.is_view and not func.name().startswith(("aten::empty", "aten::detach")):
            tensors = [leaf for leaf in tree_leaves((args, results)) if isinstance(leaf, Tensor)]
            nbytes = [t.numel() * t.itemsize for t in tensors if t.numel() >= self.n_elements]
            if nbytes:
                self.ops.append(func.name())
                self.nbytes += sum(nbytes)
        return results
