"""The axes of a Llama: the one place that says which there are and what holds for each, whatever weight has it."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Axis:
    """One axis of the model.

    `name` is its word in the table of weights, in plans and in scores, `words` are those of a sentence, and `field` is
    the field of `LlamaConfig` that has its size.
    """

    name: str
    words: str
    field: str
    per_layer: bool = False  # every layer keeps indices of its own
    split: bool = False  # tensor parallelism cuts it into one block a rank
    follows: str | None = None  # the axis whose blocks decide what is in its own
    flag: str | None = None  # the flag that says how much remains; None: the axis is never pruned
    # The number that its stream of random numbers is drawn from. Never change one: the same seed is to give the same
    # plan for ever. Ascending, it is also the order in which axes are decided.
    stream: int | None = None
    limit: int = 1 << 24  # that no model reaches: a wrong size is to end in a sentence, not in a loop over it


AXES = (
    Axis("layers", "layers", "num_layers", flag="--num-layers-remain", stream=4, limit=10_000),
    Axis("hidden", "hidden size", "hidden_size", flag="--hidden-size-remain", stream=0),
    Axis("ffn", "ffn hidden size", "ffn_hidden_size", True, True, flag="--ffn-hidden-size-remain", stream=3),
    Axis("heads", "attention heads", "num_attention_heads", True, True, "groups", "--num-attention-heads-remain", 2),
    Axis("groups", "query groups", "num_query_groups", True, True, flag="--num-query-groups-remain", stream=1),
    Axis("head_dim", "head size", "head_dim"),
    Axis("vocab", "vocabulary", "vocab_size", split=True),
)
AXIS = {axis.name: axis for axis in AXES}

# Names of axes: those that a plan may shrink, and of these the ones whose indices are chosen, in the order in which
# they are decided: query groups come before the heads inside of them.
PRUNABLE = tuple(axis.name for axis in AXES if axis.flag)
CHOSEN = tuple(sorted((name for name in PRUNABLE if name != "layers"), key=lambda name: AXIS[name].stream or 0))
PER_LAYER = tuple(name for name in CHOSEN if AXIS[name].per_layer)
# Of those, the ones that are cut into a block a tensor-parallel rank of their own accord.
BLOCKS = tuple(name for name in PER_LAYER if AXIS[name].split and not AXIS[name].follows)


def axes_of(dim: str) -> tuple[str, ...]:
    """Return the names of the axes that one dim of a weight holds, outermost first: `heads*head_dim` holds two."""
    return tuple(dim.split("*"))
