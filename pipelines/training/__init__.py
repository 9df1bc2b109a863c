"""Train density and successor models: the loop, checkpoints, worker processes and the two jobs."""
