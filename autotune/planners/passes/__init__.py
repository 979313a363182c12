"""Passes: each takes a program and gives a program, complete in one respect more."""
