"""`flowrl eval MODEL --suite FILE.toml --out FOLDER`: several tasks, one table, and all it takes to repeat it."""
