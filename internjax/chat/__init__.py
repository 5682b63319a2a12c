"""Talking with a model: in the terminal and on a web page, served here or anywhere."""
