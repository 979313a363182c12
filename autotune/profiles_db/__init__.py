"""Remembers: machine profiles (measured or cited) and the plan database. Probes are the only part that uses torch."""
