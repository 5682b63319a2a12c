"""Several engines behind one address: processes kept alive, a router with affinity, no JAX."""
