"""Runs as dataset repositories of the Hugging Face hub: what of a run goes there, and how it comes back."""
