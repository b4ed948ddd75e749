"""What an FFN looks like in a graph. Two matchers: `gated_ffn` and `plain_ffn`; the other modules are their vocabulary."""
