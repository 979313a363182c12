"""The tables that are replayed, by the name that the command takes: a further one is a file and a line here."""

from __future__ import annotations

from autotune.planners.replay import (
    aiconfigurator,
    controllable_memory,
    megatron,
    megatron_clusters,
    vocabulary,
    vtrain,
    zero_bubble,
)
from autotune.planners.replay.row import Table

TABLES: dict[str, Table] = {
    "zero-bubble": zero_bubble.TABLE,
    "vocabulary": vocabulary.TABLE,
    "controllable-memory": controllable_memory.TABLE,
    "megatron": megatron.TABLE,
    "megatron-clusters": megatron_clusters.TABLE,
    "vtrain": vtrain.TABLE,
    "aiconfigurator": aiconfigurator.TABLE,
}
