"""Kernels for Hopper GPUs (sm_90a), written in Pallas Mosaic GPU."""
