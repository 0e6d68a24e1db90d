"""Tables with several targets: trees, other learners and this product, at their defaults."""
