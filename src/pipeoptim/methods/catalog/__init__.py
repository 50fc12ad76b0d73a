"""The methods, one module each: its docstring explains the method, `METHOD` is its table."""
