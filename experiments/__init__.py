"""One file a verb: the whole story of what `internjax VERB` does; Hydra ends on the first line."""
