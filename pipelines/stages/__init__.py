"""One file a stage: read, call, write. A stage never imports another; they talk through the files in `data/`."""
