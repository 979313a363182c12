"""autotune: finds, runs, proves and keeps the fastest plan for a transformer."""

__version__ = "0.1.0"
