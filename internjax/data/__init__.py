"""Documents and chats become token ids: NumPy only, no JAX but in `loader`."""
