"""`com.clada::QuantMatMul`: its contract, the layout of its weights, how they are quantised, and its function body."""
