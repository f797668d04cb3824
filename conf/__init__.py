"""What a run is asked to do and what it leaves behind.

Imports the standard library, omegaconf and Hydra's config store only, so that a configuration can
be checked and a plan printed on a machine without torch, Ray or transformers.
"""
