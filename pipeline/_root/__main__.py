"""`python -m forebay`."""

from forebay.pipeline.cli import main

main(prog_name="forebay")
