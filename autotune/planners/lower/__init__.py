"""Lowering: a plan becomes a program, at two scales (stages outside, operations inside)."""
