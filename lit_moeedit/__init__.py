"""Edit facts in the weights of a Mixture-of-Experts language model inside a Lightning run."""

__version__ = "0.1.0"
