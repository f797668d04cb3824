"""How long a test waits for a process before it calls it hung."""

# Not a promise about speed: a virtual machine at a quarter of its speed took 280 s for a run that
# takes 60 s elsewhere. Where a time is what is tested, the test has a limit of its own.
HANG_SECONDS = 1_200.0
