"""Measurements of the kernels and the layer; nothing else imports this package."""
