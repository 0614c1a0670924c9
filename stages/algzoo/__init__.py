"""Tiny models of AlgZoo: recurrent networks and attention-only transformers of 8 to 1,408 parameters."""
