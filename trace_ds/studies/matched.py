"""Comparison at matched forgetting: pure functions over the checkpoints of one unlearning run.

Stopping earlier always looks better on utility, so two methods are compared from the point where each has forgotten
enough: the first checkpoint whose forget score is at the level of a model that never saw the forget set (``gold``).

Two numbers are told of a method, here as everywhere: at the crossing, where the straight line between two scored steps
meets the target, and on average from the first scored step there on. Our decision; the latter (``post``) is the one to
trust, the value at the crossing alone is noisy.

Shape legend: S checkpoints in order of step.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

TOLERANCE = 1e-9  # of a score at the target


@dataclass(frozen=True)
class Reached:
    """Where forget scores met the target: ``index`` of the first checkpoint there, and ``share`` of the way to it from
    the checkpoint before at which the straight line between the two does (1: there is none before)."""

    index: int
    share: float


@dataclass(frozen=True)
class Matched:
    """One method at matched forgetting.

    Attributes:
        step: first step at the target, or None when the target was never reached (then the next three are None too).
        spacing: how many steps the scored step before it is away (0: there is none), so how coarse the next one is.
        at_crossing: utility where the line between the two meets the target.
        post: mean utility over the checkpoints from ``step`` to the last one.
        end: utility at the last checkpoint, whatever was forgotten.
    """

    step: int | None
    spacing: int | None
    at_crossing: float | None
    post: float | None
    end: float


def reached(forget_S: Sequence[float], target: float) -> Reached | None:
    """Where the forget scores first are at the target; None where they never are. NaN never is."""
    index = next((number for number, score in enumerate(forget_S) if score <= target + TOLERANCE), None)
    if index is None:
        return None
    before = forget_S[index - 1] if index else math.nan
    share = (before - target) / (before - forget_S[index]) if math.isfinite(before) else 1.0
    return Reached(index, min(share, 1.0))


def matched(steps_S: Sequence[int], forget_S: Sequence[float], utility_S: Sequence[float], target: float) -> Matched:
    """Crossing step and utilities of one method; ``ValueError`` unless steps increase and all lengths agree.

    The original model (step 0) may be the first checkpoint; a score that is not a number never reaches the target.
    """
    if not (len(steps_S) == len(forget_S) == len(utility_S)) or not steps_S:
        raise ValueError(f"{len(steps_S)} steps, {len(forget_S)} forget scores, {len(utility_S)} utilities")
    if any(later <= earlier for earlier, later in pairwise(steps_S)):
        raise ValueError(f"the steps do not increase: {list(steps_S)}")
    end = float(utility_S[-1])
    found = reached(forget_S, target)
    if found is None:
        return Matched(None, None, None, None, end)
    tail = [float(value) for value in utility_S[found.index :]]
    step, spacing, crossing = int(steps_S[found.index]), 0, tail[0]
    if found.index:
        spacing, before = step - int(steps_S[found.index - 1]), float(utility_S[found.index - 1])
        crossing = before + found.share * (tail[0] - before) if found.share < 1 else tail[0]
    return Matched(step, spacing, crossing, math.fsum(tail) / len(tail), end)


def relative_gain(value: float, reference: float) -> float | None:
    """``value / reference - 1``; None when the reference is not above zero."""
    return value / reference - 1.0 if reference > 0 else None
