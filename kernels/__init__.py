"""Fast paths for the arithmetic of models, each beside the XLA reference it must equal."""
