"""Anchors: recomputed blocks that keep rounding errors from adding up beyond them."""

from revlib.autograd import Policy


def anchored(depth: int, *, every: int) -> list[Policy]:
    """Returns a policy that rebuilds all blocks of a chain but each so-many-th.

    That one is recomputed, from its input, which is kept. So a rebuilt stream is never more than
    `every` blocks away from values that are exact, at the price of one stream for every anchor.
    It is a plain list to edit: a block without a cheap inverse needs "store" or "recompute".

    Args:
        depth: The number of blocks.
        every: How many blocks lie from one anchor to the next.

    Raises:
        ValueError: If one of them is not a whole number above 0.

    Example:
        >>> revlib.anchored(5, every=2)
        ['rebuild', 'rebuild', 'recompute', 'rebuild', 'recompute']
    """
    for name, count in (("depth", depth), ("every", every)):
        if isinstance(count, bool) or not isinstance(count, int) or count < 1:
            raise ValueError(f"anchored: {name} must be a whole number above 0; got {count!r}")
    return ["recompute" if i and i % every == 0 else "rebuild" for i in range(depth)]
