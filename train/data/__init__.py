"""Criteo data: protocol, synthetic rows, preparation and loading."""
