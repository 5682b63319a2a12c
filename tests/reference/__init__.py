"""Tiny checkpoints in their upstream layouts, and golden logits that torch made of them."""
