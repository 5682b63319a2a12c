"""What turns one parameter tree into another: adapters and quantization."""
