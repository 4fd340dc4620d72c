"""Which distribution does each method reach, and what does it find? Tasks that can be listed whole, exact figures."""
