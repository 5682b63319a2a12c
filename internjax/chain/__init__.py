"""The seeds' flow from model to application: one file a stage, gates between them, the chain."""
