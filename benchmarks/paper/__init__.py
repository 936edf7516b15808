"""The claims of the GVPO paper, each reproduced by one command: `python -m benchmarks.paper`."""
