"""DCNv2, AutoInt and FT-Transformer on Criteo-like rows, built on `ctr_kernels`."""
