"""A network as the rest of the package sees it: weights, batches, loss, statistics, what attacks it."""
