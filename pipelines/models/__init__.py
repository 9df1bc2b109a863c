"""Build models from `params.yaml`, and save and load trained ones."""
