"""Sparse autoencoders and transcoders: one canonical type, the formats that compile into it, what is done with it."""
