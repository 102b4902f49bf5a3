"""The published account's own comparisons on one GPU; ``__main__`` says which."""
