"""Optimization profiles of GPU engines: the shapes that an engine is built for, and whether they cover the limits. Arithmetic only."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from .call_sizes import encoder_batch, encoder_tokens
from .kv_memory import cache_capacities
from .limits import Limits, LimitsError
from .tensors import GraphTensors

AxisRange = tuple[int, int, int]  # min, opt, max length of a dynamic axis
Shapes = tuple[tuple[int, ...], ...]  # min, opt, max shape of an input
OPT_PAST = 32  # generated tokens that a whole decoder step is fastest for
SKINNY_ROWS = 32  # rows of a decoder step up to which a GEMM takes about the same time
# The limits that determine how long a dynamic axis may become.
LIMITS_OF_AXES = {
    "tokens": "max_passages or encoder_batch",
    "passages": "max_passages or encoder_batch",
    "encoder_sequence_length": "max_passages",
    "past_length": "max_new_tokens",
    "batch": "slots",
}


def profile_ranges(name: str, limits: Limits, passage_length: int) -> list[dict[str, AxisRange]]:
    """The optimization profiles of the engine called `name`, each as axis name -> range. An engine is fastest at a profile's opt."""
    if name == "encoder":  # the whole encoder as one engine, for Triton's own backend
        passages = encoder_batch(limits)
        return [{"passages": (1, passages, passages), "passage_length": (1, passage_length, passage_length)}]
    if name.startswith("encoder."):
        tokens = encoder_tokens(limits, passage_length)
        return [{"tokens": (1, tokens, tokens)}]
    if name == "cross_kv":
        tokens = limits.max_passages * passage_length
        return [{"encoder_sequence_length": (1, tokens, tokens)}]
    if name == "decoder_step":  # the whole step as one engine; caches are as long as the running questions need
        encoded, generated = cache_capacities(limits, passage_length)
        lengths = {"past_length": (1, min(generated, OPT_PAST), generated), "encoder_sequence_length": (1, encoded, encoded)}
        return [{"batch": (1, rows, rows), **lengths} for rows in sorted({min(limits.slots, SKINNY_ROWS), limits.slots})]
    # GEMMs of a decoder step: kernels that are fastest for many rows are slow for few, so few rows have a profile of their own
    return [{"batch": (1, rows, rows)} for rows in sorted({min(limits.slots, SKINNY_ROWS), limits.slots})]


def profile_shapes(tensors: GraphTensors, ranges: Mapping[str, AxisRange]) -> dict[str, Shapes]:
    """Input name -> (min, opt, max) shapes of one profile."""
    return {
        spec.name: tuple(spec.shape({axis: axis_range[i] for axis, axis_range in ranges.items()}) for i in range(3))
        for spec in tensors.inputs
    }


def fits(shape: Sequence[int], shapes: Shapes) -> bool:
    """Whether a shape lies within a profile's (min, opt, max)."""
    return all(low <= length <= high for length, low, high in zip(shape, shapes[0], shapes[2], strict=True))


def choose_profile(profiles: Sequence[Mapping[str, Shapes]], shapes: Mapping[str, Sequence[int]]) -> int | None:
    """Index of the smallest profile that covers the shapes of all inputs, or None."""
    covering = [i for i, profile in enumerate(profiles) if all(fits(shape, profile[name]) for name, shape in shapes.items())]
    return min(covering, key=lambda i: sum(math.prod(spans[2]) for spans in profiles[i].values()), default=None)


def require_covered(
    file: str, name: str, tensors: GraphTensors, profiles: Sequence[Mapping[str, Shapes]], limits: Limits, passage_length: int
) -> None:
    """Refuse limits that allow larger calls than an engine was built for; without this check only the large requests would fail.

    Args:
        file: path of the engine, for the message.
        name: of the engine.
        tensors: its inputs and outputs.
        profiles: those that it was built with.
        limits: those that it shall serve.
        passage_length: of the reader.

    Raises:
        LimitsError: naming the limit, the length it asks for and the profiles' bound.
    """
    needed: dict[str, int] = {}
    for ranges in profile_ranges(name, limits, passage_length):
        needed |= {axis: max(axis_range[2], needed.get(axis, 0)) for axis, axis_range in ranges.items()}
    for spec in tensors.inputs:
        for position, axis in spec.dynamic_axes().items():
            bound = max(profile[spec.name][2][position] for profile in profiles)
            if needed[axis] > bound:
                limit = LIMITS_OF_AXES.get(axis, axis)
                raise LimitsError(
                    f"{file}: {axis}: wanted at most {bound}, for which the engine was built, got limits that allow {needed[axis]}; "
                    f"lower {limit} in config.pbtxt, or build the engines with these limits (`make export ENGINE=tensorrt`)"
                )
