"""Running what dvc.yaml defines and telling what became of it; a stage is reached only as a process."""
