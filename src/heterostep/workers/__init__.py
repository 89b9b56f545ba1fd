"""Processes that hold a model and make videos: what one does, how work is spread over them, and Ray's part of it."""
