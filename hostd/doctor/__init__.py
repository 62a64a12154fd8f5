"""`mb host doctor`: looks at everything that a hostd needs on this machine, and says what to do about what is not right.

Reads and tries, changes nothing: what it makes (a bridge, a tap, a table) it makes in a network namespace that ends with it.
"""
