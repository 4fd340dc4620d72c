"""One file per trainer. Importing this package imports none of them; each says what it needs when it is missing."""
