"""The closed-form velocity of flow matching on real image sets."""
