"""The network: shared stem, K encoder branches, K·N heads, and the gate that decides which of them stay."""
