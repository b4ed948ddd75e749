"""D2DMoE: experts by the predicted norm of their output."""
