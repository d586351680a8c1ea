"""Walks the autograd graph of one evaluation, to see which leaves it reached."""

from collections.abc import Iterable

import torch
from torch import Tensor
from torch.autograd.graph import Node


def sequence_number() -> int:
    """Returns the number that the next autograd node of this thread will carry."""
    return torch._C._autograd._get_sequence_nr()


def reached(roots: Iterable[Node], born: range) -> tuple[list[Tensor], list[Node]]:
    """Finds where the graph behind `roots` ends.

    Args:
        roots: The nodes to start from.
        born: The sequence numbers that were handed out during the evaluation.

    Returns:
        The leaf tensors, and the inner nodes that were made before the evaluation began:
        behind those lie tensors that the evaluation captured instead of computing.
    """
    leaves, older = [], []
    seen, stack = set(), list(roots)
    while stack:
        node = stack.pop()
        if node in seen:
            continue
        seen.add(node)
        if type(node).__name__ == "AccumulateGrad":
            leaves.append(node.variable)
        elif node._sequence_nr() not in born:
            older.append(node)
        else:
            stack.extend(parent for parent, _ in node.next_functions if parent is not None)
    return leaves, older
