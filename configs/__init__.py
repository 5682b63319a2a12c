"""Hydra files: one root a verb, and groups of choices beside them."""
