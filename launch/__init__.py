"""The only package that knows Ray, Weights & Biases and Hydra's main."""
