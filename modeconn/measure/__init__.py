"""What is measured of the networks along a curve."""
