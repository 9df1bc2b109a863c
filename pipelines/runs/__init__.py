"""The record of each stage, DVC's graph, and the publication of runs to MLflow."""
