"""The network: shared stem, K encoder branches, K·N heads, and the gate that selects the heads that stay."""
