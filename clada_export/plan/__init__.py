"""The sparsity plan: what it holds, its schema, its arrays, and whether it fits a model."""
