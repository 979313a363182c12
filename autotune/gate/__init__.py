"""Whether the locked plan is still as fast, as small and as right as its baseline says."""
