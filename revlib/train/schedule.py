"""The learning rate of each step: a function of the step, so that there is no state to save."""

import math

WARMUP = 0.05


def learning_rate(step: int, steps: int, peak: float) -> float:
    """Rises to `peak` along a line over the first steps, then falls to 0 along a cosine.

    Example:
        >>> [round(learning_rate(step, steps=40, peak=1.0), 2) for step in (0, 1, 2, 21, 39)]
        [0.5, 1.0, 1.0, 0.5, 0.0]
    """
    warmup = max(1, int(WARMUP * steps))
    if step < warmup:
        return peak * (step + 1) / warmup
    return peak * (1 + math.cos(math.pi * (step - warmup) / (steps - warmup))) / 2
