"""Attacks on networks, training against them, and what they leave of a network along a curve."""
