"""The study of AdaM3 against other optimizers: what `compare.py` is made of."""
