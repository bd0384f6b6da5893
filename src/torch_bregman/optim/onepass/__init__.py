"""The optimizer step as one pass over memory: one protocol, a loop for CPUs and one for GPUs."""
