"""MoEfication: experts by their predicted activity."""
