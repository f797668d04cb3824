"""Runs that another machine drives: submitted over Ray, Slurm or Kubernetes; copies of them."""
