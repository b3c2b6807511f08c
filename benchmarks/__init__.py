"""Measurements. Performance claims are made here and nowhere else; results with the machine named lie in results/."""
