"""Code for dmtg in a package of its own."""
