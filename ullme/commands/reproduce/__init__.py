"""The paper's tables: cells that are trained and evaluated, and what is written about them."""
