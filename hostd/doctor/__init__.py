"""`mb host doctor`: looks at everything that a hostd needs on this machine, and says what to do about what is not right.

Reads and tries: what it makes of a network (a bridge, a tap, a table) it makes in a namespace that ends with it. The probe of the
accelerator is hostd's own: it makes hostd's folders where they are missing, and remembers what it found there.
"""
