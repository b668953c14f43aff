"""One picture of each experiment's JSON: nothing is measured here, and the same JSON gives the same bytes."""
