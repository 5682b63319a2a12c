"""Published results, predicted or repeated: one script each."""
