"""Agents: a language model that uses tools, over any OpenAI-compatible server.

`tool` makes tools of functions, `loop` runs a model with them under one budget, `policies` are the
ways to ask (ReAct, function calling), `tools/` holds the ones that ship. Nothing here imports
`serve`: our own server is one endpoint among others.
"""
