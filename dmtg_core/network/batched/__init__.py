"""One pass of K branches of equal shape, with stacked weights."""
