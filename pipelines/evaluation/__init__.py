"""Sample models and score the samples against the truth."""
