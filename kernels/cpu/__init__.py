"""Decoding on CPUs: quantized products and paged attention in C++, called by XLA (`jax.ffi`)."""
