"""Measurements of whisper-serve from outside, as its users meet it: over HTTP, beside its peers."""
