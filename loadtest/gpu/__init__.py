"""Measurements on one GPU: the peers and the engine on the same work, and each kernel by itself."""
