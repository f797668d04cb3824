"""What an arm costs: its bill, a request by rates and caches, break-even volumes (pure)."""
