"""What predictions were off by, and the bands that follow for the next ones: each file says its part."""
