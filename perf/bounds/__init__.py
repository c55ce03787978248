"""What a reader costs: operations and bytes by arithmetic, this machine's rates, and stages measured against both."""
