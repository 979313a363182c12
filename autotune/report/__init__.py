"""Shows what was predicted and what ran: pictures, comparisons and explanations, all of them pure functions."""
