"""Two ways of batching beside each other, on one device and the same traffic: as the product does it, and the best
fixed batch of a grid."""
