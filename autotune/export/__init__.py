"""Hands plans over: the command line of an engine that a team already operates, and what of a plan it cannot say."""
