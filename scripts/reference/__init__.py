"""What the package promises to its users, read from the code: names, signatures, docstrings."""
