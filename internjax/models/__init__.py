"""One decoder for the InternLM line and its relatives; formats in and out; loading by name."""
