"""The decoder that is compiled: its FFNs, and what has to be known of it."""
