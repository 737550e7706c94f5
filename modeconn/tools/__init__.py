"""Tools that know nothing of networks: randomness, tables, files, fingerprints, checks of settings."""
