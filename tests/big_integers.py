"""Exact scaling in Python's own integers, which know no overflow: what the ops are held against.

All take and return lists with one entry per element; a stream is in steps of the grid.
"""

R = 2**16


def forward(xs, divisors, shifts, states):
    """The stream's new values and states."""
    pairs = []
    for x, s, shift, u in zip(xs, divisors, shifts, states, strict=True):
        u, low = divmod(u, R)
        y, rest = divmod(x * R + low + s // 2 - R // 2, s)
        pairs.append((y + shift, u * s + rest))
    return tuple(map(list, zip(*pairs, strict=True)))


def inverse(ys, divisors, shifts, states):
    """What goes in where `forward` gives these values and states."""
    pairs = []
    for y, s, shift, u in zip(ys, divisors, shifts, states, strict=True):
        u, rest = divmod(u, s)
        x, low = divmod((y - shift) * s + rest - (s // 2 - R // 2), R)
        pairs.append((x, u * R + low))
    return tuple(map(list, zip(*pairs, strict=True)))


DIRECTIONS = {"forward": forward, "inverse": inverse}
