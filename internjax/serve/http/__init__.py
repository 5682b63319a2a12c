"""The HTTP faces of an engine: OpenAI's API, and what operators need."""
