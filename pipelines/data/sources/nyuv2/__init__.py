"""Reader of NYUv2 as it is prepared for multi-task learning."""
