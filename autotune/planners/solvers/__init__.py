"""Exact and heuristic solvers of the planner's hard inner choices: pure functions of numbers, no torch, no clock.

Nothing here knows what a plan, a program or a schedule is; callers translate.
"""
