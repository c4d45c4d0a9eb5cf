"""Studies: each a flat file with a frozen config and `run(config)`."""
