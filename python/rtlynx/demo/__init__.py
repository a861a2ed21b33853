"""The demo: a small text-to-image diffusion transformer that ships with the package, and everything that made it.

``scenes``, ``captions`` and ``drawing`` define the data, ``pipeline`` samples the model, ``classifier`` and ``metrics`` judge
its pictures, ``train`` (with ``model``, ``flow`` and ``evaluation``) trains it. Nothing here needs the compiled extension.
"""
