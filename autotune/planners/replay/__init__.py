"""Figures that papers publish, got again by our own planner: `python -m autotune.planners.replay [TABLE ...]`."""
