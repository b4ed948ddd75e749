"""DS-MoE: experts by a router that was trained with all of them."""
