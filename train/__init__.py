"""Data, training and evaluation of the models of `ctr_models`."""
