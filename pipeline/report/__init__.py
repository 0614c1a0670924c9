"""What is told about plans and runs: words and tables. Nothing is imported here; `status` needs the standard library
only.
"""
