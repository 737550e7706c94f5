"""modeconn: connect independently trained neural networks."""
