"""The commands of `python -m pipelines.orchestration`, one file each.

A command's module has a docstring, whose first line is its help, a function `add_arguments(parser)` and a function
`run(options)` that returns the exit status.
"""
