"""Serving: a continuous-batching engine, an OpenAI-compatible server, and the LM protocol on it."""
