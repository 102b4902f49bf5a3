"""Tokens on real weights and speech; ``__main__`` says what is compared."""
