"""The pipeline of flowmatch: it runs experiments with DVC, Prefect and MLflow on top of `flowmatch_core`."""
