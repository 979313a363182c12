"""Decoding: what proposes tokens, which of them are committed, and what is known of the sequences meanwhile."""
