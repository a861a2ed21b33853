"""``rtlynx bench quality``: every way to make a trained model sparse, on the demo's world, where each picture can be judged."""

from __future__ import annotations
