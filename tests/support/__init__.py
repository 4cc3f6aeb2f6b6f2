"""Test helpers: describe trees, mount them for real, compare what comes out. Imports nothing of the product."""
