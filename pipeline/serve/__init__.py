"""`forebay serve`: the page of a run, live, on this machine only."""
