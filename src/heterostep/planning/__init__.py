"""What a run will need, before anything is loaded: a dry run on meta tensors, and timings of earlier benchmarks."""
