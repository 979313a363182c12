"""Decides: schedules, lowering to programs, cost models, simulation, bounds and search. Imports no torch."""
