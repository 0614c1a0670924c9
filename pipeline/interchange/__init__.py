"""What a run is to other libraries: their formats, written and read."""
