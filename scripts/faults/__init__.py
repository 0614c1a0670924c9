"""What runs are made to bear: a model and a corpus that cost nothing, and signals at random moments."""
